"""Attention over whole rows on a mesh, by XLA or by a kernel of the device.

Between attentions every device holds a part of the tokens of a row (mesh axis `sequence`). For attention it
holds all tokens and a part of the heads instead: queries, keys and values change places by an all-to-all, and
the result by another. Source: arXiv:2309.14509 (Ulysses).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from rlhf_jax.models.attention import causal_attention
from rlhf_jax.shard_map import on_shards
from rlhf_jax.sharding import compute_capability, constrain, device_platform, num_parts

Implementation = Literal["auto", "xla", "flash"]
FLASH_LENGTH = 2048
"""Rows from which on `auto` takes a kernel: XLA holds the scores of all pairs of tokens."""
_BLOCKS = (512, 256, 128)
_HOPPER = (9, 0)
_OF_TOKENS = ("batch", "length", "heads", "head_dim")
_KV_OF_TOKENS = ("batch", "length", "kv_heads", "head_dim")
_OF_HEADS = ("batch", "whole_length", "attention_heads", "head_dim")


def row_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    *,
    scale: float,
    windows: Sequence[int],
    which: Array | None = None,
    softcap: float = 0.0,
    implementation: Implementation = "auto",
) -> Array:
    """Returns causal_attention of rows whose tokens the mesh may divide, see there; [B, T, H, h].

    Args:
        q: [B, T, H, h].
        k: [B, T, K, h], K divides H.
        v: [B, T, K, h].
        segments: i32[B, T], or None.
        scale: of the products.
        windows: the windows that layers have, each once.
        which: i32[], the one of this layer; None where there is but one.
        softcap: of the scores.
        implementation: xla; flash: a kernel that never holds the scores of all pairs of tokens; auto: flash
            for rows of FLASH_LENGTH tokens and more where the device has it.
    Raises:
        ValueError: flash is asked for where the device has no kernel for this.
    """
    num_heads = q.shape[2]
    q, k, v = fitting_heads(q, k, v, num_parts("attention_heads"))
    # Said on both sides of the change of places: else XLA gathers the tokens of all devices somewhere before.
    q, k, v = constrain(q, _OF_TOKENS), constrain(k, _KV_OF_TOKENS), constrain(v, _KV_OF_TOKENS)
    q, k, v = (constrain(x, _OF_HEADS) for x in (q, k, v))
    lack = flash_lack(
        device_platform(),
        q.dtype,
        head_dim=q.shape[3],
        softcap=softcap,
        is_packed=segments is not None,
        capability=compute_capability(),
    )
    if implementation == "flash" and lack:
        raise ValueError(f"model.attention is 'flash', but {lack}; set model.attention: auto")
    if implementation == "flash" or (implementation == "auto" and q.shape[1] >= FLASH_LENGTH and not lack):
        kernel = splash_attention if device_platform() == "tpu" else cudnn_attention
        axes = (_OF_HEADS, _OF_HEADS, _OF_HEADS, _OF_HEADS[:2])  # of segments the last
        branches = [
            on_shards(partial(kernel, window=window, scale=scale, softcap=softcap), axes, _OF_HEADS)
            for window in windows
        ]
        number = 0 if which is None else which
        out = jax.lax.switch(number, branches, q, k, v, segments)
    else:
        window = windows[0] if which is None else jnp.asarray(windows)[which]
        out = causal_attention(q, k, v, segments, scale=scale, window=window, softcap=softcap)
    return constrain(constrain(out, _OF_HEADS), _OF_TOKENS)[:, :, :num_heads]


def fitting_heads(q: Array, k: Array, v: Array, parts: int) -> tuple[Array, Array, Array]:
    """Returns q, k and v with numbers of heads that `parts` divides, at the same places in q.

    Heads of keys and values are repeated where they are too few. Heads of zeros come behind where those of
    the queries do not divide.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    missing = -num_heads % parts
    enough = num_heads if missing else math.lcm(num_kv_heads, parts)
    k, v = (jnp.repeat(x, enough // num_kv_heads, axis=2) for x in (k, v))
    zeros = ((0, 0), (0, 0), (0, missing), (0, 0))
    q, k, v = (jnp.pad(x, zeros) if missing else x for x in (q, k, v))
    return q, k, v


def flash_lack(
    platform: str,
    dtype: jnp.dtype,
    *,
    head_dim: int,
    softcap: float,
    is_packed: bool,
    capability: tuple[int, ...] = (),
) -> str:
    """Returns why a device of this platform has no kernel for attention of this kind; empty: it has one.

    Args:
        platform: cpu, gpu or tpu.
        dtype: of queries, keys and values.
        head_dim: of them.
        softcap: of the scores.
        is_packed: whether rows hold several sequences.
        capability: of the GPU, such as (9, 0); () where this process has none of CUDA.
    """
    if platform == "tpu":
        return ""
    if platform != "gpu":
        return f"there is no kernel for a {platform}"
    if not capability:
        return "this process has no GPU with CUDA, and so no cuDNN"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN has no kernel for model.dtype {dtype}"
    largest = 256 if capability >= _HOPPER else 128  # see jax._src.cudnn.fused_attention_stablehlo
    if head_dim > largest or head_dim % 8:
        return (
            f"cuDNN's kernel takes heads of up to {largest} numbers, in multiples of 8, on this GPU, and "
            f"this model's have {head_dim}"
        )
    if softcap:
        return f"cuDNN has no kernel that caps scores, as this model does at {softcap}"
    return (
        "cuDNN has no kernel for rows of several sequences (data.packing, ppo.sequences_per_row)"
        if is_packed
        else ""
    )


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    *,
    window: int,
    scale: float,
    softcap: float,
    interpret: bool = False,
) -> Array:
    """Returns causal_attention by a TPU's kernel, which skips blocks of pairs that do not see each other.

    `interpret` runs it on any device, slowly. Rows are padded to whole blocks.
    """
    length = q.shape[1]
    # Small blocks are slow, and so is padding.
    block = next(size for size in _BLOCKS if -length % size <= length // 16 or size == _BLOCKS[-1])
    missing = -length % block

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))

    q, k, v = (padded(x).swapaxes(1, 2) for x in ((q.astype(jnp.float32) * scale).astype(q.dtype), k, v))
    ids = None if segments is None else splash.SegmentIds(padded(segments), padded(segments))
    kernel = _splash_kernel(q.shape[1], length + missing, window, softcap, block, interpret)
    return cast(Array, jax.vmap(kernel)(q, k, v, ids)).swapaxes(1, 2)[:, :length]


@cache
def _splash_kernel(
    num_heads: int, length: int, window: int, softcap: float, block: int, interpret: bool
) -> splash.SplashAttentionKernel:
    """Returns the kernel, whose masks take a while to prepare: of blocks, not of pairs of tokens."""
    shape = (length, length)
    mask = splash_mask.LocalMask(shape, (window - 1, 0), 0) if window else splash_mask.CausalMask(shape)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * num_heads),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap or None,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def cudnn_attention(
    q: Array, k: Array, v: Array, segments: Array | None, *, window: int, scale: float, softcap: float
) -> Array:
    """Returns causal_attention by a GPU's kernel, which knows neither segments nor a soft cap."""
    assert segments is None and not softcap
    local = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=scale, local_window_size=local, implementation="cudnn"
    )
