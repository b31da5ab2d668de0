"""Whether the options of a reward model fit each other; see config_checks.py for what the lines are."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_jax.config import StageConfig
from rlhf_jax.config_file import PathOf
from rlhf_jax.offline_config import RewardModelConfig


def check_reward_model(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields options of a reward model's loss that do not fit each other."""
    settings = stage.settings
    if not isinstance(settings, RewardModelConfig):
        return
    if settings.loss == "hinge" and settings.margin == 0 and not settings.margin_from_data:
        yield (
            f"{path('reward_model', 'margin')}: must be > 0 where reward_model.loss is 'hinge', as equal "
            "scores would have no loss, got 0; 1 is usual"
        )
    if settings.num_heads > 1 and stage.lora.path:
        yield (
            f"{path('reward_model', 'num_heads')}: must be 1 where lora.path is set, as the adapter there "
            f"may have a head, got {settings.num_heads}"
        )
    if settings.fresh_trunk and stage.lora.rank:
        yield (
            f"{path('reward_model', 'fresh_trunk')}: must be false where lora.rank is not 0, as adapters are "
            f"for the model that the stage starts from, got true for {stage.lora.rank}"
        )
    if settings.loss == "regression" and settings.normalizer != "none":
        yield (
            f"{path('reward_model', 'normalizer')}: must be none where reward_model.loss is 'regression', "
            f"whose scores are ratings already, got {settings.normalizer!r}"
        )


def check_normalizer(stage: StageConfig, earlier: dict[str, StageConfig], path: PathOf) -> Iterator[str]:
    """Yields where a reward model's normaliser finds no demonstrations."""
    settings = stage.settings
    if not isinstance(settings, RewardModelConfig) or settings.normalizer == "none":
        return
    source = earlier.get(stage.start_from)
    if settings.normalize_on == "demonstrations" and (source is None or source.algorithm != "sft"):
        start = f"starts from {stage.start_from!r}" if stage.start_from else "has no from"
        yield (
            f"{path('reward_model', 'normalize_on')}: 'demonstrations' are the training records of the sft "
            f"stage that this one starts from, but stage {stage.name!r} {start}; set "
            "reward_model.normalize_on: chosen, or reward_model.normalizer: none"
        )
