"""Reward losses on pairs against TRL's RewardTrainer: margins, centring, extreme scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import ranking
from tests.parity.make_reward_golden import COEFFICIENTS, GOLDEN, NUM_BATCHES, NUM_PAIRS, batch

BETTER = jnp.broadcast_to(jnp.asarray([[False, True], [False, False]]), (NUM_PAIRS, 2, 2))


@pytest.mark.parametrize("number", range(NUM_BATCHES))
@pytest.mark.parametrize("has_margin", [False, True])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_pairs_are_as_in_trl(number, has_margin, name):
    chosen, rejected, margins = batch(number)
    margin = margins[:, None, None] if has_margin else 0.0

    def loss(pairs):
        of_pairs = ranking.bradley_terry(ranking.gaps(pairs, BETTER), margin)
        total = ranking.over_pairs(of_pairs, BETTER).value
        centred = ranking.centering(pairs, jnp.ones_like(pairs, bool)).value
        return total + (COEFFICIENTS[name] or 0.0) * centred

    pairs = jnp.stack([chosen, rejected], axis=1)
    value, gradient = jax.value_and_grad(loss)(pairs)
    with np.load(GOLDEN) as golden:
        theirs, accuracy, *of_scores = golden[
            f"{number}/{'margin' if has_margin else 'none'}/{name}"
        ].tolist()
    assert value == pytest.approx(theirs, rel=1e-5)
    assert np.linalg.norm(gradient.T.ravel() - np.asarray(of_scores)) <= 1e-5 * np.linalg.norm(of_scores)
    ties_count_half = 0.5 * np.mean(chosen == rejected)  # theirs count as wrong
    assert ranking.pair_accuracy(pairs, BETTER).value == pytest.approx(accuracy + ties_count_half, rel=1e-6)
