"""Products of activations with weights."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, linear_call

from rlhf_jax.sharding import device_platform


def times(x: Array, weight: Array, num_inputs: int = 1) -> Array:
    """Returns x [..., inputs] times a weight [inputs, outputs], summed over so many dimensions of inputs.

    On a CPU the weight's gradient is x' g, where JAX writes (g' x)': XLA would copy each g, turned, for a
    product that it does not give to its fast library, where a turned x serves all weights that it meets.
    There the gradient in the weight has no vmap, and no derivative in x.
    """
    if device_platform() == "cpu":
        return _times_on_cpu(num_inputs, x, weight)
    return _times(num_inputs, x, weight)


def _times(num_inputs: int, x: Array, weight: Array) -> Array:
    last, first = range(x.ndim - num_inputs, x.ndim), range(num_inputs)
    return lax.dot_general(x, weight, ((tuple(last), tuple(first)), ((), ())))


_times_on_cpu = jax.custom_jvp(_times, nondiff_argnums=(0,))


def _change(num_inputs: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Returns the product and how it changes, as a function whose transpose is written down."""
    (x, weight), (of_x, of_weight) = primals, tangents
    changes = []
    if not isinstance(of_x, SymbolicZero):
        changes.append(_times(num_inputs, of_x, weight))
    if not isinstance(of_weight, SymbolicZero):

        def turned(x: Array, gradient: Array) -> Array:
            tokens = tuple(range(x.ndim - num_inputs))
            return lax.dot_general(x, gradient, ((tokens, tokens), ((), ())))

        def forward(x: Array, of_weight: Array) -> Array:
            return _times(num_inputs, x, of_weight)

        changes.append(linear_call(forward, turned, x, of_weight))
    return _times(num_inputs, x, weight), sum(changes[1:], changes[0])


_times_on_cpu.defjvp(_change, symbolic_zeros=True)
