"""What the roles say of a rollout, in one pass: log-probabilities of policy and reference, values, scores.

And the metrics of that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Max, Metrics, Params, Rollout, Rows, Scored
from rlhf_jax.models.forward import Forward, Said
from rlhf_jax.ops.kl import log_ratio, sequence_kl
from rlhf_jax.ops.masking import masked, masked_mean, masked_var, told_of_any
from rlhf_jax.ops.packed_rows import Placement, RowLayout


def score_rollout(
    forward: Forward, params: Params, frozen: Params, rollout: Rollout, layout: RowLayout | None = None
) -> Scored:
    """Returns the rollout scored by every role that is there; scores are 0 where there is no reward model.

    `old_logprobs` are the training forward's own, so that the first ratio of an on-policy update is 1.

    Args:
        forward: forward passes by role.
        params, frozen: by role.
        rollout: of rows of one sequence each.
        layout: in what rows it is computed; None: in the rollout's own.
    """

    def in_rows(at: Placement) -> Said:
        assert forward.with_columns is not None
        short = forward.with_columns(at.rung.num_completion)
        return jax.tree.map(at.unpack, short.score_all(params, frozen, at.pack(rollout.rows)))

    if layout is None:
        said = forward.score_all(params, frozen, rollout.rows)
    else:
        said = layout.in_short_rows(rollout.rows, in_rows)
    scores = jnp.zeros(rollout.rows.lengths.shape) if said.scores is None else said.scores
    return Scored(rollout, said.logprobs, said.ref_logprobs, said.values, scores)


def score_alone(forward: Forward, params: Params, frozen: Params, rollout: Rollout) -> tuple[Scored, Metrics]:
    """Returns a rollout with the reward model's scores and nothing else, and how many tokens it has.

    Its `old_logprobs` are the sampler's.

    Args:
        forward: gives scores where frozen has `reward`; else they are 0.
        params, frozen: by role.
        rollout: of rows of one sequence each.
    """
    rows = rollout.rows
    scores = forward.scores(params, frozen, rows) if "reward" in frozen else jnp.zeros(rows.lengths.shape)
    return Scored(rollout, rollout.sampler_logprobs, None, None, scores), {
        "perf/tokens": jnp.sum(_lengths(rows))
    }


def rollout_metrics(scored: Scored, rows_counted: Array, *, is_own: bool = True) -> Metrics:
    """Returns what can be told before the host's judges have spoken: KL, lengths, EOS, the sampler's gap.

    Args:
        scored: a rollout that the models have scored.
        rows_counted: bool[B]; the others, fillings and rows that the missing-EOS rule leaves out, count only
            in the share of completions that ended.
        is_own: the scored policy itself has sampled. Else the KL is that of the one which did.
    """
    rollout, rows = scored.rollout, scored.rollout.rows
    mask = rows.completion_mask & rows_counted[:, None]
    lengths = _lengths(rows)
    logprobs = scored.old_logprobs if is_own else rollout.sampler_logprobs
    gap = jnp.abs(jnp.where(mask, rollout.sampler_logprobs - scored.old_logprobs, 0.0))
    metrics: Metrics = {}
    if scored.ref_logprobs is not None:
        metrics = {
            "policy/kl": sequence_kl(logprobs, scored.ref_logprobs, mask),
            "policy/kl_per_token": masked(logprobs - scored.ref_logprobs, mask),
            "policy/ref_nll": masked(-scored.ref_logprobs, mask),
        }
    return metrics | {
        "policy/nll": masked(-scored.old_logprobs, mask),
        "policy/sampler_gap": masked(gap, mask),
        "policy/sampler_gap_max": Max(jnp.max(gap)),
        "policy/sampler_ratio": masked(
            jnp.exp(log_ratio(scored.old_logprobs, rollout.sampler_logprobs, mask)), mask
        ),
        "rollout/length": masked(lengths, rows_counted),
        "rollout/eos_rate": masked(jnp.float32(rollout.ended), rows.sequence_mask),
        "perf/tokens": jnp.sum(lengths),
    }


def score_metrics(scored: Scored, rows_counted: Array) -> Metrics:
    """Returns mean and deviation of the scores, and their correlation with the length of the completion."""
    scores, lengths = scored.scores, _lengths(scored.rollout.rows)
    variance, length_variance = masked_var(scores, rows_counted), masked_var(lengths, rows_counted)
    centred = (scores - masked_mean(scores, rows_counted)) * (lengths - masked_mean(lengths, rows_counted))
    spread = jnp.sqrt(variance * length_variance)
    correlation = masked_mean(centred, rows_counted) / jnp.where(spread == 0, 1.0, spread)
    return {
        "reward/score": masked(scores, rows_counted),
        "reward/score_std": told_of_any(jnp.sqrt(variance), rows_counted),
        "reward/length_correlation": told_of_any(correlation, rows_counted),
    }


def _lengths(rows: Rows) -> Array:
    return jnp.where(rows.sequence_mask, rows.lengths - rows.prompt_lengths, 0).astype(jnp.float32)
