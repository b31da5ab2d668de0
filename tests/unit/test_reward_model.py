"""What the reward model's loss makes of a batch, by hand: pairs, lists, margins, centring, several heads."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.reward_model import evaluate, loss
from rlhf_jax.batch import JudgedRows, Rows
from rlhf_jax.models.forward import blank_forward
from rlhf_jax.offline_config import RewardModelConfig


def rows(num_rows: int, empty: tuple[int, ...] = ()) -> Rows:
    lengths = jnp.asarray([0 if row in empty else 2 for row in range(num_rows)])
    return Rows(jnp.zeros((num_rows, 2), jnp.int32), jnp.minimum(lengths, 1), lengths)


def said(*of_heads: list[float]):
    """Returns a forward whose heads say given scores."""
    scores = jnp.asarray(of_heads)
    return blank_forward()._replace(head_scores=lambda params, frozen, rows: scores)


def losses(forward, batch, **settings):
    terms, metrics = loss(forward, {}, {}, batch, RewardModelConfig(**settings))
    return {name: term.mean for name, term in terms.items()}, metrics


def test_rows_alternate_in_pairs():
    batch = rows(6, empty=(4, 5))
    terms, metrics = losses(said([2.0, 1.0, 0.0, 3.0, 9e9, math.nan]), batch)
    assert terms.keys() == {"bradley_terry"}
    assert terms["bradley_terry"].weight == 2
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2
    assert terms["bradley_terry"].value == pytest.approx(expected, rel=1e-6)
    assert metrics["reward/accuracy"].value == 0.5
    assert metrics["reward/margin"].value == -1.0


def test_equal_scores_count_one_half():
    _, metrics = losses(said([1.0, 1.0, 1.0, 0.0, 0.0, 1.0]), rows(6))
    assert metrics["reward/accuracy"].value == pytest.approx((0.5 + 1 + 0) / 3)


def test_margins_of_the_data_come_on_top():
    better = jnp.asarray([[False, True], [False, False]] * 2)
    batch = JudgedRows(rows(4), jnp.asarray([0.5, 0.0, 2.0, 0.0]), better)
    terms, _ = losses(said([1.0, 0.0, 1.0, 0.0]), batch, loss="hinge", margin=1.0, margin_from_data=True)
    assert terms["hinge"].value == pytest.approx((0.5 + 2.0) / 2)
    terms, _ = losses(said([1.0, 0.0, 1.0, 0.0]), batch, loss="hinge", margin=1.5)
    assert terms["hinge"].value == 0.5


def test_lists_weigh_the_same_and_centring_is_a_term_of_its_own():
    """Three completions in the first record, two in the second; all pairs of a record share its weight."""
    order = np.array([[2.0, 1.0, 0.0], [1.0, 0.0, -1.0]])
    there = np.array([[True, True, True], [True, True, False]])
    better = (order[:, :, None] > order[:, None, :]) & there[:, :, None] & there[:, None, :]
    batch = JudgedRows(rows(6, empty=(5,)), jnp.asarray(order.ravel()), jnp.asarray(better.reshape(6, 3)))
    forward = said([1.0, 0.0, 0.0, 0.0, 2.0, math.nan])
    terms, metrics = losses(forward, batch, all_pairs=True, loss="hinge", margin=1.0, center_coef=0.1)
    assert terms["hinge"] == (pytest.approx((0 + 0 + 1) / 3 + 3), 2)
    assert terms["centering"] == (pytest.approx((1 + 1 + 0) / 3 + 4), 2)
    assert metrics["reward/accuracy"] == (2.5, 4)  # over all pairs alike
    terms, _ = losses(forward, batch, loss="info_nce")
    expected = math.log(1 + 2 * math.exp(-1)) + math.log(1 + math.exp(2))
    assert terms["info_nce"].total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("poison", [1e6, math.nan])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "plackett_luce"},
        {"loss": "hinge", "all_pairs": True, "margin": 1.0, "margin_from_data": True, "center_coef": 0.1},
        {"loss": "regression", "normalizer": "none"},
    ],
)
def test_what_is_said_of_absent_completions_changes_nothing(settings, poison):
    """Neither values nor gradients; ties with an absent one neither."""
    there = jnp.asarray([True, True, True, True, False, False])
    ratings = jnp.asarray([2.0, 1.0, 1.0, 3.0, 0.0, 0.0])
    of = jnp.where(there, ratings, jnp.nan).reshape(2, 3)
    better = (of[:, :, None] > of[:, None, :]).reshape(6, 3)
    params = {"reward": {"score_head": {"bias": jnp.float32(0)}}}

    def value(scores, ratings):
        batch = JudgedRows(rows(6, empty=(4, 5)), ratings, better)
        forward = blank_forward()._replace(head_scores=lambda params, frozen, rows: scores[None])
        terms, _ = loss(forward, params, {}, batch, RewardModelConfig(**settings))
        return sum(term.coef * term.mean.value for term in terms.values())

    scores = jnp.asarray([0.5, 0.1, -0.3, 0.2, 7.0, 8.0])
    expected = jax.value_and_grad(value)(scores, ratings)
    poisoned = jnp.where(there, scores, poison), jnp.where(there, ratings, poison)
    for found, wanted in zip(jax.value_and_grad(value)(*poisoned), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert np.abs(expected[1]).sum() > 0


def test_ratings_train_the_bias():
    batch = JudgedRows(rows(2), jnp.asarray([3.0, 5.0]), jnp.zeros((2, 1), bool))
    settings = RewardModelConfig(loss="regression", normalizer="none")

    def value(bias):
        params = {"reward": {"score_head": {"bias": bias}}}
        return loss(said([1.0, 2.0]), params, {}, batch, settings)[0]["regression"].mean.value

    assert value(jnp.float32(0.7)) == pytest.approx((4 + 9) / 2)  # the forward's scores have it already
    assert jax.grad(value)(jnp.float32(0.7)) == pytest.approx(-2 - 3)
    params = {"reward": {"score_head": {"bias": jnp.float32(0)}}}
    found = evaluate(said([1.0, 2.0]), params, {}, batch, settings)
    assert found["eval/squared_error"].value == 6.5 and "eval/accuracy" not in found


def test_heads_learn_alone_and_are_judged_together():
    one, two = [1.0, 0.0], [0.0, 3.0]
    settings = {"loss": "hinge", "margin": 1.0, "num_heads": 2}
    terms, metrics = losses(said(one, two), rows(2), **settings)
    assert terms["hinge"] == ((0.0 + 4.0) / 2, 1)
    assert metrics["reward/margin"].value == -1.0  # of the means, 0.5 and 1.5
