"""Which options a stage does not read, and why: they may not be set, and keep their defaults."""

from __future__ import annotations

from collections.abc import Container, Mapping

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.config import PROMPTLESS_FORMATS, StageConfig
from rlhf_jax.config_types import COMPARISONS
from rlhf_jax.offline_config import PairLossConfig, ReferenceConfig, RewardModelConfig
from rlhf_jax.online_config import (
    DistillConfig,
    GRPOConfig,
    OnlineConfig,
    PolicyGradientConfig,
    PPOConfig,
    RAFTConfig,
    ShapedRewardConfig,
    TRPOConfig,
)

ARCHITECTURE = (
    "path",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "mlp_size",
    "context_length",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
)
"""Options of the model section that are settled by what a stage starts from."""

READ_BY_OPTIMIZER = {
    "adamw": ("beta1", "beta2", "eps"),
    "lion": ("beta1", "beta2"),
    "adafactor": (),
    "muon": ("beta1", "beta2", "eps", "momentum"),
}
"""Options of the optimizer section that not every optimiser has."""


def fresh_adapter(stage: StageConfig, stages: Container[str]) -> str:
    """Returns why a stage cannot go on with the adapter in lora.path, whatever that is; empty where it can.

    Args:
        stage: its lora section may be that of all stages.
        stages: names of this run's.
    """
    if stage.lora.rank == 0:
        return "lora.rank is 0"
    if stage.is_online or isinstance(stage.settings, ReferenceConfig):
        return f"{stage.algorithm} begins with fresh adapters, for its reference is the base alone"
    if stage.start_from in stages:
        return f"the stage starts from {stage.start_from!r}, which is not the model that the adapter is for"
    return ""


def _has_whole_judge(stage: StageConfig, stages: Mapping[str, StageConfig]) -> bool:
    """Returns whether a stage's reward model may be a model of its own, and not an adapter of its base."""
    judge = stages.get(stage.reward_from)
    if judge is None or judge.lora.rank == 0 or stage.rewards.ensemble != "mean":
        return bool(stage.reward_from)
    ours, theirs = (of.start_from or of.model.path for of in (stage, judge))
    return ours != theirs


