"""Rows: masks, positions and segments are born from lengths; by hand, plain, packed, with excluded turns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import Rows
from rlhf_jax.models.forward import make_forward
from tests import tiny

TOKENS = jnp.zeros((2, 8), jnp.int32)
PLAIN = Rows(TOKENS, jnp.array([2, 0]), jnp.array([5, 0]))
# Row 0: a sequence of 3 (prompt 1), one of 4 (prompt 2), one place left over, a token of padding.
# Row 1: a whole row in its second place; nothing else.
PACKED = Rows(TOKENS, jnp.array([[1, 2, 0], [0, 3, 0]]), jnp.array([[3, 4, 0], [0, 8, 0]]))


def same(found, expected):
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_row_of_one_sequence():
    assert not PLAIN.is_packed
    same(PLAIN.attention_mask, [[1, 1, 1, 1, 1, 0, 0, 0], [0] * 8])
    same(PLAIN.prompt_mask, [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8])
    same(PLAIN.completion_mask, [[0, 0, 1, 1, 1, 0, 0, 0], [0] * 8])
    same(PLAIN.segments, [[0, 0, 0, 0, 0, 1, 1, 1], [1] * 8])
    same(PLAIN.positions, [range(8)] * 2)
    same(PLAIN.sequence_mask, [True, False])


def test_a_row_of_several_sequences():
    assert PACKED.is_packed
    same(PACKED.attention_mask, [[1, 1, 1, 1, 1, 1, 1, 0], [1] * 8])
    same(PACKED.prompt_mask, [[1, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])
    same(PACKED.completion_mask, [[0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    same(PACKED.segments, [[0, 0, 0, 1, 1, 1, 1, 3], [1] * 8])
    same(PACKED.positions[0, :7], [0, 1, 2, 0, 1, 2, 3])
    same(PACKED.positions[1], range(8))
    same(PACKED.sequence_mask, [True, True, False, False, True, False])


def test_excluded_tokens_leave_the_completion_and_nothing_else():
    excluded = jnp.zeros((2, 8), bool).at[0, 2].set(True).at[1, 7].set(True)
    for rows in (PLAIN, PACKED):
        less = rows._replace(excluded=excluded)
        same(less.completion_mask, rows.completion_mask & ~excluded)
        same(less.prompt_mask, rows.prompt_mask)
        same(less.attention_mask, rows.attention_mask)


def test_what_the_roles_say_of_packed_rows_with_several_turns():
    """Each token's and each sequence's figures are those of its row alone; excluded tokens have none."""
    plain = tiny.rows(6, seed=3)
    excluded = jnp.asarray(np.random.default_rng(0).random(plain.tokens.shape) < 0.3)
    groups = [[4, 1, 0], [], [3], [5, 2]]
    packed = tiny.packed(plain._replace(excluded=excluded), groups, 47)
    weights = {role: tiny.weights(role, tiny.mesh(), seed=4) for role in ("policy", "value", "reward")}
    alone, together = make_forward(tiny.model(), 8), make_forward(tiny.model(), 20)

    def say(forward, rows):
        per_token = [*forward.logprobs(weights, {}, rows), forward.values(weights, {}, rows)]
        return per_token, forward.scores(weights, {}, rows)

    found, scores = jax.jit(partial(say, together))(packed)
    expected, of_plain_rows = jax.jit(partial(say, alone))(plain)
    for of_packed, of_plain in zip(found, expected, strict=True):
        of_plain = jnp.where(excluded, 0.0, of_plain)
        assert np.count_nonzero(of_packed) == np.count_nonzero(of_plain) > 10
        for row, group in enumerate(groups):
            spans = [of_plain[old, : plain.lengths[old]] for old in group]
            span = np.concatenate([*spans, np.zeros(0)])
            np.testing.assert_allclose(of_packed[row, : len(span)], span, atol=1e-5)
    scores = scores.reshape(4, 3)
    assert np.isfinite(scores).all()
    for row, group in enumerate(groups):
        np.testing.assert_allclose(scores[row, : len(group)], of_plain_rows[np.array(group, int)], atol=1e-5)


def test_a_sequence_needs_no_context_beyond_its_own():
    """A packed row may be longer than the context, for positions begin anew."""
    rows = tiny.packed(tiny.rows(8), [list(range(8))], 96)
    assert tiny.ARCHITECTURE.context_length < 96
    weights = {"policy": tiny.weights("policy", tiny.mesh())}
    found, _ = jax.jit(make_forward(tiny.model(), 64).logprobs)(weights, {}, rows)
    expected, _ = jax.jit(make_forward(tiny.model(), 8).logprobs)(weights, {}, tiny.rows(8))
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=1e-5)
