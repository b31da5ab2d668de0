"""KL estimators on numbers worked by hand and against an exact divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.kl import adapt_kl_coef, k1, k2, k3, log_ratio, sequence_kl

P = np.array([0.5, 0.3, 0.2])
Q = np.array([0.2, 0.2, 0.6])


def test_by_hand():
    p, q = jnp.log(0.5), jnp.log(0.25)
    assert k1(p, q) == pytest.approx(np.log(2))
    assert k2(p, q) == pytest.approx(np.log(2) ** 2 / 2)
    assert k3(p, q) == pytest.approx(0.5 - 1 + np.log(2))


def test_expectations_are_the_exact_divergence():
    exact = np.sum(P * np.log(P / Q))
    assert np.sum(P * k1(np.log(P), np.log(Q))) == pytest.approx(exact, rel=1e-6)
    assert np.sum(P * k3(np.log(P), np.log(Q))) == pytest.approx(exact, rel=1e-6)
    assert np.min(k3(np.log(P), np.log(Q))) >= 0


def test_gradients_of_the_losses():
    """On policy, k2's expected gradient is the reverse KL's, k3's the forward KL's (by the logits)."""
    logits, log_q = jnp.log(P), jnp.log(Q)

    def expected(estimator):  # samples are fixed, so the sampling probabilities have no gradient
        return jax.grad(lambda x: jnp.sum(P * estimator(jax.nn.log_softmax(x), log_q)))(logits)

    def exact(divergence):
        return jax.grad(lambda x: divergence(jax.nn.log_softmax(x)))(logits)

    np.testing.assert_allclose(expected(k2), exact(lambda lp: jnp.sum(jnp.exp(lp) * (lp - log_q))), atol=1e-6)
    np.testing.assert_allclose(expected(k3), exact(lambda lp: jnp.sum(Q * (log_q - lp))), atol=1e-6)


def test_k3_keeps_its_digits_near_zero():
    assert k3(jnp.float32(0.0), jnp.float32(1e-3)) == pytest.approx(5.0016671e-7, rel=1e-3)


@pytest.mark.parametrize("difference", [200.0, -200.0, np.inf, -np.inf])
def test_far_ratios_stay_finite(difference):
    value, gradient = jax.value_and_grad(k3)(jnp.float32(0.0), jnp.float32(difference))
    assert np.isfinite(value) and gradient == 0
    assert np.isfinite(jnp.exp(log_ratio(jnp.float32(0.0), jnp.float32(difference), jnp.array(True))))


@pytest.mark.parametrize("poison", [1e6, -1e6, np.nan, np.inf])
def test_ratio_of_masked_garbage_has_no_gradient(poison):
    mask = jnp.array([[True, False]])
    old = jnp.array([[-1.0, poison]])

    def total(new):
        return jnp.sum(jnp.exp(log_ratio(new, old, mask)))

    value, gradient = jax.value_and_grad(total)(jnp.array([[-1.0, poison]]))
    assert value == 2.0  # ratio 1 in both slots
    np.testing.assert_array_equal(gradient, [[1.0, 0.0]])


def test_sequence_kl_sums_over_tokens_and_averages_over_sequences():
    logprobs = jnp.array([[0.0, -1.0, -1.0], [-2.0, np.nan, 1e6], [np.nan, 1e6, 1e6]])
    ref_logprobs = jnp.array([[0.0, -2.0, -3.0], [-1.0, 1e6, np.nan], [1e6, np.nan, 1e6]])
    mask = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    kl = sequence_kl(logprobs, ref_logprobs, mask)
    assert kl == (2.0, 2.0)  # 0 + 1 + 2 and -1; the third row is no sequence


@pytest.mark.parametrize(
    "kl, factor",
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 64 / 10000),
        (600.0, 1 + 0.2 * 64 / 10000),  # the error is clipped
        (0.0, 1 - 0.2 * 64 / 10000),
    ],
)
def test_adaptive_coefficient(kl, factor):
    coef = adapt_kl_coef(jnp.float32(0.1), jnp.float32(kl), num_episodes=64, target=6.0, horizon=10000)
    assert coef == pytest.approx(0.1 * factor, rel=1e-6)
