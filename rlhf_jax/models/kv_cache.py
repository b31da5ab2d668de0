"""Decoding with a key/value cache: prefill of the prompts, then one token per row and step.

Caches are lists with one array per layer, [B, K, S, h], and decoding is unrolled over the layers: a stacked
cache, or stacked weights sliced in a loop, would be copied whole at each step. All rows write the same column
in a step, with one dynamic_update_slice; a scatter per row, or the length before the heads, makes a TPU copy
the cache. So a row may begin in any column, and the columns are a ring. Prompts have their own region, so
there is no left padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Params
from rlhf_jax.models.architecture import Architecture, Rope
from rlhf_jax.models.attention import cached_attention, causal_attention
from rlhf_jax.models.blocks import Block, Embed, Norm, bind
from rlhf_jax.models.heads import last_hidden
from rlhf_jax.models.lora import Lora
from rlhf_jax.models.rope import Rotation, rotation
from rlhf_jax.models.transformer import logits


class PromptCache(NamedTuple):
    """Keys and values of prompts, of every layer, in the compute dtype."""

    k: list[Array]  # [N, K, P, h], rotated
    v: list[Array]  # [N, K, P, h]
    lengths: Array  # i32[N]


class KVCache(NamedTuple):
    """Keys and values of rows that are being completed; the G rows of a group share their prompt."""

    prompt: PromptCache  # of N groups
    k: list[Array]  # [B, K, C, h], rotated; B = N * G
    v: list[Array]  # [B, K, C, h]
    column: Array  # i32[]; of the ring of C columns, the one that the next token of every row is written to


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "layers", "adapters"],
    meta_fields=["architecture", "lora"],
)
@dataclass(frozen=True)
class DecodeWeights:
    """Policy parameters in the layout for decoding, cast once to the compute dtype."""

    params: Params  # the policy's, without the trunk's layers
    layers: list[Params]
    adapters: list[Params | None]
    """Of each layer: beside the weights, for added to them they would be lost in the rounding to bfloat16."""
    architecture: Architecture
    lora: Lora | None

    def blocks(self) -> Iterator[Block]:
        """Yields each layer's block."""
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            yield bind(Block, self.architecture, layer, adapter, self.lora)


def unstack(
    policy_params: Params, architecture: Architecture, dtype: str, lora: Lora | None = None
) -> DecodeWeights:
    """Returns the weights for decoding; call it once per rollout.

    Args:
        policy_params: {"trunk", "lm_head" where embeddings are not tied, and an "adapter" where it has one},
            stacked layers.
        architecture: the policy's.
        dtype: the compute dtype.
        lora: what its adapter is like.
    """

    def cast(path: tuple, leaf: Array) -> Array:
        is_of_norm = path[-1].key in ("scale", "bias")  # these multiply and add in float32
        return leaf if is_of_norm else leaf.astype(dtype)

    params = jax.tree.map_with_path(cast, policy_params)
    return by_layer(params, lambda i, leaf: leaf[i], architecture, lora)


def by_layer(
    policy: Params, take: Callable[[int, Any], Any], architecture: Architecture, lora: Lora | None
) -> DecodeWeights:
    """Returns a policy's tree in the form for decoding.

    Args:
        policy: of arrays, or of what is said of each, such as shardings.
        take: gives what a leaf of stacked layers is for one of them.
        architecture, lora: the policy's.
    """
    rest = {**policy, "trunk": {**policy["trunk"]}}
    stacked, of_adapter = rest["trunk"].pop("layers"), rest.pop("adapter", {"layers": None})["layers"]

    def layers(of: Params | None) -> list[Any]:
        return [jax.tree.map(partial(take, i), of) for i in range(architecture.num_layers)]

    return DecodeWeights(rest, layers(stacked), layers(of_adapter), architecture, lora)


