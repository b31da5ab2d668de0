"""The section of each algorithm: its options, with their one default, and what follows from them.

A section that differs from another in its defaults alone is a subclass of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_jax.config_types import (
    Count,
    FiniteFloat,
    Fraction,
    Kind,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """Learning from given records: a step is an update on a batch of them."""

    records: ClassVar[Kind]
    num_epochs: ClassVar[int] = 1
    num_minibatches: ClassVar[int] = 1
    num_steps: PositiveInt = 300
    """Optimiser steps."""
    batch_size: PositiveInt = 32
    """Records of one step, a pair being one, over all devices; rows where data.packing."""
    microbatch_size: Count = 0
    """Records (rows where data.packing) of one forward and backward pass; 0: the whole batch. Divides
    batch_size."""
    eval_every: PositiveInt = 100
    """Steps between two evaluations; there is one before the first step and one after the last."""

    @property
    def num_updates(self) -> int:
        """Returns the number of update calls of the stage."""
        return self.num_steps

    @property
    def num_optimizer_steps(self) -> int:
        """Returns the number of optimiser steps of the stage."""
        return self.num_steps

    @property
    def rows_per_update(self) -> int:
        """Returns batch_size: a batch has the rows of so many records."""
        return self.batch_size


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning."""

    records: ClassVar[Kind] = "prompt_completion"
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that carry loss: the completion's, or the prompt's too."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(OfflineConfig):
    """Reward model: Bradley-Terry on preference pairs."""

    records: ClassVar[Kind] = "preference"
    normalizer: Literal["none", "mean", "mean_std"] = "mean"
    """What is made 0 (and 1) on demonstrations: nothing, the mean score, the mean and the deviation."""
    normalize_on: Literal["demonstrations", "chosen"] = "demonstrations"
    """Texts on which the normaliser is measured: the training records of the SFT stage that this one starts
    from, or the chosen completions of its own."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Learning from completions that the policy samples: an iteration is a rollout and the update on it."""

    records: ClassVar[Kind] = "prompt_only"
    num_iterations: PositiveInt = 100
    """Iterations of rollout and update."""
    batch_size: PositiveInt = 64
    """Prompts of one iteration, over all devices."""
    group_size: PositiveInt = 1
    """Completions of each prompt; they share one pass over the prompt."""
    num_epochs: PositiveInt = 4
    """Passes over a rollout."""
    num_minibatches: PositiveInt = 4
    """Optimiser steps of one pass; divides the completions, batch_size * group_size."""
    microbatch_size: Count = 0
    """Rows of one forward and backward pass; 0: a whole minibatch. Divides its rows, batch_size * group_size
    / num_minibatches / sequences_per_row."""
    sequences_per_row: PositiveInt = 1
    """Completions, with their prompts, that share a row in scoring and update and do not see each other: less
    padding, the same loss. Divides batch_size * group_size / num_minibatches. Attention is over rows so many
    times longer, which costs more where no kernel skips what is not seen, as cuDNN's does not."""
    length_buckets: PositiveInt = 1
    """Different lengths of rows in scoring and update, or fewer: those of a minibatch have the least in which
    all fit. Both programs are compiled for each, all at the start."""
    missing_eos: Literal["none", "subtract", "replace", "mask"] = "none"
    """Completions without EOS: nothing, subtract missing_eos_value from the score, replace the score by it,
    or leave the row out of loss, whitening and metrics, those of evaluations too."""
    missing_eos_value: FiniteFloat = 1.0
    """See missing_eos."""
    eval_every: PositiveInt = 20
    """Iterations between two evaluations; there is one before the first iteration and one after the last."""

    @property
    def num_updates(self) -> int:
        """Returns the number of update calls of the stage, one an iteration."""
        return self.num_iterations

    @property
    def num_optimizer_steps(self) -> int:
        """Returns the number of optimiser steps of the stage."""
        return self.num_iterations * self.num_epochs * self.num_minibatches

    @property
    def rows_per_update(self) -> int:
        """Returns the completions of one iteration."""
        return self.batch_size * self.group_size


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """Proximal policy optimisation with a value model and a KL penalty in the reward."""

    value_learning_rate: NonNegativeFloat = 0.0
    """Learning rate of the value model; 0: that of the optimizer section."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL term in the reward, to start with."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether the weight follows the measured KL."""
    kl_target: PositiveFloat = 6.0
    """Adaptive controller: KL to the reference to hold, nats per sequence."""
    kl_horizon: PositiveInt = 10000
    """Adaptive controller: episodes over which the weight adapts; more than 0.2 of those of an iteration."""
    gamma: Fraction = 1.0
    """Discount of a token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    clip_eps: PositiveFloat = 0.2
    """Clip of the policy ratio."""
    value_clip_eps: PositiveFloat = 0.2
    """Clip of the value around its old estimate."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss. A value model with parameters of its own has clipping and Adam to itself: the
    weight then only decides at which norm its gradients are clipped."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation over the batch, keeping their mean."""
    whiten_advantages: bool = True
    """Whiten advantages over the valid tokens of the whole batch."""


AlgorithmName = Literal["sft", "reward_model", "ppo"]
ALGORITHM_SECTIONS: dict[str, type[OfflineConfig | OnlineConfig]] = {
    "sft": SFTConfig,
    "reward_model": RewardModelConfig,
    "ppo": PPOConfig,
}
AlgorithmConfig = OfflineConfig | OnlineConfig
