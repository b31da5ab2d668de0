"""Estimates of a KL divergence from samples, and the controller that holds it.

KL(p || q) is estimated on tokens sampled from p, from the logprobs that p and q give them. The mean over such
tokens is what estimates; a single term may be negative (k1) or far off. Take p = policy, q = reference for
the distance to the reference; p = old policy, q = new policy for approx_kl.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Mean
from rlhf_jax.ops.masking import keep, masked

MAX_LOG_RATIO = 20.0


def log_ratio(logprobs: Array, other_logprobs: Array, mask: Array) -> Array:
    """Returns logprobs - other_logprobs, f32[B, T], clamped to +-20, and 0 where the mask is false.

    Masked before anything exponentiates it: exp of garbage is infinite, and its gradient NaN even where the
    result is masked away afterwards. `exp(log_ratio(new, old, mask))` is PPO's ratio, safe at every column.
    """
    return jnp.clip(keep(logprobs - other_logprobs, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def k1(logprobs: Array, other_logprobs: Array) -> Array:
    """Returns log p - log q for samples of p: unbiased, of either sign. As part of a reward, use this one.

    Source: J. Schulman, Approximating KL divergence, 2020.
    """
    return logprobs - other_logprobs


def k2(logprobs: Array, other_logprobs: Array) -> Array:
    """Returns (log p - log q)^2 / 2 for samples of p: biased, never negative.

    As a loss, its on-policy gradient is that of KL(p || q).

    Source: J. Schulman, Approximating KL divergence, 2020.
    """
    return 0.5 * jnp.square(logprobs - other_logprobs)


def k3(logprobs: Array, other_logprobs: Array) -> Array:
    """Returns q/p - 1 - log(q/p) for samples of p: unbiased, never negative.

    As a loss, its on-policy gradient is that of KL(q || p). The log ratio is clamped to +-20 throughout, so
    that beyond it the term is constant and has no gradient.

    Source: J. Schulman, Approximating KL divergence, 2020.
    """
    inverse = jnp.clip(other_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(inverse) - inverse


def sequence_kl(logprobs: Array, ref_logprobs: Array, mask: Array) -> Mean:
    """Returns KL(policy || reference) in nats per sequence: k1 summed over tokens, mean over sequences.

    Args:
        logprobs: f32[B, T], nats, of tokens that the policy sampled, under the policy.
        ref_logprobs: f32[B, T], nats, of the same tokens, under the reference.
        mask: bool[B, T], completion tokens; a row without any is no sequence.
    """
    return masked(jnp.sum(keep(k1(logprobs, ref_logprobs), mask), axis=1), jnp.any(mask, axis=1))


def adapt_kl_coef(kl_coef: Array, kl: Array, *, num_episodes: Array, target: float, horizon: float) -> Array:
    """Returns the weight of the KL term for the next iteration, f32[].

    coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) num_episodes / horizon)

    Args:
        kl_coef: f32[], the weight that this iteration's rewards were made with.
        kl: f32[], nats per sequence, as sequence_kl measures it on this iteration's rollout.
        num_episodes: completions in that rollout.
        target: the KL to hold, nats per sequence.
        horizon: episodes over which the weight adapts; above 0.2 num_episodes, or it could turn negative.
    Source: arXiv:1909.08593 section 2.2, as in the authors' code: num_episodes / horizon stands for K_beta.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * num_episodes / horizon)


def adapt_old_kl_coef(coef: Array, kl: Array, *, target: float) -> Array:
    """Returns the weight of the KL from the old to the new policy for the next iteration, f32[].

    coef <- 2 coef where kl > 1.5 target,   coef / 2 where kl < target / 1.5

    Args:
        coef: f32[].
        kl: f32[], nats per token, of this iteration's last pass.
        target: the KL to hold, nats per token.
    Source: arXiv:1707.06347 section 4.
    """
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return coef * factor
