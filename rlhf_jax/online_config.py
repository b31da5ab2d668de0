"""The sections of algorithms that learn from samples of their own.

A section that differs from another in its defaults alone is a subclass of it; the texts of its options are
that one's.
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
    OpenFraction,
    PositiveFloat,
    PositiveInt,
)
from rlhf_jax.offline_config import PairLossConfig

KlTerm = Literal["reward", "k2", "k3"]
Ratio = Literal["token", "sequence_mean", "sequence"]
Aggregation = Literal["token", "sequence", "constant"]
Baseline = Literal["group", "others", "batch", "greedy", "none"]
Scale = Literal["group", "batch", "none"]
Credit = Literal["completion", "token"]


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Learning from completions that the policy samples: an iteration is a rollout and the update on it."""

    records: ClassVar[Kind] = "prompt_only"
    forward_mode: ClassVar[bool] = False
    learns_from_scores: ClassVar[bool] = True
    """Whether completions have to be judged; otherwise their scores are told, where something gives them."""
    num_iterations: PositiveInt = 100
    """Iterations of rollout and update."""
    batch_size: PositiveInt = 64
    """Prompts of one iteration, over all devices."""
    group_size: PositiveInt = 1
    """Completions of each prompt; they share one pass over the prompt."""
    num_epochs: PositiveInt = 4
    """Passes over a rollout."""
    num_minibatches: PositiveInt = 4
    """Optimiser steps of one pass; divides the completions that are learned: all batch_size * group_size, of
    raft batch_size * num_kept, of online_dpo the batch_size pairs."""
    microbatch_size: Count = 0
    """Rows of one forward and backward pass; 0: a whole minibatch. Divides its rows, the completions that are
    learned / num_minibatches / sequences_per_row; even where they are pairs and each has its own row."""
    sequences_per_row: PositiveInt = 1
    """Completions, with their prompts, that share a row in scoring and update and do not see each other: less
    padding, the same loss. Divides batch_size * group_size, and the completions of a minibatch; 1 or
    even where they are pairs. Attention is over rows so many times longer, which costs more where no kernel
    skips what is not seen, as cuDNN's does not."""
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
    def rows_per_rollout(self) -> int:
        """Returns the completions of one iteration."""
        return self.batch_size * self.group_size

    @property
    def rows_per_update(self) -> int:
        """Returns how many of them are learned."""
        return self.rows_per_rollout

    @property
    def update_rows(self) -> str:
        """Returns what rows_per_update is, in words."""
        return "batch_size" if self.group_size == 1 else "batch_size * group_size"


