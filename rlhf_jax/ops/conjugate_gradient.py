"""Conjugate gradients on a pytree: linear systems of which only products with the matrix are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Solution(NamedTuple):
    """What conjugate gradients found."""

    x: Any  # tree like b
    residual: Any  # tree like b: b - A x, as the recurrence has it
    num_iterations: Array  # i32[], products that were made


def conjugate_gradient(
    product: Callable[[Any], Any], b: Any, *, num_iterations: int, tolerance: float = 0.0
) -> Solution:
    """Returns an approximate solution of A x = b, starting from x = 0.

    Stops early where ||b - A x|| <= tolerance ||b||, and where a direction has no positive curvature, which
    rounding alone can cause.

    Args:
        product: A v of a tree v like b; A is symmetric and positive (semi-)definite.
        b: tree of f32 arrays, on any devices: each sum over a tree is of products where they lie.
        num_iterations: the most products.
        tolerance: of the residual, relative to b; code of TRPO often stops at a squared one of 1e-10.
    Source: Hestenes and Stiefel 1952; arXiv:1502.05477 appendix C.
    """
    limit = tolerance**2 * tree_dot(b, b)

    def unsolved(carry: tuple[Solution, Any, Array, Array]) -> Array:
        so_far, _, squared, is_positive = carry
        return (so_far.num_iterations < num_iterations) & (squared > limit) & is_positive

    def step(carry: tuple[Solution, Any, Array, Array]) -> tuple[Solution, Any, Array, Array]:
        (x, residual, done), direction, squared, _ = carry
        of_direction = product(direction)
        curvature = tree_dot(direction, of_direction)
        is_positive = curvature > 0
        alpha = jnp.where(is_positive, squared / jnp.where(is_positive, curvature, 1.0), 0.0)
        x = tree_add(x, direction, alpha)
        residual = tree_add(residual, of_direction, -alpha)
        new_squared = tree_dot(residual, residual)
        direction = tree_add(residual, direction, new_squared / squared)
        return Solution(x, residual, done + 1), direction, new_squared, is_positive

    start = Solution(jax.tree.map(jnp.zeros_like, b), b, jnp.zeros((), jnp.int32))
    return lax.while_loop(unsolved, step, (start, b, tree_dot(b, b), jnp.asarray(True)))[0]


def tree_dot(a: Any, b: Any) -> Array:
    """Returns f32[], the inner product of two trees.

    A sum of products: `jnp.vdot` flattens its arguments, for which XLA may gather sharded ones.
    """
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return jax.tree.reduce(jnp.add, products)


def tree_add(a: Any, b: Any, scale: Array | float = 1.0) -> Any:
    """Returns a + scale b of two trees."""
    return jax.tree.map(lambda x, y: x + scale * y, a, b)
