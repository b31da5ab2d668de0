"""Masked statistics on hand-worked numbers; what stands in masked slots changes nothing, nor a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.masking import keep, masked, masked_max, masked_mean, masked_var, whiten

X = jnp.array([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]])
MASK = jnp.array([[True, True, False], [True, False, False]])  # 1, 2, 3: mean 2, biased variance 2/3
NOTHING = jnp.zeros_like(MASK)


@pytest.fixture(params=[1e6, -1e6, np.nan, np.inf])
def poisoned(request):
    return jnp.where(MASK, X, request.param)


def test_hand_worked_statistics():
    mean = masked(X, MASK)
    assert (mean.total, mean.weight, mean.value) == (6.0, 3.0, 2.0)
    assert masked_mean(X, MASK) == 2.0
    assert masked_var(X, MASK) == pytest.approx(2 / 3)
    assert masked_max(X, MASK) == 3.0
    assert masked_max(-X, MASK) == -1.0
    np.testing.assert_array_equal(keep(X, MASK), [[1, 2, 0], [3, 0, 0]])


def test_a_number_counts_once_per_true_entry():
    assert masked(2.0, MASK) == (6.0, 3.0)
    assert masked(jnp.array([[True, False, True], [True, False, True]]), MASK).value == pytest.approx(2 / 3)


def test_no_true_entry_gives_zero():
    assert masked(X, NOTHING) == (0.0, 0.0)
    assert masked_mean(X, NOTHING) == masked_var(X, NOTHING) == masked_max(X, NOTHING) == 0.0
    np.testing.assert_array_equal(whiten(X, NOTHING), jnp.zeros_like(X))


def test_whiten_by_hand():
    deviation = np.sqrt(2 / 3)
    expected = np.array([[-1, 0, 0], [1, 0, 0]]) / deviation
    np.testing.assert_allclose(whiten(X, MASK), expected, atol=1e-6)
    np.testing.assert_allclose(whiten(X, MASK, keep_mean=True), np.where(MASK, expected + 2, 0), atol=1e-6)


def test_whiten_of_equal_entries_is_zero_and_finite():
    np.testing.assert_array_equal(whiten(jnp.full((2, 3), 5.0), MASK), jnp.zeros((2, 3)))


def test_poison_moves_nothing(poisoned):
    for function in (masked, masked_mean, masked_var, masked_max, whiten, keep):
        jax.tree.map(np.testing.assert_array_equal, function(poisoned, MASK), function(X, MASK))


def test_poison_leaves_gradients_alone(poisoned):
    for function in (masked_mean, masked_var, lambda x, mask: jnp.sum(whiten(x, mask) ** 3)):
        gradient = jax.grad(function)
        np.testing.assert_array_equal(gradient(poisoned, MASK), gradient(X, MASK))
        assert not gradient(X, MASK)[~MASK].any()
