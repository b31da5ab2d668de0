"""Decoding with a key/value cache: prefill of the prompts, then one token per row and step.

Caches are lists with one array per layer, [B, K, S, h], and decoding is unrolled over the layers: a stacked
cache, or stacked weights sliced in a loop, would be copied whole at each step. All rows write the same column
in a step, with one dynamic_update_slice; a scatter per row, or the length before the heads, makes a TPU copy
the cache. Prompts have their own region, so there is no left padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

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


class KVCache(NamedTuple):
    """Keys and values of every layer, in the compute dtype."""

    prompt_k: list[Array]  # [B, K, P, h], rotated
    prompt_v: list[Array]  # [B, K, P, h]
    k: list[Array]  # [B, K, C, h], rotated; column s is the completion's token number s, of all rows alike
    v: list[Array]  # [B, K, C, h]
    prompt_lengths: Array  # i32[B]


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
    stacked, of_adapter = params["trunk"].pop("layers"), params.pop("adapter", {"layers": None})["layers"]
    numbers = range(architecture.num_layers)
    layers, adapters = ([jax.tree.map(itemgetter(i), of) for i in numbers] for of in (stacked, of_adapter))
    return DecodeWeights(params, layers, adapters, architecture, lora)


def prefill(weights: DecodeWeights, tokens: Array, lengths: Array, num_steps: int) -> tuple[Array, KVCache]:
    """Returns the hidden state of each prompt's last token, [B, D], and a cache with room for C more tokens.

    Args:
        weights: of `unstack`.
        tokens: i32[B, P], right-padded.
        lengths: i32[B]; a filling row of length 0 gets finite numbers.
        num_steps: C.
    Raises:
        ValueError: P + C is longer than the model's context.
    """
    limit = weights.architecture.context_length
    if tokens.shape[1] + num_steps > limit:
        raise ValueError(
            f"prompts of up to {tokens.shape[1]} tokens and completions of up to {num_steps} do not fit the "
            f"model's context length of {limit}; shorten one of them"
        )
    keys, values, empty_k, empty_v = [], [], [], []
    scale, softcap = weights.architecture.score_scale, weights.architecture.attention_softcap

    def attend(window: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        attended = causal_attention(q, k, v, scale=scale, window=window, softcap=softcap)
        return attended, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    positions = jnp.arange(tokens.shape[1])
    x_BPD, turns = _embed(weights, tokens, positions), _rotations(weights, positions)
    for block, kind in zip(weights.blocks(), weights.architecture.layer_kinds, strict=True):
        x_BPD, (k_BKPh, v_BKPh) = block(x_BPD, turns[kind.rope], partial(attend, kind.window))
        batch, num_kv_heads, _, head_dim = k_BKPh.shape
        keys.append(k_BKPh)
        values.append(v_BKPh)
        empty_k.append(jnp.zeros((batch, num_kv_heads, num_steps, head_dim), k_BKPh.dtype))
        empty_v.append(jnp.zeros((batch, num_kv_heads, num_steps, head_dim), v_BKPh.dtype))
    hidden_BD = _final_norm(weights, last_hidden(x_BPD, lengths))
    return hidden_BD, KVCache(keys, values, empty_k, empty_v, lengths)


def decode_step(weights: DecodeWeights, cache: KVCache, tokens: Array, step: Array) -> tuple[Array, KVCache]:
    """Returns the hidden state [B, D] of a new token of each row, and the cache that holds it.

    Args:
        weights: of `unstack`.
        cache: with the completions' tokens before `step`.
        tokens: i32[B], the completions' token number `step`; its position is prompt_length + step.
        step: i32[], less than C.
    """

    def attend(layer: int, window: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        new_k = jax.lax.dynamic_update_slice_in_dim(cache.k[layer], k.swapaxes(1, 2), step, axis=2)
        new_v = jax.lax.dynamic_update_slice_in_dim(cache.v[layer], v.swapaxes(1, 2), step, axis=2)
        attended = cached_attention(
            q[:, 0],
            cache.prompt_k[layer],
            cache.prompt_v[layer],
            new_k,
            new_v,
            cache.prompt_lengths,
            step,
            scale=weights.architecture.score_scale,
            window=window,
            softcap=weights.architecture.attention_softcap,
        )
        return attended[:, None], (new_k, new_v)

    positions = (cache.prompt_lengths + step)[:, None]
    x_B1D, turns = _embed(weights, tokens[:, None], positions), _rotations(weights, positions)
    columns = []
    for i, (block, kind) in enumerate(zip(weights.blocks(), weights.architecture.layer_kinds, strict=True)):
        x_B1D, written = block(x_B1D, turns[kind.rope], partial(attend, i, kind.window))
        columns.append(written)
    hidden_BD = _final_norm(weights, x_B1D[:, 0])
    return hidden_BD, cache._replace(k=[k for k, _ in columns], v=[v for _, v in columns])


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
