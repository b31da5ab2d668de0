"""Low-rank adapters: what is learned beside frozen weights, y = x W + s (x A) B.

An adapter is a tree like the trunk's, in which `NAME_adapter` = {a, b} stands where the trunk has the weight
NAME: a is f32[L, *inputs, r], b f32[L, r, *outputs].

Sources: arXiv:2106.09685; of rsLoRA's scale arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.batch import ADAPTER, Params
from rlhf_jax.models.architecture import Architecture

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")


class Lora(NamedTuple):
    """The adapters of a model; all its roles have the same."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Weights that have an adapter."""
    rslora: bool = False

    @property
    def scale(self) -> float:
        """Returns s: alpha / rank, of rsLoRA alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def choose_targets(architecture: Architecture, wanted: Sequence[str]) -> tuple[str, ...]:
    """Returns the weights that get adapters, in the order of the forward pass.

    Args:
        architecture: decides which there are: experts have none, and an MLP need not have a gate.
        wanted: names of weights; none: all that there are.
    Raises:
        ValueError: a wanted weight that the model does not have, or whose adapters are not supported.
    """
    of_mlp = FEED_FORWARD if architecture.gated else FEED_FORWARD[1:]
    there = ATTENTION if architecture.num_experts else (*ATTENTION, *of_mlp)
    for name in wanted:
        if name not in there:
            why = "experts have no adapters" if architecture.num_experts else "this model's MLP has no gate"
            raise ValueError(f"lora.targets: {name!r}: {why}; choose of {', '.join(there)}")
    return tuple(name for name in there if name in wanted or not wanted)


def with_adapter(weights: Params, adapter: Params | None) -> Params:
    """Returns one tree of a trunk, or a part of it, and an adapter: it has other names in the same places."""
    if not adapter:
        return weights
    return {
        name: with_adapter(weights[name], adapter.get(name)) if name in weights else adapter[name]
        for name in (*weights, *(adapter.keys() - weights.keys()))
    }


def adapter_of(params: Params) -> Params:
    """Returns the adapter in a tree that `with_adapter` made, without the branches that have none."""
    found = {}
    for name, node in params.items():
        if name.endswith(ADAPTER):
            found[name] = node
        elif isinstance(node, dict) and (inner := adapter_of(node)):
            found[name] = inner
    return found


def merge(trunk: Params, adapter: Params, lora: Lora) -> Params:
    """Returns the float32 trunk that computes what trunk and adapter compute: W + s A B.

    Args:
        trunk: in any float type, layers stacked.
        adapter: of this trunk.
        lora: gives s.
    """
    merged = {}
    for name, node in trunk.items():
        own = adapter.get(name + ADAPTER)
        if isinstance(node, dict):
            merged[name] = merge(node, adapter.get(name, {}), lora)
        else:
            merged[name] = node.astype(jnp.float32)
            if own is not None:
                merged[name] += lora.scale * jax.vmap(_product)(own["a"], own["b"])
    return merged


def _product(a: Array, b: Array) -> Array:
    return jnp.tensordot(
        a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision=lax.Precision.HIGHEST
    )
