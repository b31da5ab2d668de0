"""Rotary positions: frequencies, with every scaling that has a fixed meaning, and the turning itself."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from rlhf_jax.models.architecture import Architecture, Rope, RopeScaling

Rotation = tuple[Array, Array]  # cosines and sines, f32[..., T, r/2], of the first r dimensions of a head


def rotation(architecture: Architecture, positions: Array, rope: Rope = "global") -> Rotation:
    """Returns cos and sin of position * frequency for layers of a kind, each f32[..., T, r/2].

    Args:
        architecture: reads head_dim, rotary_fraction, and the bases and their scaling.
        positions: i32[..., T].
        rope: the kind, see LayerKind; none does not turn.
    """
    scaling = architecture.rope_scaling if rope == "global" else None
    theta = architecture.local_rope_theta if rope == "local" else architecture.rope_theta
    angles = positions[..., None].astype(jnp.float32) * frequencies(architecture.rotary_size, theta, scaling)
    if rope == "none":
        return jnp.ones_like(angles), jnp.zeros_like(angles)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def frequencies(size: int, theta: float, scaling: RopeScaling | None = None) -> Array:
    """Returns theta^(-2i/r) for i < r/2, scaled, f32[r/2].

    Args:
        size: r, the dimensions that turn.
        theta: base of the frequencies.
        scaling: how they are changed for long rows.
    Source: arXiv:2104.09864.
    """
    plain = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is None:
        return plain
    match scaling.kind:
        case "linear":
            return plain / scaling.factor
        case "llama3":
            return _llama3(plain, scaling)
        case "yarn":
            return _yarn(plain, theta, scaling)
        case "longrope":
            return plain / jnp.asarray(scaling.short_factors, jnp.float32)


def _llama3(plain: Array, scaling: RopeScaling) -> Array:
    """Returns low frequencies divided by the factor, high ones as they are, and between them a mixture.

    Reads factor, original_context, low_freq_factor and high_freq_factor.
    Source: Llama 3.1's model code (apply_scaling).
    """
    turns = plain * scaling.original_context / (2 * math.pi)  # in a row of pretraining
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return kept * plain + (1.0 - kept) * plain / scaling.factor


def _yarn(plain: Array, theta: float, scaling: RopeScaling) -> Array:
    """Returns frequencies below beta_slow turns divided by the factor, above beta_fast as they are.

    Between the two, what is kept falls linearly with the frequency's index. Reads factor, original_context,
    beta_fast, beta_slow and truncate.
    Source: arXiv:2309.00071 section 3.2, with the rounding of its code.
    """
    size = 2 * len(plain)

    def index_of(turns: float) -> float:
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    span = last - first if last != first else 0.001
    kept = 1.0 - jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - first) / span, 0.0, 1.0)
    return kept * plain + (1.0 - kept) * plain / scaling.factor


def rotate(x: Array, by: Rotation) -> Array:
    """Returns x with the pairs (i, i + r/2) of each head turned, and what is behind them as it was.

    The pairing is Hugging Face's; the paper and the original Llama pair (2i, 2i + 1).

    Args:
        x: [B, T, heads, h].
        by: cosines and sines for [T] or [B, T] positions.
    Returns:
        In x's type.
    """
    cos, sin = (part[..., None, :] for part in by)
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, x[..., size:]], axis=-1).astype(x.dtype)
