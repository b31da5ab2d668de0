"""Bradley-Terry on hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.reward_model import accuracy, bradley_terry


def test_loss_is_minus_log_sigmoid_of_the_margin():
    chosen, rejected = jnp.array([2.0, 0.0]), jnp.array([1.0, 3.0])
    loss = bradley_terry(chosen, rejected, jnp.array([True, True]))
    expected = np.mean([np.log1p(np.exp(-1.0)), np.log1p(np.exp(3.0))])
    assert loss.value == pytest.approx(expected, rel=1e-6)


def test_filling_pairs_have_no_weight_and_no_gradient():
    mask = jnp.array([True, False])
    loss = bradley_terry(jnp.array([2.0, 9e9]), jnp.array([1.0, jnp.nan]), mask)
    assert loss.weight == 1
    assert loss.value == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-6)
    gradient = jax.grad(lambda c: bradley_terry(c, jnp.array([1.0, 0.0]), mask).value)(jnp.array([2.0, 5.0]))
    assert gradient[1] == 0 and gradient[0] < 0


def test_equal_scores_count_one_half():
    chosen, rejected = jnp.array([1.0, 1.0, 0.0, 7.0]), jnp.array([1.0, 0.0, 1.0, 0.0])
    found = accuracy(chosen, rejected, jnp.array([True, True, True, False]))
    assert found.value == pytest.approx((0.5 + 1 + 0) / 3)
