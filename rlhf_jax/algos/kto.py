"""Kahneman-Tversky optimisation: single completions, each of them desirable or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.algos.algorithm import Algorithm, Measure, Term, Terms
from rlhf_jax.algos.preference import completions, held_out
from rlhf_jax.batch import Mean, Metrics, Params, UnpairedRows
from rlhf_jax.models.forward import Forward
from rlhf_jax.offline_config import KTOConfig
from rlhf_jax.ops.masking import masked, share_above


def completion_losses(
    log_ratios: Array, is_desirable: Array, reference_point: Array, settings: KTOConfig
) -> Array:
    """Returns the loss of each completion, f32[N], to minimise.

        lambda_D (1 - sigmoid(beta (h - z0)))     of a desirable one
        lambda_U (1 - sigmoid(beta (z0 - h)))     of an undesirable one

    Args:
        log_ratios: f32[N], h = log pi(y) / ref(y), nats; the only input with a gradient.
        is_desirable: bool[N].
        reference_point: f32[], z0, nats.
        settings: reads beta, desirable_weight and undesirable_weight (lambda_D and lambda_U).
    Source: arXiv:2402.01306 eq. 8, less its constant.
    """
    sign = jnp.where(is_desirable, 1.0, -1.0)
    weight = jnp.where(is_desirable, settings.desirable_weight, settings.undesirable_weight)
    return weight * jax.nn.sigmoid(-settings.beta * sign * (log_ratios - reference_point))


def minibatch_stats(
    forward: Forward, params: Params, frozen: Params, batch: UnpairedRows, settings: KTOConfig
) -> dict[str, Mean]:
    """Returns the mean log ratio of the mismatched completions, from which the reference point is made.

    It stands for the KL to the reference. A record brings its mismatched completion, that of another prompt,
    so that this is a function of the minibatch's records alone. The authors, and TRL, take that of the
    neighbour within a device's batch.
    """
    rows = batch.mismatched
    log_ratios = completions(forward, params, frozen, rows).log_ratios
    return {"mismatched": masked(log_ratios, rows.sequence_mask)}


def loss(
    forward: Forward,
    params: Params,
    frozen: Params,
    batch: UnpairedRows,
    settings: KTOConfig,
    *,
    mismatched: Array,
) -> tuple[Terms, Metrics]:
    """Returns the loss and its metrics; the implicit reward of a completion is beta times its log ratio.

    reward/accuracy is the share of completions on the right side of the reference point, which counts half.

    Args:
        forward, params, frozen: forward passes, and parameters by role.
        batch: completions, and those that make the reference point, which are not read here.
        settings: of the algorithm.
        mismatched: f32[], `minibatch_stats` over the whole minibatch; z0 is it, but at least 0.
    Source: arXiv:2402.01306 section 4.1.
    """
    reference_point = lax.stop_gradient(jnp.maximum(mismatched, 0.0))
    of, rows = completions(forward, params, frozen, batch.rows), batch.rows
    is_desirable, mask = batch.is_desirable.reshape(-1), rows.sequence_mask
    losses = completion_losses(of.log_ratios, is_desirable, reference_point, settings)
    log_ratios, logprobs = lax.stop_gradient((of.log_ratios, of.logprobs))
    rewards, ahead = settings.beta * log_ratios, log_ratios - reference_point
    return {"preference": Term(masked(losses, mask))}, {
        "reward/desirable": masked(rewards, mask & is_desirable),
        "reward/undesirable": masked(rewards, mask & ~is_desirable),
        "reward/accuracy": share_above(jnp.where(is_desirable, ahead, -ahead), mask),
        "policy/logprobs_desirable": masked(logprobs, mask & is_desirable),
        "policy/logprobs_undesirable": masked(logprobs, mask & ~is_desirable),
        "policy/kl_estimate": masked(reference_point, mask),
    }


def evaluate(
    forward: Forward, params: Params, frozen: Params, batch: UnpairedRows, settings: KTOConfig
) -> Metrics:
    """Returns loss, rewards, accuracy and log-probabilities of a held-out batch, with its own z0."""
    stats = minibatch_stats(forward, params, frozen, batch, settings)
    of_batch = {name: mean.value for name, mean in stats.items()}
    return held_out(*loss(forward, params, frozen, batch, settings, **of_batch))


KTO = Algorithm(
    trains=("policy",),
    reads=lambda settings: () if settings.precompute_ref else ("reference",),
    loss=loss,
    minibatch_stats=minibatch_stats,
    evaluate=evaluate,
    figures=("loss/preference", "reward/accuracy", "policy/kl_estimate"),
    reports=(
        Measure("eval_loss", "eval/loss"),
        Measure("eval_accuracy", "eval/accuracy"),
        Measure("eval_desirable", "eval/desirable", is_compared=False),
        Measure("eval_undesirable", "eval/undesirable", is_compared=False),
    ),
)
