"""A mixture of experts that drops no token: each goes through the experts it chose, whatever others chose."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def choose_experts(x: Array, router: Array, num_chosen: int, *, normalize: bool) -> tuple[Array, Array]:
    """Returns the experts of each token, i32[N, k], and their weights, f32[N, k], the largest first.

    Args:
        x: [N, D].
        router: [D, E].
        num_chosen: k.
        normalize: a token's weights sum to 1; else they are its probabilities among all experts.
    """
    chances = jax.nn.softmax(jnp.matmul(x, router, preferred_element_type=jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(chances, num_chosen)
    return experts, weights / jnp.sum(weights, axis=-1, keepdims=True) if normalize else weights


def run_experts(
    x: Array,
    experts: Array,
    weights: Array,
    gate: Array,
    up: Array,
    down: Array,
    activation: Callable[[Array], Array],
) -> Array:
    """Returns sum_k weight_k down_e(activation(gate_e(x)) * up_e(x)), e being a token's k-th expert, [N, D].

    Tokens are sorted by expert, so that each expert multiplies one contiguous block, of whatever length. What
    chose experts that are not among these E comes last, is multiplied by none, and adds nothing.

    Args:
        x: [N, D].
        experts: i32[N, k]; below 0, or E and more: an expert that another device has.
        weights: f32[N, k].
        gate: [E, D, F].
        up: [E, D, F].
        down: [E, F, D].
        activation: elementwise.
    """
    (num_tokens, num_chosen), num_experts = experts.shape, gate.shape[0]
    is_here = (experts >= 0) & (experts < num_experts)
    experts = jnp.where(is_here, experts, num_experts).reshape(-1)
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=num_experts + 1)[:-1]
    sorted_x = x[order // num_chosen]
    fed = activation(jax.lax.ragged_dot(sorted_x, gate, sizes)) * jax.lax.ragged_dot(sorted_x, up, sizes)
    out = jax.lax.ragged_dot(fed, down, sizes)[jnp.argsort(order)].reshape(num_tokens, num_chosen, -1)
    out = jnp.where(is_here[..., None], out, 0)
    return jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype))
