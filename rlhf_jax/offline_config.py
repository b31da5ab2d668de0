"""The sections of algorithms that learn from given records.

A section that differs from another in its defaults alone is a subclass of it; the texts of its options are
that one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf_jax.config_types import Count, Kind, NonNegativeFloat, PositiveFloat, PositiveInt, Smoothing

Scale = Literal["group", "batch", "none"]
PairLoss = Literal["sigmoid", "robust", "ipo", "hinge"]


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """Learning from given records: a step is an update on a batch of them."""

    records: ClassVar[Kind]
    forward_mode: ClassVar[bool] = False
    """Whether models are differentiated in forward mode, which no attention kernel can be."""
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

    @property
    def update_rows(self) -> str:
        """Returns what rows_per_update is, in words."""
        return "batch_size"


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning."""

    records: ClassVar[Kind] = "prompt_completion"
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that carry loss: the completion's, or the prompt's too."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(OfflineConfig):
    """Reward model: scores that agree with people's comparisons, rankings or ratings of completions."""

    loss: Literal["bradley_terry", "hinge", "info_nce", "plackett_luce", "regression"] = "bradley_terry"
    """What is minimised: of pairs -log sigmoid of the gap between their scores (bradley_terry), or what it
    lacks to the margin (hinge); of rankings -log of the best completion's share among itself and what is
    worse (info_nce), or of each one's among itself, its equals and what is worse (plackett_luce); of ratings
    the squared error (regression). Completions that the column pairs does not compare are no equals."""
    all_pairs: bool = False
    """Of bradley_terry and hinge: the pairs of a ranking stay in one batch, each with the weight 1 / their
    number, and every completion goes through the model once. Otherwise they are records of their own."""
    margin: NonNegativeFloat = 0.0
    """Of bradley_terry and hinge: by how much the better completion's score is to be ahead."""
    margin_from_data: bool = False
    """The column margin of a pair, or the difference of scores in a ranking, is added to the margin."""
    label_smoothing: Smoothing = 0.0
    """Of bradley_terry: the chance that a judgement is the wrong way round."""
    center_coef: NonNegativeFloat = 0.0
    """Weight of (r_i + r_j)^2, the mean over the pairs of a record's completions, which draws the mean score
    to 0; 0.01 in the paper. Of all losses but regression."""
    num_heads: PositiveInt = 1
    """Heads on the trunk, an ensemble: each learns by itself from its own first weights, and has its own
    normaliser. rewards.ensemble says which score a policy is given; elsewhere it is their mean."""
    fresh_trunk: bool = False
    """The trunk starts at random; only its architecture is that of the model that the stage starts from."""
    normalizer: Literal["none", "mean", "mean_std"] = "mean"
    """What is made 0 (and 1) on demonstrations: nothing, the mean score, the mean and the deviation."""
    normalize_on: Literal["demonstrations", "chosen"] = "demonstrations"
    """Texts on which the normaliser is measured: the training records of the SFT stage that this one starts
    from, or the chosen completions of its own, of rankings the best ones."""

    @property
    def records(self) -> Kind:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns what the loss is of: pairs, with their margins or without, rankings or ratings."""
        match self.loss:
            case "regression":
                return "rating"
            case "info_nce":
                return "ranking_with_best"
            case "plackett_luce":
                return "ranking_with_ties"
        if self.all_pairs:
            return "ranking_with_margin" if self.margin_from_data else "ranking"
        return "preference_with_margin" if self.margin_from_data else "preference"


@dataclass(frozen=True, kw_only=True)
class LogRatioConfig:
    """Log ratios to a frozen reference, the policy at the start, as implicit rewards."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; it multiplies the log ratios to it."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(LogRatioConfig, OfflineConfig):
    """Learning from given records against a frozen reference: the policy at the start."""

    precompute_ref: bool = False
    """The reference's log-probabilities are computed once, before the first step, and kept beside the
    checkpoints; no reference model is in memory while the policy is trained."""


@dataclass(frozen=True, kw_only=True)
class PairLossConfig(LogRatioConfig):
    """The loss of a pair, of the log ratios to the reference of its completions."""

    loss: PairLoss = "sigmoid"
    """Loss of a pair's margin, the log ratio to the reference of its chosen completion less that of the
    rejected one: logistic (DPO); logistic and unbiased where a share label_smoothing of the pairs is in the
    wrong order (robust DPO); squared distance to 1 / (2 beta) (IPO); hinge (SLiC)."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs that are taken to be in the wrong order (losses sigmoid, which then is cDPO's, and
    robust)."""
    length_normalized: bool = False
    """Log ratios are divided by the tokens of their completion."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PairLossConfig, ReferenceConfig):
    """Direct preference optimisation on pairs."""

    records: ClassVar[Kind] = "preference"


@dataclass(frozen=True, kw_only=True)
class CDPOConfig(DPOConfig):
    """DPO with label smoothing."""

    label_smoothing: Smoothing = 0.1


@dataclass(frozen=True, kw_only=True)
class RobustDPOConfig(CDPOConfig):
    """DPO whose loss is unbiased where some labels are flipped."""

    loss: PairLoss = "robust"


@dataclass(frozen=True, kw_only=True)
class IPOConfig(DPOConfig):
    """Identity preference optimisation, log ratios averaged over tokens as in the authors' code.

    The paper's are sums: length_normalized false, with a smaller beta, as 1 / (2 beta) is the gap that is
    aimed at: an averaged one of 5 nats is out of reach.
    """

    beta: PositiveFloat = 1.0
    loss: PairLoss = "ipo"
    length_normalized: bool = True


@dataclass(frozen=True, kw_only=True)
class SLiCConfig(DPOConfig):
    """SLiC's hinge loss on log ratios to the reference."""

    loss: PairLoss = "hinge"


@dataclass(frozen=True, kw_only=True)
class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation on completions that are desirable or not."""

    records: ClassVar[Kind] = "unpaired"
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of the loss of desirable completions, lambda_D."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of the loss of undesirable completions, lambda_U. Where one kind is rare, weights make up for
    it: the product of weight and number of desirable ones 1 to 4/3 times that of the others."""


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(OfflineConfig):
    """Simple preference optimisation on pairs: the mean log-probability of a token is the reward."""

    records: ClassVar[Kind] = "preference"
    beta: PositiveFloat = 2.0
    """Scale of the rewards."""
    gamma: NonNegativeFloat = 0.5
    """Margin by which the chosen completion's reward has to be ahead."""
    length_normalized: bool = True
    """Log-probabilities are divided by the tokens of their completion."""
    label_smoothing: Smoothing = 0.0
    """Share of the pairs that are taken to be in the wrong order."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the chosen completions' negative log-likelihood, nats per token."""


@dataclass(frozen=True, kw_only=True)
class CPOConfig(SimPOConfig):
    """Contrastive preference optimisation on pairs: DPO's loss without its reference, and that of SFT."""

    beta: PositiveFloat = 0.1
    gamma: NonNegativeFloat = 0.0
    length_normalized: bool = False
    nll_coef: NonNegativeFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(OfflineConfig):
    """Odds ratio preference optimisation on pairs: SFT on the chosen completions, away from the rejected."""

    records: ClassVar[Kind] = "preference"
    odds_ratio_coef: NonNegativeFloat = 0.1
    """Weight of the odds ratio's loss, lambda."""
