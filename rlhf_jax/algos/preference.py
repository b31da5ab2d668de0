"""What the preference algorithms share: log-probabilities of whole completions, and the metrics of pairs."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.algos.algorithm import Measure, Terms
from rlhf_jax.batch import Metrics, Params, Rows
from rlhf_jax.models.forward import Forward
from rlhf_jax.ops.masking import masked, share_above
from rlhf_jax.ops.sequences import as_pairs, completion_lengths, completion_sums

PAIR_MEASURES = (
    Measure("eval_loss", "eval/loss"),
    Measure("eval_accuracy", "eval/accuracy"),
    Measure("eval_margin", "eval/margin", is_compared=False),
)
"""What the summary says of a stage that learns from pairs."""


class Completions(NamedTuple):
    """Completions of rows, one of each sequence."""

    logprobs: Array  # f32[N], nats, summed over the completion, by the policy
    log_ratios: Array  # f32[N], nats: less those of the reference; the same as logprobs where there is none
    lengths: Array  # f32[N], tokens, at least 1


def completions(
    forward: Forward, params: Params, frozen: Params, rows: Rows, *, with_reference: bool = True
) -> Completions:
    """Returns what policy and reference say of the completions of rows.

    The reference's log-probabilities are those in the rows, where they were computed beforehand.

    Args:
        forward, params, frozen: forward passes, and parameters by role.
        rows: their sequences have N completions, those of filling sequences among them.
        with_reference: the algorithm has a reference.
    """
    assert forward.role_logprobs is not None
    lengths = jnp.maximum(completion_lengths(rows), 1.0)
    if with_reference and rows.ref_logprobs is None:
        both = forward.role_logprobs(("policy", "reference"), params, frozen, rows)
        logprobs, ref_logprobs = (completion_sums(of, rows) for of in both)
        return Completions(logprobs, logprobs - lax.stop_gradient(ref_logprobs), lengths)
    (per_token,) = forward.role_logprobs(("policy",), params, frozen, rows)
    logprobs = completion_sums(per_token, rows)
    if not with_reference or rows.ref_logprobs is None:
        return Completions(logprobs, logprobs, lengths)
    return Completions(logprobs, logprobs - rows.ref_logprobs.reshape(-1), lengths)


def pair_metrics(of: Completions, rewards: Array, mask: Array) -> Metrics:
    """Returns metrics of pairs: implicit rewards, their margin, how often it is right, and log-probabilities.

    Args:
        of: sequences that alternate chosen, rejected.
        rewards: f32[2N], the implicit reward of each.
        mask: bool[N], the pairs that are data.
    """
    rewards, logprobs = lax.stop_gradient((rewards, of.logprobs))
    chosen, rejected = as_pairs(rewards)
    chosen_logprobs, rejected_logprobs = as_pairs(logprobs)
    return {
        "reward/chosen": masked(chosen, mask),
        "reward/rejected": masked(rejected, mask),
        "reward/margin": masked(chosen - rejected, mask),
        "reward/accuracy": share_above(chosen - rejected, mask),
        "policy/logprobs_chosen": masked(chosen_logprobs, mask),
        "policy/logprobs_rejected": masked(rejected_logprobs, mask),
    }


def held_out(terms: Terms, metrics: Metrics) -> Metrics:
    """Returns what a loss gave of a held-out batch under an evaluation's names: eval/accuracy, eval/loss."""
    losses = {f"eval/{name}": term.mean for name, term in terms.items()}
    losses["eval/loss"] = losses.pop("eval/preference")
    return losses | {f"eval/{name.rpartition('/')[2]}": metric for name, metric in metrics.items()}
