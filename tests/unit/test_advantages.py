"""GAE against a plain Python loop, with gaps between the tokens, and with garbage in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.advantages import gae


def plain_gae(rewards, values, gamma, lam):
    """A list of advantages, from the definition: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    after = [*values, 0.0][1:]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


def test_by_hand():
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.25, 0.5]])
    mask = jnp.ones((1, 3), bool)
    # deltas, gamma 0.5: -0.375, 0, 0.5; gamma lam = 0.25
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(advantages, [[-0.375 + 0.0625 * 0.5, 0.125, 0.5]], atol=1e-7)
    np.testing.assert_allclose(returns, advantages + values, atol=1e-7)


def test_lambda_1_returns_are_the_sum_of_later_rewards():
    rewards, values = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[9.0, -4.0, 7.0]])
    _, returns = gae(rewards, values, jnp.ones((1, 3), bool), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, [[6.0, 5.0, 3.0]], atol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.7, 1.0)])
@pytest.mark.parametrize("poison", [0.0, 1e6, np.nan])
def test_against_plain_python_with_gaps(gamma, lam, poison):
    rng = np.random.default_rng(0)
    shape = (6, 11)
    rewards, values = rng.normal(size=shape), rng.normal(size=shape)
    mask = rng.random(shape) < 0.6
    mask[0] = False  # a row without any token
    mask[1] = True
    mask[2] = np.arange(11) // 4 == 1  # contiguous, as a completion is
    expected = np.zeros((2, *shape))
    for row in range(shape[0]):
        chosen = mask[row]
        expected[0, row, chosen] = plain_gae(rewards[row, chosen], values[row, chosen], gamma, lam)
        expected[1, row, chosen] = expected[0, row, chosen] + values[row, chosen]
    rewards, values = (jnp.asarray(np.where(mask, x, poison), jnp.float32) for x in (rewards, values))
    got = gae(rewards, values, jnp.asarray(mask), gamma=gamma, lam=lam)
    np.testing.assert_allclose(np.stack(got), expected, atol=2e-6)


def test_padding_to_the_right_changes_nothing():
    rewards, values = jax.random.normal(jax.random.key(0), (2, 3, 5))
    mask = jnp.ones((3, 5), bool)
    wide = [
        jnp.pad(x, ((0, 0), (2, 4)), constant_values=c) for x, c in ((rewards, 7), (values, 7), (mask, False))
    ]
    for narrow, padded in zip(
        gae(rewards, values, mask, gamma=0.9, lam=0.9), gae(*wide, gamma=0.9, lam=0.9), strict=True
    ):
        np.testing.assert_array_equal(narrow, padded[:, 2:7])