@dataclass(frozen=True, kw_only=True)
class ShapedRewardConfig(OnlineConfig):
    """What scores go through on their way to rewards, and the weight of the KL to the reference."""

    normalize_scores: bool = False
    """Scores have the mean of all so far taken off, this iteration's among them, and are divided by their
    deviation."""
    score_clip: NonNegativeFloat = 0.0
    """Scores are clipped to +- this, after their normalisation; 0: they are not."""
    overlong_from: Count = 0
    """Completions of more tokens lose score, in proportion up to overlong_penalty at overlong_buffer tokens
    more (DAPO's soft punishment, arXiv:2503.14476), after all else that becomes of scores; 0: none does."""
    overlong_buffer: PositiveInt = 16
    """See overlong_from."""
    overlong_penalty: PositiveFloat = 1.0
    """See overlong_from."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL to the reference, to start with."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Whether the weight follows the measured KL."""
    kl_target: PositiveFloat = 6.0
    """Adaptive controller: KL to the reference to hold, nats per sequence."""
    kl_horizon: PositiveInt = 10000
    """Adaptive controller: episodes over which the weight adapts; more than 0.2 of those of an iteration."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(ShapedRewardConfig):
    """Clipped ratios and a KL to the reference, with or without a value model."""

    kl_term: KlTerm = "reward"
    """Where that KL counts: in the reward of every token (its estimator is k1), or as a term of the loss,
    whose on-policy gradient is that of the reverse KL (k2) or of the forward KL (k3)."""
    surrogate: Literal["clip", "kl"] = "clip"
    """What keeps the policy near the one that sampled: the clip of the ratio; or a KL between the two as a
    term of the loss (arXiv:1707.06347 section 4), where there are several optimiser steps on a rollout."""
    old_kl_coef: PositiveFloat = 1.0
    """Of surrogate `kl`: the weight of that KL, to start with."""
    old_kl_target: NonNegativeFloat = 0.0
    """Of surrogate `kl`: KL from old to new policy to hold, nats per token: old_kl_coef is doubled after an
    iteration whose last pass, before each of its steps, has more than 1.5 of it, halved below it / 1.5;
    0: the weight is fixed."""
    clip_eps: PositiveFloat = 0.2
    """Clip of the policy ratio."""
    clip_eps_high: NonNegativeFloat = 0.0
    """Clip above 1, where another one than below (DAPO's clip-higher, arXiv:2503.14476); 0: clip_eps."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound of the loss of a token with a negative advantage, in advantages; more than 1 (arXiv:1912.09729);
    0: none."""
    ratio: Ratio = "token"
    """Whose probability the ratio is of: each token's; the geometric mean over the completion (GSPO,
    arXiv:2507.18071); the whole completion's, which then is one action: of ppo with one advantage, that of
    its first token, and with aggregation 'sequence'."""
    aggregation: Aggregation = "token"
    """What the loss is a mean over: all tokens alike; completions, each the mean of its tokens; completions,
    each the sum of its tokens over rollout.max_new_tokens (Dr. GRPO, arXiv:2503.20783)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the loss of sft on demonstrations, -log-probability per token, beside the policy's (the PTX
    mix of InstructGPT, arXiv:2203.02155): in an iteration as many records, or rows where that stage packs
    them, as completions are learned; each goes with one of them through all passes. With microbatch_size
    one pass holds sequences_per_row times as many of them. 0: none."""
    ptx_from: str = ""
    """The earlier sft stage whose training records these demonstrations are; nothing need start from it. Of a
    model that was fine-tuned elsewhere it is one of a single step."""
    early_stop_kl: NonNegativeFloat = 0.0
    """The passes over a rollout end at the first minibatch before whose step the KL from old to new policy,
    nats per token by k3, is above 1.5 of it: neither that step nor those behind it are made, the value
    model's no more than the policy's. That is the target_kl of Spinning Up and Stable-Baselines3, factor
    included. Schedules count the steps that are made; 0: all are."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """Proximal policy optimisation with a value model."""

    value_learning_rate: NonNegativeFloat = 0.0
    """Learning rate of the value model; 0: that of the optimizer section."""
    value_warmup: Count = 0
    """Iterations, at the beginning, in which the value model alone learns: the policy's learning rate is 0,
    and its schedule begins behind them."""
    gamma: Fraction = 1.0
    """Discount of a token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    value_clip_eps: PositiveFloat = 0.2
    """Clip of the value around its old estimate."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss. A value model with parameters of its own has clipping and Adam to itself: the
    weight then only decides at which norm its gradients are clipped."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation over the batch, keeping their mean."""
    whiten_advantages: bool = True
    """Whiten advantages over the valid tokens of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation: no value model, completions of one prompt are judged by each other.

    Source: arXiv:2402.03300.
    """

    batch_size: PositiveInt = 16
    group_size: PositiveInt = 8
    num_epochs: PositiveInt = 1
    num_minibatches: PositiveInt = 1
    kl_coef: NonNegativeFloat = 0.04
    """Weight of the KL to the reference, to start with; see tracks_kl where it is 0."""
    kl_term: KlTerm = "k3"
    aggregation: Aggregation = "sequence"
    baseline: Baseline = "group"
    """What is taken off the reward of a completion: the mean of its group; of the others of its group (RLOO);
    of the whole batch; the score of the prompt's greedy completion, which is sampled and judged as well
    (ReMax); nothing."""
    scale: Scale = "group"
    """What advantages are divided by: the deviation of the group's rewards; that of all tokens' advantages,
    whose mean is taken off as well; nothing."""
    credit: Credit = "completion"
    """Of which rewards a token has the sum: all of its completion's, or those from the token on (they differ
    where kl_term is 'reward')."""
    tracks_kl: bool = True
    """Where kl_coef is 0: whether the stage keeps a reference model all the same, so that policy/kl is told;
    without it needs less memory and time."""
    max_rollouts: PositiveInt = 1
    """Groups whose rewards are all equal are replaced by those of further prompts, until so many batches of
    prompts have been sampled (DAPO's dynamic sampling); 1: they stay, and teach nothing."""


