"""The update on a toy problem: accumulation, clipping, skipping, the order of minibatches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from rlhf_jax.algos.algorithm import Algorithm, Term
from rlhf_jax.models.forward import Forward
from rlhf_jax.ops.masking import keep, masked
from rlhf_jax.step import init_state, make_update, split_rows


class Points(NamedTuple):
    x: Array  # f32[B]
    mask: Array  # bool[B]


def square_loss(forward, params, frozen, batch, settings):
    """Mean over the masked points of (w x - 1)^2, and a second term with another weight."""
    w = forward.scores(params, frozen, batch)
    first = masked(jnp.square(w * keep(batch.x, batch.mask) - 1), batch.mask)
    second = masked(jnp.square(w), jnp.ones_like(batch.mask))
    return {"first": Term(first), "second": Term(second, 0.5)}, {"w": masked(w, batch.mask)}


FORWARD = Forward(
    logprobs=None,
    ref_logprobs=None,
    values=None,
    scores=lambda p, f, b: p["policy"]["w"] * jnp.ones(b.x.shape),
    policy_and_value=None,
    score_all=None,
)
ALGORITHM = Algorithm(trains=("policy",), reports=(), figures=(), loss=square_loss)


@pytest.fixture
def forward(monkeypatch):
    blank = FORWARD._replace(scores=lambda p, f, b: jnp.zeros(b.x.shape))
    monkeypatch.setattr("rlhf_jax.step.blank_forward", lambda: blank)
    return FORWARD


def batch(n=8):
    rng = np.random.default_rng(0)
    return Points(jnp.asarray(rng.normal(size=n), jnp.float32), jnp.asarray(np.arange(n) % 3 != 0))


def run(forward, points, optimizer=None, stored=None, **plan):
    optimizers = {"policy": optimizer or optax.sgd(0.1)}
    state = init_state({"policy": {"w": jnp.float32(0.7)}}, optimizers, {}, **(stored or {}))
    return make_update(ALGORITHM, forward, optimizers, None, **plan)(state, {}, points, jax.random.key(0))


def test_one_step_is_the_gradient_of_the_masked_means(forward):
    points = batch()
    state, metrics = run(forward, points)
    x = np.asarray(points.x)[np.asarray(points.mask)]
    gradient = np.mean(2 * (0.7 * x - 1) * x) + 0.5 * 2 * 0.7
    assert float(state.params["policy"]["w"]) == pytest.approx(0.7 - 0.1 * gradient, rel=1e-5)
    assert float(metrics["policy/grad_norm"].value) == pytest.approx(abs(gradient), rel=1e-5)
    assert state.step == 1


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_microbatches_change_nothing(forward, parts):
    """Their masks have different weights: a mean of means would differ."""
    whole, whole_metrics = run(forward, batch())
    split, split_metrics = run(forward, batch(), num_microbatches=parts)
    assert float(split.params["policy"]["w"]) == pytest.approx(float(whole.params["policy"]["w"]), rel=1e-6)
    expected = float(whole_metrics["loss/first"].value)
    assert float(split_metrics["loss/first"].value) == pytest.approx(expected, rel=1e-6)


def test_every_row_is_used_once_in_each_epoch(forward):
    points = batch()._replace(mask=jnp.ones(8, bool))
    _, metrics = run(forward, points, optax.sgd(0.0), num_epochs=3, num_minibatches=4)
    assert metrics["w"].weight == 24
    expected = np.mean((0.7 * np.asarray(points.x) - 1) ** 2)
    assert float(metrics["loss/first"].value) == pytest.approx(float(expected), rel=1e-5)


def test_rows_of_a_unit_are_in_one_minibatch(forward):
    """The sum of a minibatch of pairs x, -x is 0 where none is parted."""

    def told(forward, params, frozen, batch, settings):
        w = forward.scores(params, frozen, batch)
        pair = jnp.abs(jnp.sum(batch.x))
        return {"first": Term(masked(w, batch.mask))}, {"gap": masked(pair, jnp.ones((), bool))}

    points = Points(jnp.float32([1, -1, 2, -2, 4, -4, 8, -8]), jnp.ones(8, bool))
    optimizers = {"policy": optax.sgd(0.0)}
    state = init_state({"policy": {"w": jnp.float32(0.7)}}, optimizers, {})
    algorithm = ALGORITHM._replace(loss=told)
    update = make_update(
        algorithm, forward, optimizers, None, num_epochs=3, num_minibatches=4, rows_per_unit=2
    )
    _, metrics = update(state, {}, points, jax.random.key(0))
    assert metrics["gap"].value == 0


def test_a_step_that_is_not_finite_is_skipped_and_counted(forward):
    points = batch()
    bad = points._replace(x=points.x.at[1].set(jnp.inf))
    state, metrics = run(forward, bad, optax.adam(0.1))
    assert state.params["policy"]["w"] == jnp.float32(0.7)
    assert state.opt_state["policy"][0].count == 0
    assert metrics["update/skipped"].total == 1
    assert metrics["not_finite/loss/first"].value == 1
    assert metrics["not_finite/loss/second"].value == 0


def test_a_masked_value_that_is_not_finite_is_no_reason_to_skip(forward):
    points = batch()
    bad = points._replace(x=points.x.at[0].set(jnp.nan))
    state, metrics = run(forward, bad)
    expected, _ = run(forward, points)
    assert metrics["update/skipped"].total == 0
    assert state.params["policy"]["w"] == expected.params["policy"]["w"]


BFLOAT16 = {"param_dtype": "bfloat16", "state_dtype": "bfloat16"}


@pytest.mark.parametrize("rounding", [True, False])
def test_a_skipped_step_changes_no_bit_of_what_is_bfloat16(forward, rounding):
    points = batch()
    bad = points._replace(x=points.x.at[1].set(jnp.inf))
    old, _ = run(forward, points, optax.adam(0.1), BFLOAT16, num_epochs=3, num_minibatches=1)
    update = make_update(ALGORITHM, forward, {"policy": optax.adam(0.1)}, None, stochastic_rounding=rounding)
    new, metrics = update(old, {}, bad, jax.random.key(5))
    assert metrics["update/skipped"].total == 1
    for a, b in zip(jax.tree.leaves(old[2:4]), jax.tree.leaves(new[2:4]), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert {x.dtype for x in jax.tree.leaves(new[2:4])} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}


class Places(NamedTuple):
    index: Array  # i32[B]


@pytest.mark.parametrize("max_kl, num_moved", [(3.0, 4), (4.0, 6), (0.5, 2), (7.9, 8), (8.0, 8), (0.0, 8)])
def test_no_step_is_made_behind_a_minibatch_whose_kl_is_too_large(max_kl, num_moved):
    """Each point moves a weight of its own; the KL is the number of those that have moved before the step."""

    def loss(forward, params, frozen, batch, settings):
        w, all_of_them = params["policy"]["w"], jnp.ones(batch.index.shape, bool)
        num_moved = jnp.full(batch.index.shape, jnp.sum(w != 0), jnp.float32)
        kl = masked(num_moved, all_of_them)
        return {"down": Term(masked(w[batch.index], all_of_them))}, {"policy/approx_kl": kl}

    optimizers = {"policy": optax.adam(0.1)}
    algorithm = ALGORITHM._replace(loss=loss)
    plan = {"num_epochs": 2, "num_minibatches": 4, "max_kl": max_kl}
    state = init_state({"policy": {"w": jnp.zeros(8)}}, optimizers, {})
    update = make_update(algorithm, FORWARD, optimizers, None, **plan)
    state, metrics = update(state, {}, Places(jnp.arange(8)), jax.random.key(0))
    # The KL is 0, 2, 4, 6 in the first pass, 8 in the second.
    num_steps = num_moved // 2 if max_kl and max_kl < 8 else 8
    assert np.count_nonzero(state.params["policy"]["w"]) == num_moved
    assert state.opt_state["policy"][0].count == num_steps
    assert metrics["update/skipped"].total == 0
    if max_kl:
        assert metrics["update/stopped"].value == 1 - num_steps / 8
        num_seen = min(num_steps + 1, 8)  # that of the minibatch which stopped the others is told
        assert metrics["policy/approx_kl"].weight == 2 * num_seen
        kls = [0, 2, 4, 6, 8, 8, 8, 8]
        assert metrics["policy/approx_kl"].value == np.mean(kls[:num_seen])


class Drift(NamedTuple):
    x: Array


def drift(num_steps, **options):
    """Returns a thousand weights that went down from 1 by 1e-4 a step; bfloat16's own step there is 2^-8."""

    def loss(forward, params, frozen, batch, settings):
        total = jnp.sum(params["policy"]["w"].astype(jnp.float32))
        return {"down": Term(masked(total * batch.x, batch.x > 0))}, {}

    algorithm = ALGORITHM._replace(loss=loss)
    optimizers = {"policy": optax.sgd(1e-4)}
    state = init_state({"policy": {"w": jnp.ones(1000)}}, optimizers, {}, param_dtype="bfloat16")
    update = make_update(
        algorithm, FORWARD, optimizers, None, num_epochs=num_steps, num_minibatches=1, **options
    )
    state, _ = jax.jit(update)(state, {}, Drift(jnp.ones(2)), jax.random.key(0))
    return np.float64(state.params["policy"]["w"])


