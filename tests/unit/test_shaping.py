"""The missing-EOS rules, and where score and KL penalty land."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.shaping import apply_missing_eos, last_token, token_rewards

SCORES, ENDED = jnp.array([2.0, -3.0, 0.5]), jnp.array([True, False, True])


@pytest.mark.parametrize(
    "rule, scores, kept",
    [
        ("none", [2.0, -3.0, 0.5], [True, True, True]),
        ("subtract", [2.0, -4.5, 0.5], [True, True, True]),
        ("replace", [2.0, 1.5, 0.5], [True, True, True]),
        ("mask", [2.0, -3.0, 0.5], [True, False, True]),
    ],
)
def test_missing_eos(rule, scores, kept):
    new_scores, keep_rows = apply_missing_eos(SCORES, ENDED, rule, 1.5)
    np.testing.assert_array_equal(new_scores, scores)
    np.testing.assert_array_equal(keep_rows, kept)
    assert keep_rows.dtype == bool


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match=r"'drop'.*none, subtract, replace or mask"):
        apply_missing_eos(SCORES, ENDED, "drop", 1.0)


def test_last_token():
    mask = jnp.array([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(jnp.argmax(last_token(mask), axis=1)[jnp.array([0, 1, 3, 4])], [2, 2, 3, 0])
    np.testing.assert_array_equal(jnp.sum(last_token(mask), axis=1), [1, 1, 0, 1, 1])


@pytest.mark.parametrize("poison", [0.0, 1e6, np.nan])
def test_rewards_by_hand(poison):
    mask = jnp.array([[False, True, True, False], [True, False, True, True], [False, False, False, False]])
    old = jnp.where(mask, jnp.array([[-1.0, -1.0, -2.0, -1.0]] * 3), poison)
    ref = jnp.where(mask, jnp.array([[-1.0, -3.0, -1.0, -2.0]] * 3), poison)
    rewards = token_rewards(jnp.array([5.0, -1.0, np.nan]), old, ref, mask, 0.1)
    expected = [
        [0.0, -0.2, 0.1 + 5.0, 0.0],  # the score on the completion's last token
        [0.0, 0.0, 0.1, -0.1 - 1.0],  # a gap gets nothing
        [0.0, 0.0, 0.0, 0.0],  # a row that was left out gets nothing, not even its score
    ]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
