"""Preference optimisation without a reference model: SimPO, CPO and ORPO."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algos.algorithm import Algorithm, Term, Terms
from rlhf_jax.algos.preference import PAIR_MEASURES, Completions, completions, held_out, pair_metrics
from rlhf_jax.batch import Mean, Metrics, Params, Rows
from rlhf_jax.models.forward import Forward
from rlhf_jax.offline_config import ORPOConfig, SimPOConfig
from rlhf_jax.ops.masking import keep, masked
from rlhf_jax.ops.ranking import bradley_terry
from rlhf_jax.ops.sequences import as_pairs

LARGEST_MEAN_LOGPROB = -1e-6
"""Of a completion, nats per token: the odds of a more certain one are those of this."""


def pair_losses(margins: Array, settings: SimPOConfig) -> Array:
    """Returns the loss of each pair, f32[N], to minimise.

        (1 - e) L(m) + e L(-m),   L(m) = -log sigmoid(m),   m = beta (lp_c - lp_r) - gamma

    Args:
        margins: f32[N], lp_c - lp_r: log-probabilities of the chosen completion less those of the rejected
            one, nats, of SimPO per token; the only input with a gradient.
        settings: reads beta, gamma and label_smoothing (e).
    Source: SimPO arXiv:2405.14734 eq. 6, per token; CPO arXiv:2401.08417 eq. 3, summed, with gamma 0.
    """
    shifted = settings.beta * margins - settings.gamma
    return bradley_terry(shifted, label_smoothing=settings.label_smoothing)


def log_odds_ratios(chosen: Array, rejected: Array) -> Array:
    """Returns log (odds_c / odds_r) of each pair, f32[N]; odds = p / (1 - p), log p the mean of a token's.

    Args:
        chosen, rejected: f32[N], log-probabilities per token, nats; above LARGEST_MEAN_LOGPROB they count as
            that and have no gradient, for 1 - p would be lost in rounding.
    Source: arXiv:2403.07691 eq. 4 and 6.
    """

    def log_odds(logprobs: Array) -> Array:
        logprobs = jnp.minimum(logprobs, LARGEST_MEAN_LOGPROB)
        return logprobs - jnp.log(-jnp.expm1(logprobs))

    return log_odds(chosen) - log_odds(rejected)


def chosen_nll(of: Completions, mask: Array) -> Mean:
    """Returns the mean negative log-likelihood of the tokens of chosen completions, nats per token, as sft's.

    Args:
        of: sequences that alternate chosen, rejected.
        mask: bool[N], the pairs that are data.
    """
    (logprobs, _), (lengths, _) = as_pairs(of.logprobs), as_pairs(of.lengths)
    return Mean(-jnp.sum(keep(logprobs, mask)), jnp.sum(keep(lengths, mask)))


def margin_loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: SimPOConfig
) -> tuple[Terms, Metrics]:
    """Returns the terms of SimPO or CPO for sequences that alternate chosen, rejected, and metrics."""
    of = completions(forward, params, frozen, batch, with_reference=False)
    logprobs = of.logprobs / of.lengths if settings.length_normalized else of.logprobs
    chosen, rejected = as_pairs(logprobs)
    mask = batch.sequence_mask[::2]
    terms = {"preference": Term(masked(pair_losses(chosen - rejected, settings), mask))}
    if settings.nll_coef:
        terms["nll"] = Term(chosen_nll(of, mask), settings.nll_coef)
    return terms, pair_metrics(of, settings.beta * logprobs, mask)


def orpo_loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: ORPOConfig
) -> tuple[Terms, Metrics]:
    """Returns the terms of ORPO for sequences that alternate chosen, rejected, and metrics.

    NLL of the chosen completions + odds_ratio_coef mean of -log sigmoid(log (odds_c / odds_r))

    Source: arXiv:2403.07691 eq. 6. The authors' code, and TRL, learn the prompts too.
    """
    of = completions(forward, params, frozen, batch, with_reference=False)
    chosen, rejected = as_pairs(of.logprobs / of.lengths)
    mask = batch.sequence_mask[::2]
    log_odds = log_odds_ratios(keep(chosen, mask), keep(rejected, mask))
    terms = {
        "nll": Term(chosen_nll(of, mask)),
        "preference": Term(masked(-jax.nn.log_sigmoid(log_odds), mask), settings.odds_ratio_coef),
    }
    metrics = pair_metrics(of, settings.odds_ratio_coef * of.logprobs / of.lengths, mask)
    return terms, metrics | {"policy/log_odds_ratio": masked(jax.lax.stop_gradient(log_odds), mask)}


def evaluate_margins(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: SimPOConfig
) -> Metrics:
    """Returns loss, rewards, margin, accuracy and log-probabilities of a held-out batch."""
    return held_out(*margin_loss(forward, params, frozen, batch, settings))


def evaluate_orpo(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: ORPOConfig
) -> Metrics:
    """Returns loss, NLL, rewards, margin, accuracy and log-probabilities of a held-out batch."""
    return held_out(*orpo_loss(forward, params, frozen, batch, settings))


SIMPO = Algorithm(
    trains=("policy",),
    loss=margin_loss,
    evaluate=evaluate_margins,
    figures=("loss/preference", "reward/accuracy", "reward/margin"),
    reports=PAIR_MEASURES,
    rows_per_record=2,
)
ORPO = SIMPO._replace(loss=orpo_loss, evaluate=evaluate_orpo)
