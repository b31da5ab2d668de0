"""What is made of a rollout before the update, by the compiled programs: NUMERICS 3, 7, 13, 20.

The rows differ in length, two completions have no EOS and are left out, and the last row is a filling.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import Rollout
from rlhf_jax.metrics import to_host
from rlhf_jax.sharding import place_rows
from tests import tiny

SETTINGS = {"missing_eos": "mask", "whiten_rewards": True}
ENDED = np.array([True, False, True, True, False, True, True, True])
REAL = np.arange(8) < 7


def rollout_of_seven():
    rows = tiny.rows()
    filled = [jnp.where(REAL, lengths, 0) for lengths in (rows.prompt_lengths, rows.lengths)]
    sampler_logprobs = np.random.default_rng(1).normal(-4, 0.1, rows.tokens.shape)
    return Rollout(rows._replace(prompt_lengths=filled[0], lengths=filled[1]), ENDED, sampler_logprobs)


@functools.cache
def programs_of(mesh):
    return tiny.programs(tiny.stage("ppo", settings=SETTINGS, rollout={"temperature": 0.7}), mesh)


def experience(mesh, rollout, is_reference=False):
    """Returns the scored rollout, the batch and the metrics of both, on the host."""
    programs = programs_of(mesh)
    trained, frozen = tiny.roles("ppo", mesh)
    if is_reference:
        trained["policy"] = frozen["reference"]
    scored, metrics = programs.score(trained, frozen, place_rows(mesh, jax.tree.map(jnp.asarray, rollout)))
    batch, more = programs.advantages(scored, {"kl_coef": jnp.float32(0.3)})
    return jax.device_get(scored), jax.device_get(batch), to_host(metrics | more)


@pytest.fixture(scope="module")
def alone():
    """On one device."""
    return experience(tiny.mesh(), rollout_of_seven())


@pytest.mark.parametrize("sizes", tiny.MESHES, ids=str)
def test_devices_change_nothing(alone, sizes):
    scored, batch, metrics = experience(tiny.mesh(**sizes), rollout_of_seven())
    expected_scored, expected_batch, expected_metrics = alone
    scored, expected_scored = (x._replace(scores=x.scores[REAL]) for x in (scored, expected_scored))
    for found, expected in ((scored, expected_scored), (batch, expected_batch)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)


def test_advantages_are_white_over_the_whole_batch(alone):
    _, batch, _ = alone
    valid = batch.advantages[batch.completion_mask]
    assert valid.mean() == pytest.approx(0, abs=1e-5)
    assert valid.std() == pytest.approx(1, abs=1e-4)


def test_rows_without_eos_leave_the_metrics(alone):
    """With missing_eos: mask; the share that ended is still of all real rows."""
    scored, _, metrics = alone
    rows, counted = scored.rollout.rows, ENDED & REAL
    mask = rows.completion_mask & counted[:, None]
    gap = np.where(mask, scored.old_logprobs - scored.ref_logprobs, 0)
    assert metrics["policy/kl"] == pytest.approx(gap.sum() / counted.sum(), rel=1e-5)
    assert metrics["rollout/length"] == pytest.approx(mask.sum() / counted.sum())
    assert metrics["reward/score"] == pytest.approx(scored.scores[counted].mean(), rel=1e-5)
    assert metrics["reward/score_std"] == pytest.approx(scored.scores[counted].std(), rel=1e-5)
    assert metrics["rollout/eos_rate"] == pytest.approx(5 / 7)


def test_a_policy_that_is_its_reference_has_no_kl(alone):
    """At a temperature that is not 1."""
    scored, _, metrics = experience(tiny.mesh(), rollout_of_seven(), is_reference=True)
    np.testing.assert_array_equal(scored.old_logprobs, scored.ref_logprobs)
    assert metrics["policy/kl"] == metrics["policy/kl_per_token"] == 0
    assert abs(alone[2]["policy/kl"]) > 0.01
