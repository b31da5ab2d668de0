"""Stochastic rounding: right on average, exact where it can be, a function of key and place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.ops.rounding import rounded_like, stochastic_round, widened
from tests import tiny

BF16_MAX = float(jnp.finfo(jnp.bfloat16).max)


@pytest.mark.parametrize("x", [1.001, -1.001, 0.3, -0.3, 3e-5, 1e30, -7.77e-20, 255.99])
def test_its_mean_over_keys_is_the_number(x):
    """Within four standard errors, those of a choice between the two neighbours."""
    x = np.float32(x)
    rounded = jax.vmap(lambda key: stochastic_round(key, jnp.float32(x)))(
        jax.random.split(jax.random.key(0), 20000)
    )
    assert rounded.dtype == jnp.bfloat16
    neighbours, counts = np.unique(np.float64(rounded), return_counts=True)
    low, high = neighbours
    assert low < x < high and high - low <= 2**-7 * abs(x)
    share = (x - low) / (high - low)
    assert counts[1] / 20000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 20000))


def test_what_bfloat16_can_say_stays():
    exact = [0.0, -0.0, 1.0, -2.5, 2.0**-126, -(2.0**-100), BF16_MAX, -BF16_MAX, np.inf, -np.inf]
    x = jnp.tile(jnp.float32(exact), (1000, 1))
    rounded = np.asarray(stochastic_round(jax.random.key(1), x).astype(jnp.float32))
    np.testing.assert_array_equal(rounded, x)
    assert np.signbit(rounded[:, 1]).all()
    odd = np.uint32([0x7F800001, 0xFF800001, 0x7FFFFFFF]).view(
        np.float32
    )  # bits carried would make these finite
    assert np.isnan(np.asarray(stochastic_round(jax.random.key(1), jnp.tile(odd, 1000)), np.float32)).all()


def test_the_same_on_any_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    expected = jax.jit(stochastic_round)(jax.random.key(3), x)
    assert np.any(np.asarray(expected != jax.jit(stochastic_round)(jax.random.key(4), x)))
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    for spec in (PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("data", "fsdp", "tensor"))):
        divided = jax.device_put(x, NamedSharding(mesh, spec))
        found = jax.jit(stochastic_round, out_shardings=divided.sharding)(jax.random.key(3), divided)
        np.testing.assert_array_equal(np.float32(found), np.float32(expected))


def test_trees_are_rounded_leaf_by_leaf_to_what_is_stored():
    wide = {
        "a": jnp.full((500,), 1.001),
        "b": jnp.full((500,), 1.001),
        "c": jnp.full((3,), 1.001),
        "n": jnp.int32(7),
    }
    stored = {name: jnp.bfloat16(0) for name in "ab"} | {"c": jnp.float32(0), "n": jnp.int32(0)}
    found = rounded_like(wide, stored, jax.random.key(0))
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in stored.items()}
    assert np.any(np.asarray(found["a"] != found["b"]))  # each leaf has its own bits
    np.testing.assert_array_equal(found["c"], wide["c"])
    assert found["n"] == 7
    nearest = rounded_like(wide, stored)
    np.testing.assert_array_equal(np.float32(nearest["a"]), 1.0)
    assert {x.dtype for x in jax.tree.leaves(widened(nearest))} == {jnp.dtype("float32"), jnp.dtype("int32")}
