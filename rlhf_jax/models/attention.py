"""Attention: over whole rows, and over a cache for one new token."""

from __future__ import annotations

from functools import partial

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
    column: Array,
    counts: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Array:
    """Returns the attention of one new token per row to its prompt and to its completion so far.

    One softmax, in float32, over the scores of both regions. The completions' region is a ring: the new token
    is in `column`, the one before it in the column before, and column C - 1 comes before column 0.

    Args:
        q: [B, H, h].
        prompt_k: [N, K, P, h]; the B rows are N groups, one behind the other, whose G rows share a prompt.
        prompt_v: [N, K, P, h].
        k: [B, K, C, h].
        v: [B, K, C, h].
        prompt_lengths: i32[N], real columns of the prompt's region.
        column: i32[], where the new token is.
        counts: i32[B], tokens of the row's own in its ring, the new one included; at most C.
        scale: as in causal_attention, like window and softcap.
        window: see there.
        softcap: see there.
    Returns:
        [B, H, h].
    """
    num_rows, num_heads, head_dim = q.shape
    num_prompts, num_kv_heads, prompt_size, _ = prompt_k.shape
    num_columns, group_size = k.shape[2], num_rows // num_prompts
    q_BKgh = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    lengths_N11, counts_NG1 = prompt_lengths[:, None, None], counts.reshape(num_prompts, group_size, 1)

    prompt_columns = jnp.arange(prompt_size)
    ages = jnp.remainder(column - jnp.arange(num_columns), num_columns)
    prompt_seen, seen = prompt_columns < lengths_N11, ages < counts[:, None]
    if window:
        prompt_seen &= lengths_N11 + counts_NG1 - 1 - prompt_columns < window
        seen &= ages < window

    def together(x_BKgz: Array) -> Array:
        """Returns [N, K, G * g, z], all that reads a prompt's keys and values of one head."""
        x_NGKgz = x_BKgz.reshape(num_prompts, group_size, *x_BKgz.shape[1:])
        return x_NGKgz.swapaxes(1, 2).reshape(num_prompts, num_kv_heads, -1, x_BKgz.shape[-1])

    def apart(x_NKmz: Array) -> Array:
        """Returns what `together` takes."""
        x_NKGgz = x_NKmz.reshape(num_prompts, num_kv_heads, group_size, -1, x_NKmz.shape[-1])
        return x_NKGgz.swapaxes(1, 2).reshape(*q_BKgh.shape[:3], -1)

    def scores(products: Array, is_seen: Array) -> Array:
        return jnp.where(is_seen, soft_capped(products * scale, softcap), -jnp.inf)

    # In products keys and values are on the right: else the result's heads lie in another order, and XLA
    # would reorder not them but the weights that they meet next, at every step.
    transposed = partial(jnp.swapaxes, axis1=-1, axis2=-2)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    of_prompt = apart(product(together(q_BKgh), transposed(prompt_k)))
    seen_NG11P = jnp.broadcast_to(prompt_seen, (num_prompts, group_size, prompt_size))
    of_prompt = scores(of_prompt, seen_NG11P.reshape(num_rows, 1, 1, prompt_size))
    of_ring = scores(product(q_BKgh, transposed(k)), seen[:, None, None])
    weights = jax.nn.softmax(jnp.concatenate([of_prompt, of_ring], axis=-1), axis=-1).astype(v.dtype)
    weights_prompt, weights_ring = jnp.split(weights, [prompt_size], axis=-1)
    out = apart(jnp.matmul(together(weights_prompt), prompt_v)) + jnp.matmul(weights_ring, v)
    return out.reshape(q.shape)


def soft_capped(x: Array, cap: float) -> Array:
    """Returns cap * tanh(x / cap); x itself where the cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x
