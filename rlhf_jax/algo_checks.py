"""Whether the options of a stage's algorithm fit each other; see config_checks.py for what the lines are."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_jax.config import StageConfig
from rlhf_jax.config_file import PathOf
from rlhf_jax.offline_config import CDPOConfig, KTOConfig
from rlhf_jax.online_config import (
    GRPOConfig,
    OnlineConfig,
    OnlineDPOConfig,
    PolicyGradientConfig,
    RAFTConfig,
    ShapedRewardConfig,
    TRPOConfig,
)
from rlhf_jax.options import did_you_mean


def check_algorithm(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields every problem of the options that belong to a stage's algorithm."""
    yield from check_scores(stage, path)
    yield from check_controller(stage, path)
    yield from check_policy_loss(stage, path)
    yield from check_groups(stage, path)
    yield from check_rollout_devices(stage, path)
    yield from check_preferences(stage, path)
    yield from check_trust_region(stage, path)
    yield from check_pairs(stage, path)
    yield from check_kept(stage, path)


def check_scores(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields what is wrong with where an online stage's scores come from."""
    rewards = stage.rewards
    if not stage.is_online:
        return
    if stage.reward_from and rewards.model_weight == 0:
        yield f"stages.{stage.name}.reward_from: would be ignored: {path('rewards', 'model_weight')} is 0"
    if isinstance(rewards.function, dict):
        if not stage.reward_from and not any(rewards.function.values()):
            yield f"{path('rewards', 'function')}: gives no score: all weights are 0"
    elif rewards.function and rewards.function_weight == 0:
        yield f"{path('rewards', 'function')}: would be ignored: {path('rewards', 'function_weight')} is 0"
    if isinstance(stage.settings, OnlineConfig) and stage.settings.learns_from_scores and not stage.has_judge:
        yield (
            f"stages.{stage.name}: nothing gives its completions a score; set reward_from to a reward_model "
            "stage or a directory, or rewards.function to package.module:name"
        )


def check_controller(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields what is wrong with the weight of the KL, and a length that no completion exceeds."""
    settings, section = stage.settings, stage.algorithm
    if not isinstance(settings, ShapedRewardConfig):
        return
    if settings.kl_controller == "adaptive" and settings.kl_coef == 0:
        yield (
            f"{path(section, 'kl_coef')}: must be > 0 where {section}.kl_controller is 'adaptive', which "
            "multiplies it and so would leave it at 0, got 0"
        )
    rows = settings.rows_per_update
    if settings.kl_controller == "adaptive" and settings.kl_horizon <= 0.2 * rows:
        yield (
            f"{path(section, 'kl_horizon')}: must be more than 0.2 * {settings.update_rows} = "
            f"{0.2 * rows:g}, got {settings.kl_horizon}"
        )
    if settings.overlong_from >= stage.rollout.max_new_tokens:
        yield (
            f"{path(section, 'overlong_from')}: must be less than rollout.max_new_tokens = "
            f"{stage.rollout.max_new_tokens}, got {settings.overlong_from}"
        )


def check_policy_loss(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields options of a policy's loss that make no sense together, and buffers longer than completions."""
    settings, section = stage.settings, stage.algorithm
    if not isinstance(settings, PolicyGradientConfig):
        return
    if settings.surrogate == "kl" and settings.ratio != "token":
        yield (
            f"{path(section, 'ratio')}: must be 'token' where {section}.surrogate is 'kl', whose KL is "
            f"of tokens, got {settings.ratio!r}"
        )
    if settings.surrogate == "kl" and settings.num_epochs * settings.num_minibatches == 1:
        yield (
            f"{path(section, 'surrogate')}: must be 'clip' where a rollout has one optimiser step, before "
            f"which the policy is the old one: {section}.num_epochs and num_minibatches are 1, got 'kl'"
        )
    if settings.old_kl_target and getattr(settings, "value_warmup", 0):
        yield (
            f"{path(section, 'old_kl_target')}: must be 0 where {section}.value_warmup is not, as the policy "
            f"then stands still and its weight would be halved, got {settings.old_kl_target:g}"
        )
    if settings.early_stop_kl and settings.num_epochs * settings.num_minibatches == 1:
        yield (
            f"{path(section, 'early_stop_kl')}: must be 0 where a rollout has one optimiser step, before "
            f"which the policy is the old one: {section}.num_epochs and num_minibatches are 1, got "
            f"{settings.early_stop_kl:g}"
        )
    if settings.early_stop_kl and settings.surrogate == "kl" and settings.old_kl_target:
        yield (
            f"{path(section, 'early_stop_kl')}: must be 0 where {section}.old_kl_target is not, whose weight "
            f"follows a last pass that may not be made, got {settings.early_stop_kl:g}"
        )
    if settings.ratio == "sequence" and settings.aggregation != "sequence":
        yield (
            f"{path(section, 'aggregation')}: must be 'sequence' where {section}.ratio is 'sequence', as a "
            f"completion is one action, got {settings.aggregation!r}"
        )
    is_corrected = stage.rollout.importance == "always" or stage.rollout.devices > 0
    if is_corrected and settings.ratio != "token" and stage.rollout.importance_cap:
        yield (
            f"{path('rollout', 'importance_cap')}: must be 0 where {section}.ratio is {settings.ratio!r}, as "
            f"importance weights are of tokens, got {stage.rollout.importance_cap:g}"
        )
    if 0 < settings.dual_clip <= 1:
        yield f"{path(section, 'dual_clip')}: must be more than 1, or 0 for none, got {settings.dual_clip:g}"


def check_ptx(stage: StageConfig, earlier: dict[str, StageConfig], path: PathOf) -> Iterator[str]:
    """Yields where a policy's loss finds no demonstrations to be mixed with."""
    settings, section = stage.settings, stage.algorithm
    if not isinstance(settings, PolicyGradientConfig) or not settings.ptx_coef:
        return
    of_sft = [name for name, of in earlier.items() if of.algorithm == "sft"]
    if settings.ptx_from in of_sft:
        return
    near = did_you_mean(settings.ptx_from, of_sft) if settings.ptx_from else ""
    there = near or (f"; there is {', '.join(of_sft)}" if of_sft else "; there is none: put one before it")
    got = repr(settings.ptx_from)
    if settings.ptx_from in earlier:
        got += f", which runs {earlier[settings.ptx_from].algorithm}"
    yield (
        f"{path(section, 'ptx_from')}: must name an sft stage that comes before {stage.name} in the list, "
        f"whose training records are the demonstrations of {section}.ptx_coef {settings.ptx_coef:g}, got "
        f"{got}{there}"
    )


def check_groups(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields what needs several completions of a prompt where there is one, and replaced groups elsewhere."""
    settings, section = stage.settings, stage.algorithm
    if not isinstance(settings, GRPOConfig):
        return
    of_groups = [
        f"{option} {value!r}"
        for option, value in (("baseline", settings.baseline), ("scale", settings.scale))
        if value in ("group", "others")
    ]
    if settings.max_rollouts > 1:
        of_groups.append(f"max_rollouts {settings.max_rollouts}")
    if settings.group_size == 1 and of_groups:
        yield (
            f"{path(section, 'group_size')}: must be >= 2 where {section} has {' and '.join(of_groups)}, "
            "which compare the completions of a prompt, got 1"
        )
    if settings.baseline == "greedy":
        if settings.max_rollouts > 1:
            yield (
                f"{path(section, 'max_rollouts')}: must be 1 where {section}.baseline is 'greedy', with "
                f"which completions of equal rewards teach as well, got {settings.max_rollouts}"
            )
        if stage.rollout.devices:
            yield (
                f"{path('rollout', 'devices')}: must be 0 where {section}.baseline is 'greedy', as its "
                f"greedy completions are by the policy that is updated, got {stage.rollout.devices}"
            )
    elif settings.max_rollouts > 1 and stage.rollout.devices:
        yield (
            f"{path(section, 'max_rollouts')}: must be 1 where rollout.devices is not 0, as a batch is "
            f"sampled before the scores of the last one are known, got {settings.max_rollouts}"
        )


def check_rollout_devices(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields why devices cannot be set aside for rollouts, whatever their number is."""
    number, mesh = stage.rollout.devices, stage.mesh
    if not stage.is_online or not number:
        return
    settings = stage.settings
    if isinstance(settings, ShapedRewardConfig) and settings.kl_controller == "adaptive":
        yield (
            f"{path(stage.algorithm, 'kl_controller')}: must be fixed where rollout.devices is not 0, as the "
            f"KL of the rollout is then not that of the policy which is held to {stage.algorithm}.kl_target, "
            "got 'adaptive'"
        )
    where, open_axes = path("rollout", "devices"), [axis for axis, size in mesh.sizes.items() if size == -1]
    if mesh.slice != 1:
        yield f"{where}: must be 0 where mesh.slice is not 1, got {number} for {mesh.slice}"
    if open_axes in ([], ["tensor"]):
        yield (
            f"{where}: must be 0 where no axis of the mesh but mesh.tensor is -1 and so takes what is left, "
            f"got {number}; set mesh.data or mesh.fsdp to -1"
        )
    elif number % max(mesh.tensor, 1):
        yield f"{where}: must be a multiple of mesh.tensor = {mesh.tensor}, got {number}"


def check_preferences(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields options with which an algorithm of preferences would learn nothing, or would be another one."""
    settings, section = stage.settings, stage.algorithm
    if isinstance(settings, KTOConfig) and settings.desirable_weight == settings.undesirable_weight == 0:
        yield (
            f"{path(section, 'desirable_weight')}: must be > 0 where {section}.undesirable_weight is 0, as "
            "nothing would be learned, got 0"
        )
    if isinstance(settings, CDPOConfig) and settings.label_smoothing == 0:
        yield f"{path(section, 'label_smoothing')}: must be > 0, as {section} is dpo without it, got 0"


def check_trust_region(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields what does not go with steps that are checked before they are made."""
    if not isinstance(stage.settings, TRPOConfig):
        return
    model, name = stage.model, stage.algorithm
    if model.attention == "flash":
        yield (
            f"{path('model', 'attention')}: must be auto or xla in a stage that runs {name}, whose products "
            "with the Fisher matrix need forward-mode derivatives, which no kernel has, got 'flash'"
        )
    if model.param_dtype != "float32":
        yield (
            f"{path('model', 'param_dtype')}: must be float32 in a stage that runs {name}: rounding would "
            f"change the step whose KL was checked, got {model.param_dtype!r}"
        )
    if model.sharing == "trunk":
        yield (
            f"{path('model', 'sharing')}: must be separate or hydra in a stage that runs {name}: the value "
            "loss would move a policy on whose trunk the values are, got 'trunk'"
        )


def check_pairs(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields what would part the pairs that a stage samples, or have none."""
    settings, section = stage.settings, stage.algorithm
    if not isinstance(settings, OnlineDPOConfig):
        return
    if settings.group_size == 1:
        yield f"{path(section, 'group_size')}: must be >= 2, as a pair is two completions of a prompt, got 1"
    if settings.batch_size % settings.num_minibatches:
        yield (
            f"{path(section, 'num_minibatches')}: must divide batch_size, the pairs of an iteration, got "
            f"{settings.num_minibatches} for {settings.batch_size}"
        )
    if settings.sequences_per_row > 1 and settings.sequences_per_row % 2:
        yield (
            f"{path(section, 'sequences_per_row')}: must be 1 or even, as a pair is in one row, got "
            f"{settings.sequences_per_row}"
        )
    if settings.sequences_per_row == 1 and settings.microbatch_size % 2:
        yield (
            f"{path(section, 'microbatch_size')}: must be even, as a pair is two rows, got "
            f"{settings.microbatch_size}"
        )


def check_kept(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields what would make a stage learn more completions than it samples, or all of them."""
    settings, section = stage.settings, stage.algorithm
    if not isinstance(settings, RAFTConfig):
        return
    if settings.num_kept > settings.group_size:
        yield (
            f"{path(section, 'num_kept')}: must be at most group_size = {settings.group_size}, got "
            f"{settings.num_kept}"
        )
    elif settings.num_kept == settings.group_size and settings.keep == "best":
        yield (
            f"{path(section, 'num_kept')}: must be less than group_size = {settings.group_size} where "
            f"{section}.keep is 'best', as all completions would be learned, got {settings.num_kept}"
        )
