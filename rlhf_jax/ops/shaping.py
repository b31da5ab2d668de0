"""From a completion's score to a reward for each of its tokens."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.kl import k1
from rlhf_jax.ops.masking import keep, masked_mean, masked_var

MissingEos = Literal["none", "subtract", "replace", "mask"]


def apply_missing_eos(scores: Array, ended: Array, rule: MissingEos, value: float) -> tuple[Array, Array]:
    """Returns the scores after the rule for completions without EOS, and the rows that stay in the batch.

    Args:
        scores: f32[B].
        ended: bool[B], the completion has its EOS.
        rule: `none` leaves everything as it is; `subtract` takes value from the score; `replace` puts value
            in its place; `mask` leaves the row out.
        value: of `subtract` and `replace`.

    Returns:
        scores f32[B], and bool[B]: false for the rows that leave loss, whitening and metrics.

    Raises:
        ValueError: for another rule.
    """
    everyone = jnp.ones_like(ended, dtype=bool)
    match rule:
        case "none":
            return scores, everyone
        case "subtract":
            return jnp.where(ended, scores, scores - value), everyone
        case "replace":
            return jnp.where(ended, scores, value), everyone
        case "mask":
            return scores, ended
        case _:
            raise ValueError(f"missing_eos is {rule!r}; it must be none, subtract, replace or mask")


def running_statistics(
    count: Array, mean: Array, var: Array, scores: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Returns number, mean and biased variance of all scores, f32[] each: of those so far and of some more.

    Args:
        count, mean, var: f32[], of the scores so far; 0 where there are none.
        scores: f32[B].
        mask: bool[B], the scores that count.
    Source: Chan, Golub and LeVeque 1983, eq. 2.1.
    """
    more, more_mean, more_var = (
        jnp.sum(mask, dtype=jnp.float32),
        masked_mean(scores, mask),
        masked_var(scores, mask),
    )
    total = count + more
    share = more / jnp.maximum(total, 1.0)
    gap = more_mean - mean
    return total, mean + share * gap, (1 - share) * var + share * more_var + share * (1 - share) * gap**2


def last_token(mask: Array) -> Array:
    """Returns bool[B, T]: the last true entry of each row of a mask, nothing in a row without any."""
    after = jnp.cumsum(mask[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    return mask & (after == 1)


def first_token(mask: Array) -> Array:
    """Returns bool[B, T]: the first true entry of each row of a mask, nothing in a row without any."""
    return last_token(mask[:, ::-1])[:, ::-1]


def token_rewards(
    scores: Array, old_logprobs: Array, ref_logprobs: Array, completion_mask: Array, kl_coef: Array
) -> Array:
    """Returns the reward of each token, f32[B, T]: the KL penalty on all, the score on the last.

    r_t = -kl_coef (old_logprobs_t - ref_logprobs_t) + [t is the completion's last token] score

    Args:
        scores: f32[B].
        old_logprobs: f32[B, T], nats, under the policy that made the rollout.
        ref_logprobs: f32[B, T], nats, under the reference.
        completion_mask: bool[B, T]; a row without any true entry gets no reward at all, whatever its score.
        kl_coef: f32[] or float.
    Source: arXiv:2009.01325 section 3.4, arXiv:2203.02155 eq. 2, spread over tokens as in their code.
    """
    penalty = -kl_coef * keep(k1(old_logprobs, ref_logprobs), completion_mask)
    return penalty + keep(scores[:, None], last_token(completion_mask))