def test_small_updates_are_lost_to_the_nearest_number_and_kept_by_chance():
    assert np.all(drift(1000, stochastic_rounding=False) == 1.0)
    rounded = drift(1000)
    assert np.mean(rounded) == pytest.approx(0.9, abs=4 * np.std(rounded) / np.sqrt(rounded.size))
    assert 0.005 < np.std(rounded) < 0.05  # each weight has its own chances
    np.testing.assert_array_equal(rounded, drift(1000))


def test_gradients_of_bfloat16_parameters_are_summed_in_float32(forward):
    """Four microbatches whose gradients are 1 and then three of 2^-9: in bfloat16 the sum would stay at 1."""

    def loss(forward, params, frozen, batch, settings):
        return {"sum": Term(masked(params["policy"]["w"] * batch.x, batch.x > 0), 4.0)}, {}

    algorithm = ALGORITHM._replace(loss=loss)
    optimizers = {"policy": optax.sgd(1.0, momentum=0.5)}
    state = init_state({"policy": {"w": jnp.float32(0)}}, optimizers, {}, param_dtype="bfloat16")
    update = make_update(algorithm, FORWARD, optimizers, None, num_microbatches=4)
    state, metrics = update(state, {}, Drift(jnp.float32([1, 2**-9, 2**-9, 2**-9])), jax.random.key(0))
    assert state.opt_state["policy"][0].trace["w"] == 1 + 3 * 2**-9
    assert metrics["policy/grad_norm"].value == 1 + 3 * 2**-9


def test_rows_of_a_record_stay_together():
    parts = split_rows(jnp.arange(12), 3, rows_per_unit=2)
    assert parts.shape == (3, 4)
    for part in parts.tolist():
        assert [part[1] - part[0], part[3] - part[2]] == [1, 1] and part[0] % 2 == 0
    assert sorted(np.asarray(parts).ravel()) == list(range(12))
