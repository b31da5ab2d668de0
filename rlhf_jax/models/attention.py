"""Attention: over whole rows, and over a cache for one new token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    *,
    scale: float,
    window: int | Array = 0,
    softcap: float = 0.0,
) -> Array:
    """Returns softmax(cap(scale q k^T)) v over the columns up to each token's own; the softmax is in float32.

    Rows are right-padded, so causality alone keeps real tokens from seeing padding.

    Args:
        q: [B, T, H, h].
        k: [B, T, K, h], K divides H.
        v: [B, T, K, h].
        segments: i32[B, T], not interleaved; a token sees only those of its own segment. None: a row is one
            segment.
        scale: of the products.
        window: how many tokens a token sees, itself included; 0: all before it. i32[] where layers differ.
        softcap: scores become cap * tanh(score / cap); 0: they stay.
    Returns:
        [B, T, H, h].
    """
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    if isinstance(window, Array):
        near = _is_near(q.shape[1], window)[None, None]
        mask = near if mask is None else mask & near
        window = 0
    if softcap:
        return _capped_attention(q, k, v, mask, scale, window, softcap)
    local = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, scale=scale, local_window_size=local
    )


def _is_near(length: int, window: int | Array) -> Array:
    """Returns bool[T, T]: whether a column is at most window - 1 behind; window 0 is as far as there are."""
    columns = jnp.arange(length)
    return (columns[:, None] - columns < window) | (window == 0)


def _capped_attention(
    q: Array, k: Array, v: Array, mask: Array | None, scale: float, window: int, softcap: float
) -> Array:
    """Returns causal_attention with a soft cap, which jax.nn.dot_product_attention does not have."""
    num_rows, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    q_BTKGh = q.reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = soft_capped(
        jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k, preferred_element_type=jnp.float32) * scale, softcap
    )
    seen = jnp.tril(jnp.ones((length, length), bool)) & _is_near(length, window)
    seen = seen[None, None] if mask is None else mask & seen
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def cached_attention(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    k: Array,
    v: Array,
    prompt_lengths: Array,
    step: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
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
        scale: as in causal_attention, like window and softcap.
        window: see there.
        softcap: see there.
    Returns:
        [B, H, h].
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, prompt_size, completion_size = k.shape[1], prompt_k.shape[2], k.shape[2]
    q_BKGh = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)

    def scores(keys: Array, is_seen: Array) -> Array:
        products = jnp.einsum("bkgh,bksh->bkgs", q_BKGh, keys, preferred_element_type=jnp.float32)
        return jnp.where(is_seen, soft_capped(products * scale, softcap), -jnp.inf)

    lengths_B1 = prompt_lengths[:, None]
    prompt_columns, columns = jnp.arange(prompt_size), jnp.arange(completion_size)
    prompt_seen, seen = prompt_columns < lengths_B1, columns <= step
    if window:
        prompt_seen &= lengths_B1 + step - prompt_columns < window
        seen &= step - columns < window
    both = [scores(prompt_k, prompt_seen[:, None, None, :]), scores(k, seen)]
    weights = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1).astype(v.dtype)
    weights_prompt, weights_completion = jnp.split(weights, [prompt_size], axis=-1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights_prompt, prompt_v)
    out += jnp.einsum("bkgs,bksh->bkgh", weights_completion, v)
    return out.reshape(q.shape)


def soft_capped(x: Array, cap: float) -> Array:
    """Returns cap * tanh(x / cap); x itself where the cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x
