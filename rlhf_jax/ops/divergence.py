"""How far two distributions over the vocabulary are from each other: exact, not estimated from samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Comparison(NamedTuple):
    """What is said of a policy's and a teacher's distribution of the same token, each f32[...] in nats."""

    divergence: Array
    """The generalised Jensen-Shannon divergence."""
    kl: Array
    """KL(policy || teacher)."""
    entropy: Array
    """Of the policy."""
    teacher_entropy: Array


def compare_logits(logits: Array, teacher_logits: Array, beta: float) -> Comparison:
    """Returns a comparison of softmax(logits) with softmax(teacher_logits), which gets no gradient.

    Args:
        logits: f32[..., V], of the policy.
        teacher_logits: f32[..., V].
        beta: see `generalized_jsd`.
    """
    logprobs = jax.nn.log_softmax(logits)
    teacher_logprobs = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits))
    return Comparison(
        divergence=generalized_jsd(logprobs, teacher_logprobs, beta),
        kl=_kl(logprobs, teacher_logprobs),
        entropy=_entropy(logprobs),
        teacher_entropy=_entropy(teacher_logprobs),
    )


def generalized_jsd(logprobs: Array, teacher_logprobs: Array, beta: float) -> Array:
    """Returns the generalised Jensen-Shannon divergence of a teacher p and a policy q, f32[...] in nats.

    JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    At beta 0 and 1, where that vanishes, it is the KL to which JSD_beta / beta and JSD_beta / (1 - beta)
    tend: KL(p || q), the forward one, and KL(q || p), the reverse one.

    Args:
        logprobs: log q, f32[..., V], finite.
        teacher_logprobs: log p, f32[..., V], finite.
        beta: from 0 to 1, static.
    Source: arXiv:2306.13649 section 2 and eq. 1; the two ends are those of trl.experimental.gkd.
    """
    if beta == 0:
        return _kl(teacher_logprobs, logprobs)
    if beta == 1:
        return _kl(logprobs, teacher_logprobs)
    mixture = jnp.logaddexp(logprobs + math.log1p(-beta), teacher_logprobs + math.log(beta))
    return beta * _kl(teacher_logprobs, mixture) + (1 - beta) * _kl(logprobs, mixture)


def _kl(logprobs: Array, other_logprobs: Array) -> Array:
    """Returns KL(p || q) = sum_v p_v (log p_v - log q_v) of log p and log q."""
    return jnp.sum(jnp.exp(logprobs) * (logprobs - other_logprobs), axis=-1)


def _entropy(logprobs: Array) -> Array:
    """Returns -sum_v p_v log p_v."""
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
