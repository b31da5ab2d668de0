"""Low-rank adapters: what is learned beside frozen weights, y = x W + s (x A) B.

Sources: arXiv:2106.09685; the scale of rsLoRA is arXiv:2312.03732. An adapter is a tree like the trunk's, in
which `NAME_adapter` = {a, b} stands where the trunk has the weight NAME: a is f32[L, *inputs, r], b
f32[L, r, *outputs].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.batch import Params

SUFFIX = "_adapter"
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


def merge(trunk: Params, adapter: Params, lora: Lora) -> Params:
    """Returns the float32 trunk that computes what trunk and adapter compute: W + s A B.

    Args:
        trunk: in any float type, layers stacked.
        adapter: of this trunk.
        lora: gives s.
    """
    merged = {}
    for name, node in trunk.items():
        own = adapter.get(name + SUFFIX)
        if isinstance(node, dict):
            merged[name] = merge(node, adapter.get(name, {}), lora)
        else:
            merged[name] = node.astype(jnp.float32)
            if own is not None:
                merged[name] += lora.scale * jax.vmap(_product)(own["a"], own["b"])
    return merged


def _product(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, axes=1, precision=lax.Precision.HIGHEST)