def unread(stage: StageConfig, stages: Mapping[str, StageConfig]) -> dict[str, str]:
    """Returns {section, or section.option: why} of what a stage does not read.

    Args:
        stage: a stage with all its sections.
        stages: by name, in order, those before it at least; the first one brings the tokenizer.
    """
    settings = stage.settings
    reasons = {other: f"no stage runs {other}" for other in ALGORITHM_SECTIONS if other != stage.algorithm}

    if stage.start_from:
        reasons |= {f"model.{key}": "a stage has the model that it starts from" for key in ARCHITECTURE}
    elif stage.model.path:
        reasons |= {f"model.{key}": "config.json of model.path decides it" for key in ARCHITECTURE[1:]}

    first = next(iter(stages.values()), stage)
    if stage.tokenizer.path:
        reasons["tokenizer.vocab_size"] = "tokenizer.path names a trained tokenizer"
    elif source := first.start_from or first.model.path or first.teacher_from:
        reasons["tokenizer.vocab_size"] = f"the tokenizer of {source!r} is used"
    else:
        for key in ("eos_token", "pad_token"):
            reasons[f"tokenizer.{key}"] = "a tokenizer that is trained on the spot brings its own"

    has_base = stage.lora.rank >= 1
    if not has_base:
        for key in ("alpha", "targets", "rslora"):
            reasons[f"lora.{key}"] = "lora.rank is 0"
    if why := fresh_adapter(stage, stages):
        reasons["lora.path"] = why
    if not stage.is_online:
        reasons["model.sharing"] = "only an online stage, such as ppo, has roles that could share"
        reasons["model.frozen_memory"] = (
            "only an online stage, such as ppo, has models not needed all the time"
        )
        needs_reference = isinstance(settings, ReferenceConfig) and not settings.precompute_ref
        if not has_base and not needs_reference:
            reasons["model.frozen_dtype"] = "the stage has no frozen model, for lora.rank is 0"
    elif isinstance(settings, DistillConfig) and not stage.reward_from:
        reasons["model.frozen_memory"] = "the teacher of distill is needed in each step"
    elif stage.model.sharing == "hydra" and not _has_whole_judge(stage, stages):
        reasons["model.frozen_memory"] = "the base of model.sharing 'hydra' is needed all the time"

    data = stage.data
    for key in ("prompts", "detokenize"):
        if settings.records != "preference" or data.format not in ("auto", "labelled"):
            reasons[f"data.{key}"] = "only a stage that reads pairs of data.format 'labelled' uses it"
    if stage.algorithm == "sft":
        reasons["data.prompt_tokens"] = "an sft stage learns the whole text"
    elif not stage.is_online and settings.records != "preference":
        reasons["data.prompt_tokens"] = f"a {stage.algorithm} stage reads no plain text as {settings.records}"
    elif settings.records == "preference" and not data.prompts:
        reasons["data.prompt_tokens"] = "data.prompts is not set"
    elif stage.is_online and data.format not in ("auto", "text"):
        reasons["data.prompt_tokens"] = f"records of data.format {data.format!r} have prompts"
    if data.format in PROMPTLESS_FORMATS:
        reasons["data.prompt_template"] = (
            f"records of data.format {data.format!r} have no prompt of their own"
        )
    if data.train == "synthetic" and data.eval in ("", "synthetic"):
        for key in ("format", "columns", "prompts", "detokenize", "prompt_tokens", "prompt_template"):
            reasons[f"data.{key}"] = "the embedded task (data.train: synthetic) has no columns"
    if data.packing:
        reasons["data.length_buckets"] = "data.packing is true: rows have one length"
    if stage.is_online:
        reasons["data.packing"] = f"{stage.algorithm} packs no prompts"
        for key in ("max_length", "truncation"):
            reasons[f"data.{key}"] = f"{stage.algorithm} has max_prompt_length and rollout.max_new_tokens"

    optimizer = stage.optimizer
    for key in ("beta1", "beta2", "eps", "momentum"):
        if key not in READ_BY_OPTIMIZER[optimizer.name]:
            reasons[f"optimizer.{key}"] = f"optimizer.name is {optimizer.name!r}"
    if optimizer.schedule == "constant":
        reasons["optimizer.end_fraction"] = "optimizer.schedule is 'constant'"
    if optimizer.schedule != "wsd":
        reasons["optimizer.decay_fraction"] = f"optimizer.schedule is {optimizer.schedule!r}"
    if optimizer.state_dtype == stage.model.param_dtype == "float32":
        reasons["optimizer.stochastic_rounding"] = (
            "neither model.param_dtype nor optimizer.state_dtype is 'bfloat16'"
        )

    if stage.is_online and not stage.rollout.slots:
        reasons["rollout.refill_size"] = "rollout.slots is 0: all completions of a batch are sampled at once"
    if stage.is_online and not stage.rollout.devices and stage.rollout.importance == "auto":
        reasons["rollout.importance_cap"] = "rollout.devices is 0: the policy samples what it learns from"
    if not stage.is_online:
        reasons["rollout"] = "only an online stage, such as ppo, samples"
        reasons["rewards"] = "only an online stage, such as ppo, trains on scores"
        reasons["run.num_samples"] = "only an online stage, such as ppo, writes samples"
    if settings.records in COMPARISONS:  # of which the gold function tells the ceiling of an accuracy
        del reasons["rewards"]
        for key in ("model_weight", "function", "function_weight", "ensemble", "ensemble_stds"):
            reasons[f"rewards.{key}"] = "only an online stage, such as ppo, trains on scores"
    if isinstance(settings, RewardModelConfig):
        reasons["model.logprob_chunk"] = "a reward_model stage computes no log-probabilities"
        reasons |= {f"reward_model.{key}": why for key, why in _of_reward_model(settings).items()}
        if not stage.start_from and not stage.model.path:
            reasons["reward_model.fresh_trunk"] = "the stage starts from no model: its trunk is fresh"
    if isinstance(settings, PairLossConfig) and settings.loss in ("ipo", "hinge"):
        reasons[f"{stage.algorithm}.label_smoothing"] = f"{stage.algorithm}.loss is {settings.loss!r}"
    if isinstance(settings, OnlineConfig):
        if not stage.reward_from and stage.rewards.model_weight != 0:
            reasons["rewards.model_weight"] = f"stage {stage.name!r} has no reward_from"
        judge = stages.get(stage.reward_from)
        if not stage.reward_from:
            reasons["rewards.ensemble"] = f"stage {stage.name!r} has no reward_from"
        elif judge is not None and getattr(judge.settings, "num_heads", 1) == 1:
            reasons["rewards.ensemble"] = f"{stage.reward_from!r} has one score head"
        if stage.rewards.ensemble != "mean_minus_std":
            reasons["rewards.ensemble_stds"] = f"rewards.ensemble is {stage.rewards.ensemble!r}"
        if not stage.rewards.function:
            reasons["rewards.function_weight"] = "rewards.function is not set"
        elif isinstance(stage.rewards.function, dict):
            reasons["rewards.function_weight"] = "rewards.function tells the weight of each"
        section = stage.algorithm
        if not settings.learns_from_scores:
            reasons[f"{section}.missing_eos"] = f"the loss of {section} is of tokens and reads no score"
        if settings.missing_eos in ("none", "mask"):
            reasons[f"{section}.missing_eos_value"] = f"{section}.missing_eos is {settings.missing_eos!r}"
        if not isinstance(settings, ShapedRewardConfig):
            for key in ("importance", "importance_cap"):
                reasons[f"rollout.{key}"] = f"the loss of {stage.algorithm} has no ratio to be corrected"
    if isinstance(settings, RAFTConfig) and settings.keep == "best":
        reasons[f"{stage.algorithm}.threshold"] = f"{stage.algorithm}.keep is 'best'"
    if isinstance(settings, TRPOConfig) and settings.line_search_steps == 1:
        section = stage.algorithm
        reasons[f"{section}.line_search_factor"] = f"{section}.line_search_steps is 1: no step is tried again"
    if isinstance(settings, ShapedRewardConfig):
        section = stage.algorithm
        if settings.kl_controller == "fixed":
            for key in ("kl_target", "kl_horizon"):
                reasons[f"{section}.{key}"] = f"{section}.kl_controller is 'fixed'"
        if not settings.overlong_from:
            for key in ("overlong_buffer", "overlong_penalty"):
                reasons[f"{section}.{key}"] = f"{section}.overlong_from is 0"
    if isinstance(settings, PolicyGradientConfig):
        section = stage.algorithm
        if settings.surrogate == "clip":
            for key in ("old_kl_coef", "old_kl_target"):
                reasons[f"{section}.{key}"] = f"{section}.surrogate is 'clip'"
        else:
            for key in ("clip_eps", "clip_eps_high", "dual_clip"):
                reasons[f"{section}.{key}"] = f"{section}.surrogate is 'kl'"
        if not settings.ptx_coef:
            reasons[f"{section}.ptx_from"] = f"{section}.ptx_coef is 0"
        if isinstance(settings, PPOConfig) and settings.ratio == "sequence":
            for key in ("gamma", "gae_lambda"):
                reasons[f"{section}.{key}"] = f"{section}.ratio is 'sequence': a completion is one action"
        if not settings.kl_coef and settings.kl_controller == "fixed":
            reasons[f"{section}.kl_term"] = f"{section}.kl_coef is 0"
    if isinstance(settings, GRPOConfig) and settings.kl_coef:
        reasons[f"{stage.algorithm}.tracks_kl"] = f"{stage.algorithm}.kl_coef is not 0"
    if isinstance(settings, GRPOConfig) and (settings.kl_term != "reward" or not settings.kl_coef):
        section = stage.algorithm
        reasons[f"{section}.credit"] = f"without a KL in the reward ({section}.kl_term) both are the same"
    return reasons


def _of_reward_model(settings: RewardModelConfig) -> dict[str, str]:
    """Returns {option: why} of what a reward model's loss does not read."""
    of_loss = f"reward_model.loss is {settings.loss!r}"
    reasons: dict[str, str] = {}
    if settings.loss not in ("bradley_terry", "hinge"):
        reasons |= dict.fromkeys(("margin", "margin_from_data", "all_pairs"), of_loss)
    if settings.loss != "bradley_terry":
        reasons["label_smoothing"] = of_loss
    if settings.loss == "regression":
        reasons["center_coef"] = of_loss
    if settings.normalizer == "none":
        reasons["normalize_on"] = "reward_model.normalizer is 'none'"
    return reasons
