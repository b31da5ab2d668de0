"""Statistics over the entries that a mask names.

Masked-out entries are replaced, never multiplied away: NaN times 0 is NaN. All statistics are float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Mean

WHITEN_EPS = 1e-8


def keep(x: Array, mask: Array) -> Array:
    """Returns x where the mask is true and 0 elsewhere; the gradient stops at masked-out entries too."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def masked(x: Array, mask: Array) -> Mean:
    """Returns the mean of x over the true entries of a mask, as a pair that is not yet divided.

    Args:
        x: a number, or an array of any shape and type that broadcasts against the mask.
        mask: bool, of the shape that counts: the weight is its number of true entries.
    """
    x = jnp.broadcast_to(jnp.asarray(x, jnp.float32), mask.shape)
    return Mean(jnp.sum(keep(x, mask)), jnp.sum(mask, dtype=jnp.float32))


def share_above(x: Array, mask: Array) -> Mean:
    """Returns the share of x, of those that the mask names, that is above 0; 0 itself counts one half."""
    return masked(jnp.where(x == 0, 0.5, jnp.float32(x > 0)), mask)


def masked_mean(x: Array, mask: Array) -> Array:
    """Returns f32[], the mean of x over the true entries of a mask; 0 where there are none."""
    return masked(x, mask).value


def masked_var(x: Array, mask: Array) -> Array:
    """Returns f32[], the biased variance of x over the true entries of a mask; 0 where there are none."""
    return masked_mean(jnp.square(keep(x, mask) - masked_mean(x, mask)), mask)


def masked_max(x: Array, mask: Array) -> Array:
    """Returns f32[], the largest x among the true entries of a mask; 0 where there are none."""
    largest = jnp.max(jnp.where(mask, x.astype(jnp.float32), -jnp.inf))
    return jnp.where(jnp.any(mask), largest, 0.0)


def told_of_any(statistic: Array, mask: Array) -> Array:
    """Returns a statistic for a metric: NaN, that is nothing, where the mask has no true entry."""
    return jnp.where(jnp.any(mask), statistic, jnp.nan)


def whiten(x: Array, mask: Array, *, keep_mean: bool = False) -> Array:
    """Returns x at mean 0 (or at its own mean) and deviation 1 over all true entries; 0 elsewhere.

    y = (x - mean) rsqrt(var + 1e-8), plus mean when keep_mean; biased variance, over the whole array, so that
    under jit it is over all rows on all devices.

    Args:
        x: f32[B, T] of the whole batch; whitening a part of it gives another result.
        mask: bool[B, T].
        keep_mean: scale around the mean and leave the mean where it was, as rewards are whitened.
    Source: arXiv:2403.17031, reward and advantage whitening.
    """
    mean = masked_mean(x, mask)
    whitened = (keep(x, mask) - mean) / jnp.sqrt(masked_var(x, mask) + WHITEN_EPS)
    return keep(whitened + mean if keep_mean else whitened, mask)
