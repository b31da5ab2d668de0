"""Rotary positions and attention: over whole rows, and over a cache for one new token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

Rotation = tuple[Array, Array]  # cosines and sines, f32[..., T, h/2]


def rotation(positions: Array, head_dim: int, theta: float) -> Rotation:
    """Returns cos and sin of position * theta^(-2i/h) for i < h/2, each f32[..., T, h/2].

    Args:
        positions: i32[..., T].
        head_dim: h.
        theta: base of the frequencies.
    Source: arXiv:2104.09864.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, by: Rotation) -> Array:
    """Returns x with the pairs (i, i + h/2) of each head turned, in x's type.

    The pairing is Hugging Face's; the paper and the original Llama pair (2i, 2i + 1).

    Args:
        x: [B, T, heads, h].
        by: cosines and sines for [T] or [B, T] positions.
    """
    cos, sin = (part[..., None, :] for part in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def causal_attention(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """Returns softmax(q k^T / sqrt(h)) v over the columns up to each token's own; the softmax is in float32.

    Rows are right-padded, so causality alone keeps real tokens from seeing padding.

    Args:
        q: [B, T, H, h].
        k: [B, T, K, h], K divides H.
        v: [B, T, K, h].
        segments: i32[B, T]; a token sees only those of its own segment. None: a row is one segment.
    Returns:
        [B, T, H, h].
    """
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def cached_attention(
    q: Array, prompt_k: Array, prompt_v: Array, k: Array, v: Array, prompt_lengths: Array, step: Array
) -> Array:
    """Returns the attention of one new token per row to its prompt and to its completion so far.

    One softmax, in float32, over the scores of both regions; the new token is the completion's last.

    Args:
        q: [B, H, h].
        prompt_k: [B, K, P, h].
        prompt_v: [B, K, P, h].
        k: [B, K, C, h].
        v: [B, K, C, h].
        prompt_lengths: i32[B], real columns of the prompt's region.
        step: i32[]; columns 0 .. step of the completion's region are real.
    Returns:
        [B, H, h].
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, prompt_size, completion_size = k.shape[1], prompt_k.shape[2], k.shape[2]
    q_BKGh = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)

    def scores(keys: Array, is_real: Array) -> Array:
        products = jnp.einsum("bkgh,bksh->bkgs", q_BKGh, keys, preferred_element_type=jnp.float32)
        return jnp.where(is_real, products * head_dim**-0.5, -jnp.inf)

    prompt_scores = scores(prompt_k, (jnp.arange(prompt_size) < prompt_lengths[:, None])[:, None, None, :])
    completion_scores = scores(k, jnp.arange(completion_size) <= step)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, completion_scores], axis=-1), axis=-1).astype(
        v.dtype
    )
    weights_prompt, weights_completion = jnp.split(weights, [prompt_size], axis=-1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights_prompt, prompt_v)
    out += jnp.einsum("bkgs,bksh->bkgh", weights_completion, v)
    return out.reshape(q.shape)