@dataclass(frozen=True, kw_only=True)
class DrGRPOConfig(GRPOConfig):
    """GRPO without its biases to length and difficulty: no division by deviation or length.

    Source: arXiv:2503.20783.
    """

    kl_coef: NonNegativeFloat = 0.0
    aggregation: Aggregation = "constant"
    scale: Scale = "none"


@dataclass(frozen=True, kw_only=True)
class DAPOConfig(GRPOConfig):
    """GRPO with a wider clip above 1 and a mean over tokens; groups that teach nothing are replaced.

    Source: arXiv:2503.14476.
    """

    num_minibatches: PositiveInt = 4
    kl_coef: NonNegativeFloat = 0.0
    clip_eps_high: NonNegativeFloat = 0.28
    aggregation: Aggregation = "token"
    max_rollouts: PositiveInt = 4


@dataclass(frozen=True, kw_only=True)
class GSPOConfig(GRPOConfig):
    """GRPO with the ratio of completions, as geometric mean over tokens. Source: arXiv:2507.18071."""

    num_minibatches: PositiveInt = 4
    clip_eps: PositiveFloat = 3e-4
    clip_eps_high: NonNegativeFloat = 4e-4
    ratio: Ratio = "sequence_mean"


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(GRPOConfig):
    """REINFORCE with the mean of the group's others as baseline; a completion is one action.

    Source: arXiv:2402.14740.
    """

    group_size: PositiveInt = 4
    kl_coef: NonNegativeFloat = 0.05
    kl_term: KlTerm = "reward"
    ratio: Ratio = "sequence"
    baseline: Baseline = "others"
    scale: Scale = "none"


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(RLOOConfig):
    """REINFORCE with the mean of the batch as baseline; a completion is one action. Source: Williams 1992."""

    batch_size: PositiveInt = 64
    group_size: PositiveInt = 1
    baseline: Baseline = "batch"


@dataclass(frozen=True, kw_only=True)
class ReinforcePPConfig(GRPOConfig):
    """REINFORCE++: the rewards from each token on, with the KL among them, whitened over the whole batch.

    Source: arXiv:2501.03262.
    """

    batch_size: PositiveInt = 64
    group_size: PositiveInt = 1
    num_minibatches: PositiveInt = 4
    kl_coef: NonNegativeFloat = 0.01
    kl_term: KlTerm = "reward"
    aggregation: Aggregation = "token"
    baseline: Baseline = "none"
    scale: Scale = "batch"
    credit: Credit = "token"


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(ShapedRewardConfig):
    """Trust region policy optimisation with a value model: the optimizer section is the value model's alone.

    Source: arXiv:1502.05477; damping is what its author used with generalised advantages
    (github.com/joschu/modular_rl). Steps of its delta, 0.01, with this batch lead far
    away from the reference on the embedded task, where a tenth of it is enough.
    """

    forward_mode: ClassVar[bool] = True
    # What PPO's preparation of a batch may ask for has one form here.
    kl_term: ClassVar[KlTerm] = "reward"
    ratio: ClassVar[Ratio] = "token"
    surrogate: ClassVar[str] = "none"
    num_epochs: PositiveInt = 4
    """Passes of the value model over a rollout; the policy makes one step."""
    num_minibatches: PositiveInt = 4
    """Optimiser steps of the value model in one pass; divides the completions, batch_size * group_size."""
    microbatch_size: Count = 0
    """Rows of one pass of either model; 0: a whole minibatch. Divides its rows, batch_size * group_size
    / num_minibatches / sequences_per_row."""
    delta: PositiveFloat = 0.001
    """Largest KL(old || new) of a step of the policy, exact, in nats, the mean over completion tokens."""
    damping: NonNegativeFloat = 0.1
    """What is added to the Fisher matrix's diagonal: the step turns from the natural gradient to the plain
    one."""
    cg_iterations: PositiveInt = 10
    """The most products with the Fisher matrix of a step: each is a forward pass with its derivative along a
    direction, and a backward pass, over the whole batch."""
    cg_tolerance: NonNegativeFloat = 1e-5
    """Residual, relative to the gradient, at which conjugate gradients stop."""
    line_search_steps: PositiveInt = 10
    """Steps that are tried, the longest first."""
    line_search_factor: OpenFraction = 0.8
    """Length of a step that is tried, relative to the one before."""
    gamma: Fraction = 1.0
    """Discount of a token."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    value_clip_eps: PositiveFloat = 0.2
    """Clip of the value around its old estimate."""
    whiten_rewards: bool = False
    """Divide rewards by their deviation over the batch, keeping their mean."""
    whiten_advantages: bool = True
    """Whiten advantages over the valid tokens of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(PairLossConfig, OnlineConfig):
    """DPO on pairs that the policy samples: of each group the best completion against the worst.

    Source: arXiv:2402.04792.
    """

    batch_size: PositiveInt = 32
    group_size: PositiveInt = 2
    num_epochs: PositiveInt = 1
    num_minibatches: PositiveInt = 1

    @property
    def rows_per_update(self) -> int:
        """Returns the rows of a pair of each prompt."""
        return 2 * self.batch_size

    @property
    def update_rows(self) -> str:
        """Returns what rows_per_update is, in words."""
        return "2 * batch_size"


