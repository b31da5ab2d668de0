"""Rounding to what a tree is stored in: to the nearest number, or up or down by chance, right on average."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def stochastic_round(key: Array, x: Array) -> Array:
    """Returns x as bfloat16, one of its two neighbours each, whose mean over keys is x.

    P(upper) = (x - lower) / (upper - lower); what bfloat16 can say stays as it is, infinities and NaN too.
    The chances depend on the key and an element's place alone, not on the mesh.

    Args:
        key: of this array alone.
        x: f32, of any shape.
    Source: arXiv:1502.02551 section 3. A bfloat16 is the upper half of a float32: 16 random bits are added
        to the lower half, which is then cut off; what they carry is the step away from zero.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = (bits + jax.random.bits(key, x.shape, jnp.uint16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def widened(tree: Any) -> Any:
    """Returns the tree with its floating-point leaves in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def rounded_like(tree: Any, stored: Any, key: Array | None = None) -> Any:
    """Returns the tree in the types of another.

    Args:
        tree: float32, and integers.
        stored: the same structure; bfloat16 where the result is to be rounded.
        key: rounds stochastically, each leaf with its own bits; without it to the nearest number.
    """
    if key is None:
        return jax.tree.map(lambda x, old: x.astype(old.dtype), tree, stored)
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        stochastic_round(jax.random.fold_in(key, place), x) if old.dtype == jnp.bfloat16 else x
        for place, (x, old) in enumerate(zip(leaves, jax.tree.leaves(stored), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)
