"""Several completions in a row, and rows of the least width that holds them, change no number: NUMERICS 3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import Rollout, Rows
from rlhf_jax.metrics import to_host
from rlhf_jax.ops.packed_rows import RowLayout
from tests import tiny
from tests.contract.test_algorithms import GRADIENT, VALUE, assert_same, policy_batch, updated

LAYOUTS = [
    {"sequences_per_row": 2, "length_buckets": 3},
    {"sequences_per_row": 1, "length_buckets": 4},
    {"sequences_per_row": 8, "length_buckets": 8},
]


def batch_of(most: int, filling: int = 0):
    """Returns a batch with completions of up to so many tokens; in every slot behind them is poison."""
    rows = tiny.rows()
    lengths = jnp.minimum(rows.lengths, rows.prompt_lengths + most)
    lengths = jnp.where(jnp.arange(8) < 8 - filling, lengths, 0)
    rows = Rows(rows.tokens, jnp.where(lengths > 0, rows.prompt_lengths, 0), lengths)
    batch = policy_batch(rows)
    kept = batch.completion_mask
    fields = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    return batch._replace(**{field: jnp.where(kept, getattr(batch, field), 1e6) for field in fields})


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("most", [2, 8])
def test_gradient_and_metrics_are_those_of_rows_of_one_sequence(layout, most):
    batch = batch_of(most)
    assert_same(updated("ppo", batch, **layout), updated("ppo", batch))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["trunk", "hydra"])
def test_roles_that_share(sharing):
    batch = batch_of(8)
    layout = {"sequences_per_row": 2, "length_buckets": 3}
    assert_same(updated(f"ppo:{sharing}", batch, **layout), updated(f"ppo:{sharing}", batch))


@pytest.mark.slow
def test_demonstrations_have_rows_of_their_own():
    batch = batch_of(2)._replace(ptx=tiny.rows(8, 20, seed=3))
    layout = {"sequences_per_row": 2, "length_buckets": 2, "microbatch_size": 2}
    assert_same(updated("grpo:ptx", batch, **layout), updated("grpo:ptx", batch))


@pytest.mark.slow
def test_a_teacher_reads_the_rows_of_its_pupil():
    rows = batch_of(2, filling=3).rows
    layout = {"sequences_per_row": 2, "length_buckets": 2, "microbatch_size": 2}
    assert_same(updated("distill", rows, **layout), updated("distill", rows))


@pytest.mark.slow
def test_microbatches_of_packed_rows():
    batch = batch_of(8, filling=3)
    layout = {"sequences_per_row": 2, "length_buckets": 3, "microbatch_size": 2}
    assert_same(updated("ppo", batch, **layout), updated("ppo", batch))


@pytest.mark.slow
def test_devices_change_nothing():
    batch = batch_of(8)
    layout = {"sequences_per_row": 2, "length_buckets": 3}
    assert_same(updated("ppo", batch, tiny.mesh(data=2, fsdp=2, tensor=2), **layout), updated("ppo", batch))


@functools.cache
def programs_of(**settings):
    """Buckets are made for prompts of four tokens."""
    settings = {"num_epochs": 2, "num_minibatches": 2, "missing_eos": "mask"} | settings
    return tiny.programs(tiny.stage("ppo", settings=settings), tiny.mesh(), prompt_length=4)


def iteration(rollout, **settings):
    """Returns what is said of a rollout, the parameters after the update, and all metrics."""
    programs = programs_of(**settings)
    trained, frozen = tiny.roles("ppo", tiny.mesh())
    state = programs.init_state(trained)
    scored, told = programs.score(state.params, frozen, rollout)
    batch, more = programs.advantages(scored, state.aux)
    state, metrics = programs.update(state, frozen, batch, jax.random.key(2))
    return jax.device_get(scored), jax.device_get(state.params), to_host(told | more | metrics)


@pytest.mark.parametrize(
    ("sequences_per_row", "is_short"),
    [(1, True), pytest.param(1, False, marks=pytest.mark.slow), (2, True), (2, False)],
)
def test_an_iteration_with_epochs_and_minibatches(sequences_per_row, is_short):
    """Scores, the same minibatches, the parameters that they lead to, and every metric; rows are left out."""
    rows = tiny.rows()
    if is_short:
        prompt_lengths = jnp.minimum(rows.prompt_lengths, 4)
        completions = jnp.minimum(rows.lengths - rows.prompt_lengths, 3)
        rows = Rows(rows.tokens, prompt_lengths, prompt_lengths + completions)
    planned = RowLayout(
        sequences_per_row=sequences_per_row, length_buckets=2, num_completion=8, prompt_length=4
    )
    width = planned.in_short_rows(rows, lambda at: jnp.int32(at.rung.width))
    assert width == sequences_per_row * (8 if is_short else 16)
    rollout = Rollout(rows, jnp.arange(8) % 3 != 1, jnp.where(rows.completion_mask, -4.0, 1e6))
    found = iteration(rollout, sequences_per_row=sequences_per_row, length_buckets=2)
    expected = iteration(rollout)
    for field in ("old_logprobs", "ref_logprobs", "values", "scores"):
        ours, theirs = getattr(found[0], field), getattr(expected[0], field)
        np.testing.assert_allclose(ours, theirs, atol=VALUE * max(1, np.abs(theirs).max()), err_msg=field)
    assert tiny.relative_difference(found[1], expected[1]) < GRADIENT
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(value, abs=VALUE * max(1, abs(value))), name