@dataclass(frozen=True, kw_only=True)
class RAFTConfig(OnlineConfig):
    """Rejection-sampling fine-tuning, or expert iteration: SFT on the best of what the policy samples, of the
    log-probabilities at rollout.temperature.

    Source: arXiv:2304.06767; arXiv:2307.09288 section 3.2.3; with a threshold, ReST, arXiv:2308.08998.
    """

    batch_size: PositiveInt = 32
    group_size: PositiveInt = 8
    num_epochs: PositiveInt = 1
    num_minibatches: PositiveInt = 1
    num_kept: PositiveInt = 1
    """Completions of a group that are learned: those of the highest scores, of equal ones the first."""
    keep: Literal["best", "above"] = "best"
    """Whether these are learned whatever their scores, or those alone whose score is above threshold, as with
    a verifier, whose 0 is a wrong answer."""
    threshold: FiniteFloat = 0.0
    """See keep."""
    tracks_kl: bool = True
    """Whether the stage keeps a reference model, so that policy/kl is told; without it needs less memory and
    time."""

    @property
    def rows_per_update(self) -> int:
        """Returns the most completions that are learned."""
        return self.batch_size * self.num_kept

    @property
    def update_rows(self) -> str:
        """Returns what rows_per_update is, in words."""
        return "batch_size" if self.num_kept == 1 else "batch_size * num_kept"


@dataclass(frozen=True, kw_only=True)
class DistillConfig(OnlineConfig):
    """On-policy distillation: on what the policy samples, its distribution of each next token is made like
    that of a frozen teacher, the stage's teacher_from; both at rollout.temperature.

    Source: arXiv:2306.13649.
    """

    learns_from_scores: ClassVar[bool] = False
    batch_size: PositiveInt = 32
    num_epochs: PositiveInt = 1
    num_minibatches: PositiveInt = 1
    beta: Fraction = 0.5
    """Which divergence is minimised: beta KL(teacher || m) + (1 - beta) KL(policy || m), m = beta teacher +
    (1 - beta) policy, the generalised Jensen-Shannon one; at 0, where that vanishes, the forward
    KL(teacher || policy), at 1 the reverse KL(policy || teacher). Near 0 and 1 it is about beta or 1 - beta
    times these: a higher learning rate makes up for it."""


@dataclass(frozen=True, kw_only=True)
class ReMaxConfig(GRPOConfig):
    """REINFORCE with the score of the prompt's greedy completion as baseline; the KL of the tokens from each
    one on is in its reward.

    Source: arXiv:2310.10505.
    """

    batch_size: PositiveInt = 64
    group_size: PositiveInt = 1
    kl_coef: NonNegativeFloat = 0.05
    kl_term: KlTerm = "reward"
    aggregation: Aggregation = "token"
    baseline: Baseline = "greedy"
    scale: Scale = "none"
    credit: Credit = "token"
