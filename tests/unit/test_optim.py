"""The optimisers by hand, the schedule at its corners, what is decayed, no weak types."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.config import OptimizerConfig
from rlhf_jax.optim import _kinds, _matrix_shape, decay_mask, make_optimizer, make_schedule
from tests import tiny


@pytest.mark.parametrize(
    "schedule, expected",
    [  # peak 2, 4 steps of warm-up, 12 steps
        ("constant", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 2.0, 11: 2.0}),
        ("linear", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 1.0, 11: 0.25, 12: 0.0, 99: 0.0}),
        ("cosine", {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: 1.0, 10: 0.29289322, 12: 0.0, 99: 0.0}),
        ("wsd", {0: 0.5, 3: 2.0, 4: 2.0, 8: 2.0, 10: 2.0, 11: 1.0, 12: 0.0, 99: 0.0}),
    ],
)
def test_schedule(schedule, expected):
    cfg = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4, decay_fraction=0.25)
    rate = make_schedule(cfg, num_steps=12)
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_a_role_may_wait_before_its_schedule_begins():
    cfg = OptimizerConfig(learning_rate=2.0, schedule="linear", warmup_steps=4)
    rate = make_schedule(cfg, num_steps=15, wait=3)
    expected = {0: 0.0, 2: 0.0, 3: 0.5, 6: 2.0, 7: 2.0, 11: 1.0, 15: 0.0}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule, half_way", [("linear", 1.25), ("cosine", 1.25), ("wsd", 2.0)])
def test_a_decay_may_end_above_zero(schedule, half_way):
    cfg = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4, end_fraction=0.25)
    rate = make_schedule(cfg, num_steps=12)
    expected = {0: 0.5, 4: 2.0, 8: half_way, 12: 0.5, 99: 0.5}
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
    qwen = {"attention": {"q": 0, "q_bias": 0, "q_norm": {"scale": 0}}}
    assert decay_mask(qwen) == {"attention": {"q": True, "q_bias": False, "q_norm": {"scale": False}}}


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


SHAPES = {  # two layers, two experts, two heads of three
    "embed": {"embedding": (5, 4)},
    "layers": {
        "attention": {
            "q": (2, 4, 2, 3),
            "q_adapter": {"a": (2, 4, 5), "b": (2, 5, 2, 3)},
            "o": (2, 2, 3, 4),
            "q_bias": (2, 2, 3),
        },
        "mlp": {"up": (2, 2, 4, 6), "down": (2, 2, 6, 4), "router": (2, 4, 2)},
        "norm": {"scale": (2, 4)},
    },
    "lm_head": {"kernel": (4, 5)},
}
BLOCKS = {  # what is one matrix or vector
    "q": (2, 4, 6),
    "o": (2, 6, 4),
    "a": (2, 4, 5),
    "b": (2, 5, 6),
    "q_bias": (2, 6),
    "up": (4, 4, 6),
    "down": (4, 6, 4),
    "router": (2, 4, 2),
    "scale": (2, 4),
    "embedding": (1, 5, 4),
    "kernel": (1, 4, 5),
}
MATRICES = ("q", "o", "up", "down", "router", "a", "b")


def random_tree(seed, scale):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jnp.float32(scale * rng.normal(size=shape)), SHAPES, is_leaf=is_shape)


def blocks_of(tree):
    """Returns {name: every matrix or vector by itself}, float64."""
    leaves = {path[-1].key: leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    return {name: list(np.float64(leaf).reshape(BLOCKS[name])) for name, leaf in leaves.items()}


def adam(g, n, kept):
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * g
    kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * g**2
    return kept["m"] / (1 - 0.9**n) / (np.sqrt(kept["v"] / (1 - 0.999**n)) + 1e-8)


def adamw(name, w, g, n, kept):
    return adam(g, n, kept)


def lion(name, w, g, n, kept):
    m = kept.get("m", 0)
    kept["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * g)


def adafactor(name, w, g, n, kept):
    """Small here is what has a side of 3 or less."""
    beta, square = 1 - n**-0.8, g**2 + 1e-30
    is_factored = g.ndim == 2 and min(g.shape) >= 4
    for axis in (0, 1) if is_factored else (None,):
        mean = square if axis is None else square.mean(axis, keepdims=True)
        kept[axis] = beta * kept.get(axis, 0) + (1 - beta) * mean
    v = kept[0] * kept[1] / kept[1].mean() if is_factored else kept[None]
    u = g / np.sqrt(v)
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    return max(1e-3, rms(w)) * u / max(1, rms(u))


def muon(name, w, g, n, kept):
    if name not in MATRICES:
        return adam(g, n, kept)
    kept["m"] = 0.95 * kept.get("m", 0) + 0.05 * g
    x = 0.95 * kept["m"] / (1 - 0.95 ** (n + 1)) + 0.05 * g / (1 - 0.95**n)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


@pytest.mark.parametrize("direction", [adamw, lion, adafactor, muon])
def test_three_steps_of_every_optimiser(direction, monkeypatch):
    """Each layer, expert and stacked vector goes its own way, as if it were alone.

    The gradients are clipped in the first step alone; the rate warms up and decays; all but norms and biases
    shrink.
    """
    monkeypatch.setattr("rlhf_jax.optim.FACTORED_FROM", 4)
    name = direction.__name__
    cfg = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.3, warmup_steps=2, schedule="linear")
    optimizer = make_optimizer(cfg, num_steps=4)
    params = random_tree(0, 0.5)
    state, blocks, kept = optimizer.init(params), blocks_of(params), {}
    step = jax.jit(optimizer.update)
    for n, rate in enumerate([0.05, 0.1, 0.1], start=1):
        gradients = random_tree(n, 1.0 if n == 1 else 0.01)
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(gradients)))
        assert (norm > 1) == (n == 1)
        for leaf, parts in blocks_of(gradients).items():
            for i, g in enumerate(parts):
                w, of_block = blocks[leaf][i], kept.setdefault((leaf, i), {})
                decay = 0 if leaf in ("scale", "q_bias") else 0.3
                blocks[leaf][i] = w - rate * (direction(leaf, w, g / max(1, norm), n, of_block) + decay * w)
        for leaf, found in blocks_of(params).items():
            np.testing.assert_allclose(found, blocks[leaf], rtol=2e-5, atol=2e-6, err_msg=leaf)


def test_muon_s_update_of_each_matrix_is_nearly_orthogonal():
    """Singular values of one layer, expert and head arrangement lie around 1, and its rms is near 0.2."""
    optimizer = make_optimizer(OptimizerConfig(name="muon", learning_rate=1.0), num_steps=1)
    params = random_tree(0, 0.5)
    updates, _ = jax.jit(optimizer.update)(random_tree(1, 1.0), optimizer.init(params), params)
    for name, parts in blocks_of(updates).items():
        for part in parts if name in MATRICES else ():
            values = np.linalg.svd(part, compute_uv=False) / (0.2 * np.sqrt(max(part.shape)))
            assert values.min() > 0.5 and values.max() < 1.3, name
            assert np.sqrt(np.mean(part**2)) == pytest.approx(0.2, rel=0.3)


def test_muon_knows_both_factors_of_every_adapter_as_matrices():
    """Of the model's own names: inputs and heads are one dimension, and layers are apart."""
    adapter = tiny.model(tiny.stage("sft", "lora")).shapes["adapter"]
    assert set(jax.tree.leaves(_kinds(adapter))) == {"matrix"}
    shapes = jax.tree.map_with_path(_matrix_shape, adapter)["layers"]
    assert shapes["attention"]["o_adapter"] == {"a": (2, 32, 3), "b": (2, 3, 32)}
    assert shapes["attention"]["k_adapter"] == {"a": (2, 32, 3), "b": (2, 3, 16)}
    assert shapes["mlp"]["down_adapter"] == {"a": (2, 48, 3), "b": (2, 3, 32)}


@pytest.mark.parametrize("name, betas", [("adamw", (0.9, 0.999)), ("lion", (0.9, 0.99))])
def test_betas_that_are_left_open_are_the_optimiser_s_own(name, betas):
    open_, given = (
        make_optimizer(OptimizerConfig(name=name, **options), num_steps=5)
        for options in ({}, {"beta1": betas[0], "beta2": betas[1]})
    )
    gradients, params = random_tree(1, 0.1), random_tree(0, 0.5)
    states = [of.update(gradients, of.init(params), params)[1] for of in (open_, given)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_state_has_float32_moments_and_no_weak_types(schedule, name):
    cfg = OptimizerConfig(name=name, schedule=schedule, warmup_steps=1, weight_decay=0.1)
    optimizer = make_optimizer(cfg, num_steps=10, learning_rate=1e-4)
    params = random_tree(0, 0.5)

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
