"""A mixture of experts: routing by hand, and every token through its own experts, as a plain loop does it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.experts import choose_experts, run_experts
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import axis_rules, param_shardings, place_rows
from tests import hlo, tiny


def test_a_token_chooses_its_most_likely_experts():
    chances = np.asarray([0.1, 0.5, 0.4])
    x, router = jnp.ones((1, 1)), jnp.asarray(np.log(chances))[None]
    experts, weights = choose_experts(x, router, 2, normalize=False)
    np.testing.assert_array_equal(experts, [[1, 2]])
    np.testing.assert_allclose(weights, [[0.5, 0.4]], rtol=1e-6)
    _, weights = choose_experts(x, router, 2, normalize=True)
    np.testing.assert_allclose(weights, [[5 / 9, 4 / 9]], rtol=1e-6)


def test_no_token_is_dropped_however_uneven_the_load():
    rng = np.random.default_rng(0)
    num_tokens, width, inner, num_experts = 9, 4, 3, 4
    x = rng.normal(size=(num_tokens, width)).astype(np.float32)
    gate, up = rng.normal(size=(2, num_experts, width, inner)).astype(np.float32)
    down = rng.normal(size=(num_experts, inner, width)).astype(np.float32)
    experts = np.asarray([[2, 0]] * 8 + [[2, 3]])  # all want expert 2, none wants 1
    weights = rng.random((num_tokens, 2)).astype(np.float32)

    expected = np.zeros_like(x)
    for token in range(num_tokens):
        for expert, weight in zip(experts[token], weights[token], strict=True):
            gated = np.maximum(x[token] @ gate[expert], 0) * (x[token] @ up[expert])
            expected[token] += weight * (gated @ down[expert])
    found = jax.jit(run_experts, static_argnums=6)(
        x, jnp.asarray(experts), weights, gate, up, down, jax.nn.relu
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "rules", "dtype", "tolerance"),
    [
        pytest.param({"data": 8}, {}, "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param({"sequence": 4}, {}, "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param({"expert": 4}, {}, "float32", 1e-5, marks=pytest.mark.slow),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, {}, "float32", 1e-5),
        pytest.param(
            {"tensor": 4}, {"expert": "tensor", "mlp": "none"}, "float32", 1e-5, marks=pytest.mark.slow
        ),
        pytest.param(  # products are rounded to 8 bits
            {"data": 2, "fsdp": 2, "tensor": 2}, {}, "bfloat16", 1e-2, marks=pytest.mark.slow
        ),
    ],
)
def test_a_device_computes_its_share_and_the_same_gradient(sizes, rules, dtype, tolerance):
    """XLA alone would sort and multiply the tokens of all devices on each."""
    architecture = dataclasses.replace(
        tiny.ARCHITECTURE, family="mixtral", num_layers=1, num_experts=4, experts_per_token=2, mlp_size=256
    )
    model = make_model(architecture, dtype)
    rows = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)

    def loss(params, rows):
        return jnp.sum(jnp.sin(model.hidden(params["trunk"], rows).astype(jnp.float32)))

    def gradient(mesh):
        shardings = param_shardings(mesh, model.policy_axes, model.policy_shapes)
        params = jax.device_put(model.init_policy(jax.random.key(0)), shardings)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(jax.grad(loss)).lower(params, place_rows(mesh, rows)).compile()
        return compiled(params, place_rows(mesh, rows)), compiled

    with axis_rules(rules):
        (one, alone), (ours, together) = gradient(tiny.mesh()), gradient(tiny.mesh(**sizes))
    share = alone.cost_analysis()["flops"] / math.prod(sizes.values())
    assert together.cost_analysis()["flops"] < 1.1 * share
    if "expert" in sizes:  # no device has the weights of all experts
        whole = 4 * 32 * 256 // sizes.get("tensor", 1)
        assert max(made.size for made in hlo.communicated(together)) < whole
        assert all(made.shape[-3:] != (4, 32, 256) for made in hlo.arrays(together))
    assert tiny.relative_difference(ours, one) < tolerance
