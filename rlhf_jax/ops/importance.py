"""Importance weights, for tokens that another policy has sampled than the one that learns from them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Metrics
from rlhf_jax.ops.kl import log_ratio
from rlhf_jax.ops.masking import masked


def importance_weights(
    logprobs: Array, sampler_logprobs: Array, mask: Array, cap: float
) -> tuple[Array, Metrics]:
    """Returns truncated importance weights, f32[B, T], 1 outside the mask, and metrics of them.

    w_t = min(exp(logprobs_t - sampler_logprobs_t), cap)

    Exactly 1 where both agree and the cap is at least 1. Truncation bounds the variance; the bias that it
    brings pulls the policy less towards tokens that the sampler had made rare.

    Args:
        logprobs: f32[B, T], nats, of the policy that is about to be updated.
        sampler_logprobs: f32[B, T], nats, of the policy that sampled.
        mask: bool[B, T], completion tokens.
        cap: the largest weight.
    Source: IMPALA's truncated weights, arXiv:1802.01561 section 4.1, of each token by itself.
    """
    ratio = jnp.exp(log_ratio(logprobs, sampler_logprobs, mask))
    weights = jnp.minimum(ratio, cap)
    return weights, {
        "policy/importance": masked(weights, mask),
        "policy/importance_clip_frac": masked(jnp.float32(ratio > cap), mask),
    }
