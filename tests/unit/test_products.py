"""Products with weights: their gradients, which are written down on a CPU, against JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.products import times

SHAPES = [((2, 3, 4), (4, 5)), ((2, 3, 4), (4, 2, 5)), ((2, 3, 2, 4), (2, 4, 5))]
"""Of what goes in and of the weight: one dimension or two come out, one or two are summed over."""


def arrays(shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def functions(shapes):
    num_inputs = len(shapes[0]) - 2
    return (lambda x, w: times(x, w, num_inputs)), (lambda x, w: jnp.tensordot(x, w, num_inputs))


def assert_same(ours, plain):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert one.shape == other.shape and np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_a_tensordot(shapes):
    """Both gradients, each alone where the other is frozen, and the change along tangents."""
    x, w = arrays(shapes)
    of_x, of_w = arrays(shapes, seed=1)

    def found(function):
        def loss(x, w):
            return jnp.sum(jnp.sin(function(x, w)))

        both = jax.value_and_grad(loss, (0, 1))(x, w)
        alone = jax.grad(lambda x: loss(x, w))(x), jax.grad(lambda w: loss(x, w))(w)
        return both, alone, jax.jvp(function, (x, w), (of_x, of_w))

    assert_same(*map(found, functions(shapes)))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_change_along_tangents_has_gradients_in_the_tangents(shapes):
    """As the product with a Fisher matrix is made of."""
    primals, tangents = tuple(arrays(shapes)), tuple(arrays(shapes, seed=1))

    def found(function):
        def loss(*tangents):
            return jnp.sum(jnp.square(jax.jvp(function, primals, tangents)[1]))

        return jax.grad(loss, (0, 1))(*tangents)

    assert_same(*map(found, functions(shapes)))


def test_a_weights_gradient_is_in_its_own_order():
    """Nothing has to be turned behind the product."""
    x, w = arrays(SHAPES[0])
    names = [
        equation.primitive.name
        for function in functions(SHAPES[0])
        for equation in jax.make_jaxpr(jax.grad(lambda w, f=function: jnp.sum(f(x, w))))(w).eqns
    ]
    assert names.count("transpose") == 1  # of the tensordot's
    assert names.count("linear_call") == 1


def test_a_frozen_weight_costs_no_product():
    x, w = arrays(SHAPES[0])
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(times(x, w))))(x))
    assert text.count("dot_general") == 2  # forward, and back to x
