"""Direct preference optimisation, and what differs from it in the loss of a pair alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algos.algorithm import Algorithm, Term, Terms
from rlhf_jax.algos.preference import PAIR_MEASURES, completions, held_out, pair_metrics
from rlhf_jax.batch import Metrics, Params, Rows
from rlhf_jax.models.forward import Forward
from rlhf_jax.offline_config import DPOConfig, PairLossConfig
from rlhf_jax.ops.masking import masked
from rlhf_jax.ops.ranking import bradley_terry, hinge
from rlhf_jax.ops.sequences import as_pairs


def pair_losses(margins: Array, settings: PairLossConfig) -> Array:
    """Returns the loss of each pair, f32[N], to minimise.

    With h the margin, L(h) = -log sigmoid(beta h) and e the label smoothing:

        sigmoid   (1 - e) L(h) + e L(-h)                    DPO; with e > 0 cDPO
        robust    ((1 - e) L(h) - e L(-h)) / (1 - 2 e)      unbiased where a share e of the labels is flipped
        ipo       (h - 1 / (2 beta))^2
        hinge     max(0, 1 - beta h)

    Args:
        margins: f32[N], h = log pi(y_c) / ref(y_c) - log pi(y_r) / ref(y_r), nats, of the chosen completion
            against the rejected one; the only input with a gradient.
        settings: reads loss, beta, label_smoothing.
    Source: DPO arXiv:2305.18290 eq. 7; cDPO its label smoothing, E. Mitchell 2023; robust arXiv:2403.00409
        eq. 11; IPO arXiv:2310.12036 eq. 17, beta being their tau; hinge, SLiC's on log ratios,
        arXiv:2309.06657 section 3.2.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    match settings.loss:
        case "sigmoid":
            return bradley_terry(beta * margins, label_smoothing=smoothing)
        case "robust":
            right, wrong = -jax.nn.log_sigmoid(beta * margins), -jax.nn.log_sigmoid(-beta * margins)
            return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        case "ipo":
            return jnp.square(margins - 1 / (2 * beta))
        case "hinge":
            return hinge(beta * margins, 1.0)


def loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: PairLossConfig
) -> tuple[Terms, Metrics]:
    """Returns the loss of sequences that alternate chosen, rejected, and its metrics; both in one forward.

    The implicit reward of a completion is beta times its log ratio, which length_normalized divides by its
    tokens.
    """
    of = completions(forward, params, frozen, batch)
    log_ratios = of.log_ratios / of.lengths if settings.length_normalized else of.log_ratios
    chosen, rejected = as_pairs(log_ratios)
    mask = batch.sequence_mask[::2]
    losses = pair_losses(chosen - rejected, settings)
    return {"preference": Term(masked(losses, mask))}, pair_metrics(of, settings.beta * log_ratios, mask)


def evaluate(forward: Forward, params: Params, frozen: Params, batch: Rows, settings: DPOConfig) -> Metrics:
    """Returns loss, rewards, margin, accuracy and log-probabilities of a held-out batch."""
    return held_out(*loss(forward, params, frozen, batch, settings))


DPO = Algorithm(
    trains=("policy",),
    reads=lambda settings: () if settings.precompute_ref else ("reference",),
    loss=loss,
    evaluate=evaluate,
    figures=("loss/preference", "reward/accuracy", "reward/margin"),
    reports=PAIR_MEASURES,
    rows_per_record=2,
)
