"""Metrics of a rollout against plain numpy, and the optimisers that an algorithm asks for."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Rollout, Rows, Scored
from rlhf_jax.metrics import to_host
from rlhf_jax.programs import optimizers_of
from rlhf_jax.scoring import rollout_metrics, score_metrics
from tests import tiny

PROMPT_LENGTHS = np.array([2, 1, 3, 1, 2, 0])
LENGTHS = np.array([6, 4, 5, 9, 3, 0])  # the last row only fills up the batch
ENDED = np.array([True, False, True, True, False, True])
POISON = 1e6


def rollout_of(counted):
    """Returns a scored rollout with garbage in every slot that does not count, and the mask of the rest."""
    rng = np.random.default_rng(0)
    columns = np.arange(10)
    mask = (columns >= PROMPT_LENGTHS[:, None]) & (columns < LENGTHS[:, None]) & counted[:, None]

    def logprobs(garbage):
        return np.where(mask, -rng.uniform(0.5, 3, mask.shape), garbage).astype(np.float32)

    old, ref, sampler = logprobs(POISON), logprobs(-POISON), logprobs(3 * POISON)
    scores = np.where(counted, rng.normal(size=6), POISON).astype(np.float32)
    rows = Rows(jnp.zeros(mask.shape, jnp.int32), jnp.asarray(PROMPT_LENGTHS), jnp.asarray(LENGTHS))
    rollout = Rollout(rows, jnp.asarray(ENDED), jnp.asarray(sampler))
    values = jnp.full(mask.shape, POISON)
    return Scored(rollout, jnp.asarray(old), jnp.asarray(ref), values, jnp.asarray(scores)), mask


@pytest.mark.parametrize("counted", [LENGTHS > 0, (LENGTHS > 0) & ENDED], ids=["real rows", "ended rows"])
def test_metrics_are_of_the_rows_that_count(counted):
    """NUMERICS 4, 7, 14; the share that ended is of all real rows."""
    scored, mask = rollout_of(counted)
    old, ref = np.asarray(scored.old_logprobs)[mask], np.asarray(scored.ref_logprobs)[mask]
    sampler = np.asarray(scored.rollout.sampler_logprobs)[mask]
    scores, lengths = np.asarray(scored.scores)[counted], (LENGTHS - PROMPT_LENGTHS)[counted]
    expected = {
        "policy/kl": np.sum(old - ref) / np.sum(counted),
        "policy/kl_per_token": np.mean(old - ref),
        "policy/nll": -np.mean(old),
        "policy/ref_nll": -np.mean(ref),
        "policy/sampler_gap": np.mean(np.abs(sampler - old)),
        "policy/sampler_gap_max": np.max(np.abs(sampler - old)),
        "policy/sampler_ratio": np.mean(np.exp(old - sampler)),
        "rollout/length": np.mean(lengths),
        "rollout/eos_rate": 3 / 5,
        "perf/tokens": 4 + 3 + 2 + 8 + 1,
        "reward/score": np.mean(scores),
        "reward/score_std": np.std(scores),
        "reward/length_correlation": np.corrcoef(scores, lengths)[0, 1],
    }
    counted = jnp.asarray(counted)
    found = to_host(rollout_metrics(scored, counted) | score_metrics(scored, counted))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def first_step(name, role, gradient, **settings):
    """Returns how far a parameter goes in the first step of a role's optimiser; its rate is 1e-3."""
    optimizer = optimizers_of(tiny.stage(name, settings=settings), ALGORITHMS[name])[role]
    params = {"kernel": jnp.float32(1.0)}
    updates, _ = optimizer.update({"kernel": jnp.float32(gradient)}, optimizer.init(params), params)
    return float(updates["kernel"])


@pytest.mark.parametrize(
    "name, role, eps",
    [
        ("ppo", "policy", 1e-5),
        ("ppo", "value", 1e-5),
        ("sft", "policy", 1e-8),
        ("reward_model", "reward", 1e-8),
    ],
)
def test_adams_epsilon(name, role, eps):
    """NUMERICS 30: a first step is lr g / (|g| + eps), half of lr where g is eps."""
    assert first_step(name, role, eps) == pytest.approx(-1e-3 / 2, rel=1e-4)


def test_the_value_model_may_have_its_own_learning_rate():
    assert first_step("ppo", "value", 0.5) == pytest.approx(-1e-3, rel=1e-4)
    assert first_step("ppo", "value", 0.5, value_learning_rate=4e-3) == pytest.approx(-4e-3, rel=1e-4)
    assert first_step("ppo", "policy", 0.5, value_learning_rate=4e-3) == pytest.approx(-1e-3, rel=1e-4)
