"""The optimiser: AdamW by hand, the schedule at its corners, what is decayed, no weak types."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.config import OptimizerConfig
from rlhf_jax.optim import decay_mask, make_optimizer, make_schedule


@pytest.mark.parametrize(
    "schedule, expected",
    [  # peak 2, 4 steps of warm-up, 12 steps
        ("constant", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 2.0, 11: 2.0}),
        ("linear", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 1.0, 11: 0.25, 12: 0.0, 99: 0.0}),
        ("cosine", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 1.0, 10: 0.29289322, 12: 0.0, 99: 0.0}),
    ],
)
def test_schedule(schedule, expected):
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4), num_steps=12)
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_schedule_without_warm_up_starts_at_the_peak_and_takes_another_one():
    cfg = OptimizerConfig(learning_rate=2.0, schedule="linear")
    assert float(make_schedule(cfg, 10)(0)) == 2.0
    assert float(make_schedule(cfg, 10, learning_rate=1.0)(5)) == 0.5


def test_a_warm_up_longer_than_the_stage_is_refused():
    with pytest.raises(ValueError, match="warmup_steps is 11, but the stage makes only 10 optimiser steps"):
        make_optimizer(OptimizerConfig(warmup_steps=11), num_steps=10)
    make_optimizer(OptimizerConfig(warmup_steps=10, schedule="linear"), num_steps=10)


PARAMS = {
    "trunk": {
        "embed": {"embedding": jnp.full((3, 2), 2.0)},
        "layers": {"norm": {"scale": jnp.full((2, 4), 2.0)}, "mlp": {"kernel": jnp.full((2, 4, 4), 2.0)}},
    },
    "score_head": {"kernel": jnp.full((4,), 2.0), "bias": jnp.full((), 2.0)},
}


def test_norms_and_biases_are_told_by_name_not_by_rank():
    assert decay_mask(PARAMS) == {
        "trunk": {
            "embed": {"embedding": True},
            "layers": {"norm": {"scale": False}, "mlp": {"kernel": True}},
        },
        "score_head": {"kernel": True, "bias": False},
    }


def test_decay_is_decoupled_and_spares_norms_and_biases():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.1), num_steps=10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["trunk"]["layers"]["mlp"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["score_head"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["trunk"]["layers"]["norm"]["scale"], 0.0)
    np.testing.assert_array_equal(updates["score_head"]["bias"], 0.0)


def test_two_steps_worked_by_hand():
    """Against a plain loop over AdamW's equations, with a gradient that is clipped and one that is not."""
    cfg = OptimizerConfig(
        learning_rate=0.1,
        weight_decay=0.01,
        beta1=0.8,
        beta2=0.9,
        eps=1e-3,
        max_grad_norm=1.0,
        warmup_steps=2,
    )
    optimizer = make_optimizer(cfg, num_steps=4)
    params = {"kernel": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    w, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for n, gradient in enumerate([np.array([3.0, 4.0]), np.array([0.3, -0.4])], start=1):
        updates, state = optimizer.update({"kernel": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        g = gradient / 5 if n == 1 else gradient  # norms 5 and 0.5, maximum 1
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.9**n)) + 1e-3)
        w = w - 0.1 * n / 2 * (step + 0.01 * w)
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_state_has_float32_moments_and_no_weak_types(schedule):
    cfg = OptimizerConfig(schedule=schedule, warmup_steps=1, weight_decay=0.1)
    optimizer = make_optimizer(cfg, num_steps=10, learning_rate=1e-4)
    params = jax.tree.map(jnp.float32, PARAMS)

    @jax.jit
    def step(state, params):
        updates, state = optimizer.update(params, state, params)
        return state, optax.apply_updates(params, updates)

    before = optimizer.init(params)
    after, moved = step(before, params)
    for leaf in jax.tree.leaves((before, after, moved)):
        assert not leaf.weak_type
        assert leaf.dtype == (
            jnp.int32 if leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.float32
        )
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    step(after, moved)
    assert step._cache_size() == 1