def prefill(weights: DecodeWeights, tokens: Array, lengths: Array) -> tuple[Array, PromptCache]:
    """Returns the hidden state of each prompt's last token, [N, D], and the prompts' keys and values.

    Args:
        weights: of `unstack`.
        tokens: i32[N, P], right-padded.
        lengths: i32[N]; a filling row of length 0 gets finite numbers.
    """
    keys, values = [], []
    scale, softcap = weights.architecture.score_scale, weights.architecture.attention_softcap

    def attend(window: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        attended = causal_attention(q, k, v, scale=scale, window=window, softcap=softcap)
        return attended, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    positions = jnp.arange(tokens.shape[1])
    x_NPD, turns = _embed(weights, tokens, positions), _rotations(weights, positions)
    for block, kind in zip(weights.blocks(), weights.architecture.layer_kinds, strict=True):
        x_NPD, (k_NKPh, v_NKPh) = block(x_NPD, turns[kind.rope], partial(attend, kind.window))
        keys.append(k_NKPh)
        values.append(v_NKPh)
    hidden_ND = _final_norm(weights, last_hidden(x_NPD, lengths))
    return hidden_ND, PromptCache(keys, values, lengths)


def empty_prompts(weights: DecodeWeights, num_prompts: int, width: int) -> PromptCache:
    """Returns room for N prompts of up to P tokens."""
    architecture = weights.architecture
    shape = (num_prompts, architecture.num_kv_heads, width, architecture.head_dim)
    dtype = weights.params["trunk"]["embed"]["embedding"].dtype
    layers = [jnp.zeros(shape, dtype)] * architecture.num_layers
    return PromptCache(layers, layers, jnp.zeros(num_prompts, jnp.int32))


def with_room(prompt: PromptCache, num_columns: int, group_size: int = 1) -> KVCache:
    """Returns a cache with room for C tokens of each of the G rows of every prompt."""
    num_prompts, num_kv_heads, _, head_dim = prompt.k[0].shape
    shape = (num_prompts * group_size, num_kv_heads, num_columns, head_dim)
    rings = [jnp.zeros(shape, k.dtype) for k in prompt.k]
    return KVCache(prompt, rings, rings, jnp.int32(0))


def put_prompts(cache: KVCache, reserve: PromptCache, sources: Array, slots: Array, count: Array) -> KVCache:
    """Returns the cache with other prompts in some slots, written one by one: a scatter may copy the cache.

    Args:
        cache: of N slots.
        reserve: of R prompts.
        sources: i32[N], the first `count` of which say which prompts are put.
        slots: i32[N], where each goes; all differ.
        count: i32[].
    """

    def put(i: Array, prompt: PromptCache) -> PromptCache:
        def one(old: Array, new: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(new, sources[i], 1)
            return jax.lax.dynamic_update_slice_in_dim(old, row, slots[i], 0)

        return jax.tree.map(one, prompt, reserve)

    return cache._replace(prompt=jax.lax.fori_loop(0, count, put, cache.prompt))


def decode_step(
    weights: DecodeWeights, cache: KVCache, tokens: Array, counts: Array
) -> tuple[Array, KVCache]:
    """Returns the hidden state [B, D] of a new token of each row, and the cache that holds it.

    Args:
        weights: of `unstack`.
        cache: with the tokens before.
        tokens: i32[B], the newest token of each completion.
        counts: i32[B], tokens of the completion, this one included, at most C; its position is
            prompt_length + count - 1.
    """

    def attend(layer: int, window: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        new_k = jax.lax.dynamic_update_slice_in_dim(cache.k[layer], k.swapaxes(1, 2), cache.column, axis=2)
        new_v = jax.lax.dynamic_update_slice_in_dim(cache.v[layer], v.swapaxes(1, 2), cache.column, axis=2)
        attended = cached_attention(
            q[:, 0],
            cache.prompt.k[layer],
            cache.prompt.v[layer],
            new_k,
            new_v,
            cache.prompt.lengths,
            cache.column,
            counts,
            scale=weights.architecture.score_scale,
            window=window,
            softcap=weights.architecture.attention_softcap,
        )
        return attended[:, None], (new_k, new_v)

    group_size = len(tokens) // len(cache.prompt.lengths)
    positions = (jnp.repeat(cache.prompt.lengths, group_size) + counts - 1)[:, None]
    x_B1D, turns = _embed(weights, tokens[:, None], positions), _rotations(weights, positions)
    columns = []
    for i, (block, kind) in enumerate(zip(weights.blocks(), weights.architecture.layer_kinds, strict=True)):
        x_B1D, written = block(x_B1D, turns[kind.rope], partial(attend, i, kind.window))
        columns.append(written)
    hidden_BD = _final_norm(weights, x_B1D[:, 0])
    num_columns = cache.k[0].shape[2]
    return hidden_BD, cache._replace(
        k=[k for k, _ in columns],
        v=[v for _, v in columns],
        column=jnp.remainder(cache.column + 1, num_columns),
    )


def decode_logits(weights: DecodeWeights, hidden: Array) -> Array:
    """Returns f32[B, V] of hidden states [B, D]."""
    return logits(weights.architecture, weights.params, hidden)


def _embed(weights: DecodeWeights, tokens: Array, positions: Array) -> Array:
    embed = weights.params["trunk"]["embed"]
    return bind(Embed, weights.architecture, embed)(tokens, positions, embed["embedding"].dtype)


def _rotations(weights: DecodeWeights, positions: Array) -> dict[Rope, Rotation]:
    kinds = set(weights.architecture.layer_kinds)
    return {kind.rope: rotation(weights.architecture, positions, kind.rope) for kind in sorted(kinds)}


def _final_norm(weights: DecodeWeights, x: Array) -> Array:
    return bind(Norm, weights.architecture, weights.params["trunk"]["final_norm"])(x)
