"""Ranking losses: by hand, and against loops written from the papers' equations in float64."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops import ranking

N, K = 6, 5


def ragged(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores, ratings with ties, and the mask of lists of 0 to K completions; NaN where is none."""
    rng = np.random.default_rng(seed)
    counts = np.array([K, 0, 1, 2, 3, K])
    mask = np.arange(K) < counts[:, None]
    scale = np.array([1.0, 1.0, 1.0, 300.0, 3.0, 40.0])[:, None]
    scores = np.where(mask, scale * rng.normal(size=(N, K)), np.nan).astype(np.float32)
    ratings = np.where(mask, rng.integers(0, 3, (N, K)), np.nan).astype(np.float32)
    return scores, ratings, mask


def order_of(ratings, mask):
    """Returns bool[N, K, K]: all pairs that ratings tell apart."""
    return (ratings[:, :, None] > ratings[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def judged(ratings: np.ndarray, mask: np.ndarray, seed: int) -> np.ndarray:
    """Returns bool[N, K, K]: some of the pairs that ratings tell apart."""
    better = np.asarray(order_of(ratings, mask))
    return better & (np.random.default_rng(seed).random(better.shape) < 0.8)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def loops(scores: np.ndarray, ratings: np.ndarray, better: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Returns every loss by plain loops over completions."""
    of_lists: dict[str, list[float]] = {
        name: []
        for name in (
            "bradley_terry",
            "hinge",
            "info_nce",
            "plackett_luce",
            "partial_plackett_luce",
            "centering",
        )
    }
    errors = []
    for n in range(N):
        here = [k for k in range(K) if mask[n, k]]
        s = {k: float(scores[n, k]) for k in here}
        y = {k: float(ratings[n, k]) for k in here}
        pairs = [(i, j) for i in here for j in here if better[n, i, j]]
        errors += [(s[k] - y[k]) ** 2 for k in here]
        if pairs:
            margins = {(i, j): 0.3 + y[i] - y[j] for i, j in pairs}
            of_lists["bradley_terry"].append(
                mean(
                    [
                        -0.9 * log_sigmoid(s[i] - s[j] - margins[i, j])
                        - 0.1 * log_sigmoid(s[j] - s[i] - margins[i, j])
                        for i, j in pairs
                    ]
                )
            )
            of_lists["hinge"].append(mean([max(0.0, margins[i, j] - s[i] + s[j]) for i, j in pairs]))
            of_lists["partial_plackett_luce"].append(
                sum(log_sum_exp([s[i], *(s[j] for i_, j in pairs if i_ == i)]) - s[i] for i in here)
            )
            best = {i for i, _ in pairs} - {j for _, j in pairs}
            of_lists["info_nce"].append(
                mean([log_sum_exp([s[i], *(s[j] for i_, j in pairs if i_ == i)]) - s[i] for i in best])
            )
        if len(here) > 1:
            of_lists["plackett_luce"].append(
                sum(log_sum_exp([s[j] for j in here if y[j] <= y[i]]) - s[i] for i in here)
            )
            of_lists["centering"].append(
                mean([(s[i] + s[j]) ** 2 for i, j in itertools.combinations(here, 2)])
            )
    return {name: mean(values) for name, values in of_lists.items()} | {"squared_error": mean(errors)}


def losses(scores, ratings, better, mask):
    """Returns the same by the functions under test."""
    gap, margin = ranking.gaps(scores, better), 0.3 + ranking.gaps(ratings, better)
    return {
        "bradley_terry": ranking.over_pairs(ranking.bradley_terry(gap, margin, 0.1), better),
        "hinge": ranking.over_pairs(ranking.hinge(gap, margin), better),
        "info_nce": ranking.info_nce(scores, better, mask),
        "plackett_luce": ranking.plackett_luce(scores, ratings, order_of(ratings, mask), mask),
        "partial_plackett_luce": ranking.plackett_luce(scores, jnp.full_like(ratings, jnp.nan), better, mask),
        "centering": ranking.centering(scores, mask),
        "squared_error": ranking.squared_error(scores, ratings, mask),
    }


@jax.jit
def values_and_gradients(scores, ratings, better, mask):
    values = {name: mean.value for name, mean in losses(scores, ratings, better, mask).items()}
    gradients = jax.jacrev(
        lambda scores: {name: mean.value for name, mean in losses(scores, ratings, better, mask).items()}
    )(scores)
    return values, gradients


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_the_papers(seed):
    scores, ratings, mask = ragged(seed)
    better = judged(ratings, mask, seed)
    values, gradients = values_and_gradients(scores, ratings, better, mask)
    expected = loops(scores, ratings, better, mask)
    slopes = {name: np.zeros((N, K)) for name in expected}
    for n, k in np.argwhere(mask):
        step = 1e-4
        ahead, behind = (np.array(scores, np.float64) for _ in range(2))
        ahead[n, k] += step
        behind[n, k] -= step
        up, down = loops(ahead, ratings, better, mask), loops(behind, ratings, better, mask)
        for name in expected:
            slopes[name][n, k] = (up[name] - down[name]) / (2 * step)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        error = np.linalg.norm(gradients[name] - slopes[name])
        assert error <= 1e-5 * np.linalg.norm(slopes[name]), name
        assert np.all(gradients[name][~mask] == 0), name


def of_lists(*scores: list[float]) -> tuple[jax.Array, jax.Array]:
    found = jnp.asarray(scores)
    return found, jnp.ones(found.shape, bool)


def order(ratings: list[float]) -> jax.Array:
    found = jnp.asarray([ratings])
    return found[:, :, None] > found[:, None, :]


def test_bradley_terry_by_hand():
    loss = ranking.bradley_terry(jnp.asarray([0.0, 1.0]), margin=1.0)
    np.testing.assert_allclose(loss, [math.log1p(math.e), math.log(2)], rtol=1e-6)
    smooth = ranking.bradley_terry(jnp.asarray(0.0), label_smoothing=0.25)
    assert smooth == pytest.approx(math.log(2))  # the same both ways round
    assert jax.grad(ranking.bradley_terry)(0.0, 0.0, 0.25) == pytest.approx(-0.75 * 0.5 + 0.25 * 0.5)


@pytest.mark.parametrize(
    "gap, loss, slope",
    [
        (1.5, 0.0, 0.0),  # ahead by enough
        (0.5, 0.5, -1.0),
        (-2.0, 3.0, -1.0),  # no more push, however far behind
    ],
)
def test_hinge_by_hand(gap, loss, slope):
    assert ranking.hinge(gap, 1.0) == loss
    assert jax.grad(ranking.hinge)(gap, 1.0) == slope


def test_pairs_of_a_list_share_its_weight():
    better = jnp.stack([order([2.0, 1.0, 0.0])[0], order([0.0, 1.0, 1.0])[0], order([0.0, 0.0, 0.0])[0]])
    of_pairs = jnp.asarray([1.0, 7.0, 1000.0])[:, None, None] * jnp.ones((3, 3, 3))
    found = ranking.over_pairs(of_pairs, better)
    assert found.weight == 2 and found.total == 8  # three pairs, two pairs, a list of ties


def test_info_nce_by_hand():
    scores, mask = of_lists([math.log(3.0), 0.0, math.log(2.0)])
    assert ranking.info_nce(scores, order([1.0, 0.0, 0.0]), mask).value == pytest.approx(math.log(2.0))
    # Two are best: each against the third alone.
    tied = (math.log((3 + 2) / 3) + math.log((1 + 2) / 1)) / 2
    assert ranking.info_nce(scores, order([1.0, 1.0, 0.0]), mask).value == pytest.approx(tied)


def test_info_nce_of_two_is_bradley_terry():
    scores, mask = of_lists([0.3, -1.1])
    better = order([1.0, 0.0])
    pair = ranking.over_pairs(ranking.bradley_terry(ranking.gaps(scores, better)), better)
    assert ranking.info_nce(scores, better, mask).value == pytest.approx(pair.value)
    found = ranking.plackett_luce(scores, jnp.asarray([[1.0, 0.0]]), better, mask)
    assert found.value == pytest.approx(pair.value)


@pytest.mark.parametrize(
    "ratings, loss",
    [
        ([2.0, 1.0, 0.0], math.log(6 / 3) + math.log(3 / 2)),
        ([5.0, 5.0, -1.0], math.log(6 / 3) + math.log(6 / 2)),  # both among all three: Breslow
        ([1.0, 0.0, 0.0], math.log(6 / 3) + math.log(3 / 2) + math.log(3 / 1)),  # a tie at the end
    ],
)
def test_plackett_luce_by_hand(ratings, loss):
    scores, mask = of_lists([math.log(3.0), math.log(2.0), 0.0])
    found = ranking.plackett_luce(scores, jnp.asarray([ratings]), order(ratings), mask)
    assert found.value == pytest.approx(loss)


@pytest.mark.parametrize(
    "pairs, loss",
    [
        ([(0, 1), (0, 2), (1, 2)], math.log(6 / 3) + math.log(3 / 2)),  # a whole order
        ([(0, 1), (0, 2)], math.log(6 / 3)),  # of its first one alone
        ([(0, 2), (1, 2)], math.log(4 / 3) + math.log(3 / 2)),  # the first two were not compared: no tie
        ([(0, 1), (1, 0)], math.log(5 / 3) + math.log(5 / 2)),  # judged both ways: both count
    ],
)
def test_plackett_luce_of_pairs_by_hand(pairs, loss):
    scores, mask = of_lists([math.log(3.0), math.log(2.0), 0.0])
    better = jnp.zeros((1, 3, 3), bool).at[(0, *zip(*pairs, strict=True))].set(True)
    found = ranking.plackett_luce(scores, jnp.full((1, 3), jnp.nan), better, mask)
    assert found.value == pytest.approx(loss)


def test_a_list_of_which_nothing_is_said_has_no_weight_in_plackett_luce():
    scores, mask = of_lists([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    mask = mask.at[2, 1].set(False)
    ratings = jnp.asarray([[jnp.nan, jnp.nan], [1.0, 1.0], [1.0, 1.0]])
    assert ranking.plackett_luce(scores, ratings, jnp.zeros((3, 2, 2), bool), mask).weight == 1


def test_a_ranking_of_ties_draws_scores_together():
    mask = jnp.ones((1, 2), bool)
    better = jnp.zeros((1, 2, 2), bool)
    gradient = jax.grad(lambda scores: ranking.plackett_luce(scores, jnp.zeros((1, 2)), better, mask).value)
    np.testing.assert_allclose(gradient(jnp.asarray([[1.0, 1.0]])), [[0.0, 0.0]], atol=1e-7)
    found = gradient(jnp.asarray([[2.0, 1.0]]))
    assert found[0, 0] > 0 > found[0, 1]


def test_centering_by_hand():
    scores, mask = of_lists([1.0, 2.0, -1.0])
    assert ranking.centering(scores, mask).value == pytest.approx((9 + 0 + 1) / 3)
    assert ranking.centering(scores, mask.at[0, 2].set(False)).value == 9


def test_equal_scores_count_one_half():
    scores = jnp.asarray([[1.0, 1.0, 0.0]])
    found = ranking.pair_accuracy(scores, order([2.0, 1.0, 3.0]))
    assert found.weight == 3 and found.value == pytest.approx((0.5 + 0 + 0) / 3)
