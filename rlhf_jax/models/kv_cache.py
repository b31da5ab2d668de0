"""Decoding with a key/value cache: prefill of the prompts, then one token per row and step.

Caches are lists with one array per layer, [B, K, S, h], and decoding is unrolled over the layers: a stacked
cache, or stacked weights sliced in a loop, would be copied whole at each step. All rows write the same column
in a step, with one dynamic_update_slice; a scatter per row, or the length before the heads, makes a TPU copy
the cache. Prompts have their own region, so there is no left padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Params
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.attention import Rotation, cached_attention, causal_attention, rotation
from rlhf_jax.models.heads import last_hidden
from rlhf_jax.models.transformer import Block, RMSNorm, bind, logits


class KVCache(NamedTuple):
    """Keys and values of every layer, in the compute dtype."""

    prompt_k: list[Array]  # [B, K, P, h], rotated
    prompt_v: list[Array]  # [B, K, P, h]
    k: list[Array]  # [B, K, C, h], rotated; column s is the completion's token number s, of all rows alike
    v: list[Array]  # [B, K, C, h]
    prompt_lengths: Array  # i32[B]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "layers"], meta_fields=["architecture"])
@dataclass(frozen=True)
class DecodeWeights:
    """Policy parameters in the layout for decoding, cast once to the compute dtype."""

    params: Params  # the policy's, without the trunk's layers
    layers: list[Params]
    architecture: Architecture

    @property
    def embedding(self) -> Array:
        """Returns [V, D]."""
        return self.params["trunk"]["embed"]["embedding"]


def unstack(policy_params: Params, architecture: Architecture, dtype: str) -> DecodeWeights:
    """Returns the weights for decoding; call it once per rollout.

    Args:
        policy_params: {"trunk", and "lm_head" where embeddings are not tied}, stacked layers.
        architecture: the policy's.
        dtype: the compute dtype.
    """

    def cast(path: tuple, leaf: Array) -> Array:
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)  # norms multiply in float32

    params = jax.tree.map_with_path(cast, policy_params)
    stacked = params["trunk"].pop("layers")
    layers = [jax.tree.map(itemgetter(layer), stacked) for layer in range(architecture.num_layers)]
    return DecodeWeights(params, layers, architecture)


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

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        return causal_attention(q, k, v), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    x_BPD = weights.embedding[tokens]
    turn = _rotation(weights, jnp.arange(tokens.shape[1]))
    for layer in weights.layers:
        x_BPD, (k_BKPh, v_BKPh) = bind(Block, weights.architecture, layer)(x_BPD, turn, attend)
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

    def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        new_k = jax.lax.dynamic_update_slice_in_dim(cache.k[layer], k.swapaxes(1, 2), step, axis=2)
        new_v = jax.lax.dynamic_update_slice_in_dim(cache.v[layer], v.swapaxes(1, 2), step, axis=2)
        attended = cached_attention(
            q[:, 0], cache.prompt_k[layer], cache.prompt_v[layer], new_k, new_v, cache.prompt_lengths, step
        )
        return attended[:, None], (new_k, new_v)

    x_B1D = weights.embedding[tokens][:, None]
    turn = _rotation(weights, (cache.prompt_lengths + step)[:, None])
    columns = []
    for i, layer in enumerate(weights.layers):
        x_B1D, written = bind(Block, weights.architecture, layer)(x_B1D, turn, partial(attend, i))
        columns.append(written)
    hidden_BD = _final_norm(weights, x_B1D[:, 0])
    return hidden_BD, cache._replace(k=[k for k, _ in columns], v=[v for _, v in columns])


def decode_logits(weights: DecodeWeights, hidden: Array) -> Array:
    """Returns f32[B, V] of hidden states [B, D]."""
    return logits(weights.params, hidden)


def _rotation(weights: DecodeWeights, positions: Array) -> Rotation:
    return rotation(positions, weights.architecture.head_dim, weights.architecture.rope_theta)


def _final_norm(weights: DecodeWeights, x: Array) -> Array:
    return bind(RMSNorm, weights.architecture, weights.params["trunk"]["final_norm"])(x)
