"""What the host knows of a run before a device is touched: tokenizer, data, architectures, reward functions.

Whatever is wrong with them is found here, all of it at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.config import Config, RewardModelConfig, SFTConfig, StageConfig
from rlhf_jax.data.loader import Examples, Split, load_examples, training_texts
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.rewards.functions import RewardFunction, load_function
from rlhf_jax.roles import Origins, is_stage_dir, origins, stored_architecture

TOKENIZER = "tokenizer"  # RUN/tokenizer


class Plan(NamedTuple):
    """A stage with all that the host can know of it before a device is touched."""

    stage: StageConfig
    number: int
    """Place in the chain; part of the stage's root key."""
    algorithm: Algorithm
    architecture: Architecture
    origins: Origins
    tokenizer: Tokenizer
    train: Examples
    held_out: Examples
    demonstrations: Examples | None
    """Where a stage normalises scores: the texts whose mean score becomes 0."""
    function: RewardFunction | None
    gold: RewardFunction | None

    @property
    def directory(self) -> Path:
        """Returns RUN/STAGE."""
        return Path(self.stage.run.dir) / self.stage.name

    def row_counts(self) -> dict[str, int]:
        """Returns the numbers of rows that the mesh has to divide, by the option that decides them."""
        settings, per_record = self.stage.settings, self.algorithm.rows_per_record
        minibatch = settings.batch_size // settings.num_minibatches
        return {
            "batch_size": per_record * settings.batch_size,
            "batch_size / num_minibatches": per_record * minibatch,
            "microbatch_size": per_record * (settings.microbatch_size or minibatch),
        }


def plan_stages(config: Config, tokenizer: Tokenizer) -> list[Plan]:
    """Returns a plan per stage.

    Raises:
        ValueError: every problem at once: data, lengths, vocabulary, reward functions.
    """
    plans: list[Plan] = []
    problems: list[str] = []
    for number, stage in enumerate(config.stages):
        try:
            plans.append(_plan(stage, number, tokenizer, {plan.stage.name: plan for plan in plans}))
        except ValueError as error:
            problems.append(f"stage {stage.name}: {error}")
            if any(later.start_from == stage.name for later in config.stages):
                break  # what follows from it cannot be judged
    if problems:
        raise ValueError("\n".join(problems))
    return plans


def _plan(stage: StageConfig, number: int, tokenizer: Tokenizer, earlier: dict[str, Plan]) -> Plan:
    algorithm = ALGORITHMS[stage.algorithm]
    where = origins(stage, set(earlier))
    architecture = _architecture(stage, where, tokenizer, earlier)

    def examples(of: StageConfig, split: Split) -> Examples:
        kind = ALGORITHMS[of.algorithm].records
        loss_on = of.settings.loss_on if isinstance(of.settings, SFTConfig) else "completion"
        return load_examples(of.data, kind, split, tokenizer, of.run.seed, loss_on=loss_on)

    longest = stage.data.max_length
    if algorithm.records == "prompt_only":
        longest = stage.data.max_prompt_length + stage.rollout.max_new_tokens
    if longest > architecture.context_length:
        raise ValueError(
            f"rows of up to {longest} tokens do not fit the model's context of "
            f"{architecture.context_length}; lower data.max_length, or for PPO data.max_prompt_length or "
            "rollout.max_new_tokens"
        )
    demonstrations = None
    if algorithm.normalizes_scores:
        assert isinstance(stage.settings, RewardModelConfig)
        if stage.settings.normalizer != "none":
            wants = stage.settings.normalize_on == "demonstrations"
            demonstrations = earlier[stage.start_from].train if wants else examples(stage, "train")
    train, held_out = examples(stage, "train"), examples(stage, "eval")
    length = max(train.length, held_out.length)  # one shape, so that programs compile once
    return Plan(
        stage=stage,
        number=number,
        algorithm=algorithm,
        architecture=architecture,
        origins=where,
        tokenizer=tokenizer,
        train=dataclasses.replace(train, length=length),
        held_out=dataclasses.replace(held_out, length=length),
        demonstrations=demonstrations,
        function=load_function(stage.rewards.function) if stage.rewards.function else None,
        gold=load_function(stage.rewards.gold) if stage.rewards.gold else None,
    )


def _architecture(
    stage: StageConfig, where: Origins, tokenizer: Tokenizer, earlier: dict[str, Plan]
) -> Architecture:
    if stage.start_from in earlier:
        architecture = earlier[stage.start_from].architecture
    elif where.policy is not None:
        architecture = stored_architecture(where.policy)
    else:
        architecture = Architecture.from_config(stage.model, vocab_size=len(tokenizer))
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary has "
            f"{architecture.vocab_size}; use the tokenizer that the model was trained with (tokenizer.path)"
        )
    if where.reward is not None and stage.reward_from not in earlier:
        of_reward = stored_architecture(where.reward)
        if of_reward != architecture:
            raise ValueError(
                f"the reward model of {where.reward} has another architecture ({of_reward}) than the policy "
                f"({architecture}); train the reward model from the same model"
            )
    return architecture


def prepare_tokenizer(config: Config) -> Tokenizer:
    """Returns the run's tokenizer: the one it already has, the one that is named, the model's, or a new one.

    A tokenizer is trained on the texts of the first stage when neither the configuration nor what the stages
    start from brings one.

    Raises:
        ValueError: no such tokenizer; it lacks EOS or pad; its training texts cannot be read.
    """
    first = config.stages[0]
    stored = Path(config.run.dir) / TOKENIZER
    if stored.is_dir():
        return load_tokenizer(dataclasses.replace(first.tokenizer, path=str(stored)))
    if first.tokenizer.path or first.model.path:
        return load_tokenizer(first.tokenizer, first.model.path)
    if first.start_from:
        start = Path(first.start_from)
        beside = start.parent / TOKENIZER if is_stage_dir(start) else start
        return load_tokenizer(dataclasses.replace(first.tokenizer, path=str(beside)))
    texts = training_texts(first.data, ALGORITHMS[first.algorithm].records, first.run.seed)
    return train_tokenizer(texts, first.tokenizer.vocab_size)
