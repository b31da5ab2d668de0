"""Collation: rows, cuts and static shapes; masks from lengths, whatever the padding id."""

import jax
import numpy as np
import pytest

from rlhf_jax.data.collate import Row, collate_packed, collate_prompts, collate_rows, static_length

EOS = 2


@pytest.mark.parametrize(
    "longest, limit, length", [(1, 64, 8), (8, 64, 8), (9, 64, 16), (60, 62, 62), (64, 64, 64)]
)
def test_static_length_is_a_multiple_of_eight_at_most_the_limit(longest, limit, length):
    assert static_length(longest, limit) == length


@pytest.mark.parametrize("pad_id", [0, EOS])
def test_masks_do_not_depend_on_the_padding_id(pad_id):
    rows = collate_rows([Row([1, 5, 6, EOS], 2), Row([1, EOS], 1)], length=5, pad_id=pad_id, num_rows=3)
    np.testing.assert_array_equal(
        rows.tokens, [[1, 5, 6, EOS, pad_id], [1, EOS] + [pad_id] * 3, [pad_id] * 5], strict=False
    )
    np.testing.assert_array_equal(rows.lengths, [4, 2, 0])
    np.testing.assert_array_equal(rows.completion_mask, [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.prompt_mask, [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.sequence_mask, [True, True, False])
    assert {np.asarray(leaf).dtype for leaf in jax.tree.leaves(rows)} == {np.dtype(np.int32)}


def test_prompts_are_right_padded_and_carry_their_index():
    prompts = collate_prompts([[1, 5, 6], [1]], index=[7, 8], length=4, pad_id=0, num_rows=3)
    np.testing.assert_array_equal(prompts.tokens, [[1, 5, 6, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(prompts.lengths, [3, 1, 0])
    np.testing.assert_array_equal(prompts.index, [7, 8, 0])
    assert {np.asarray(leaf).dtype for leaf in prompts} == {np.dtype(np.int32)}


def test_rows_that_do_not_fit_are_our_own_mistake():
    with pytest.raises(AssertionError):
        collate_rows([Row([1, 2, 3], 1)], length=2, pad_id=0, num_rows=1)
    with pytest.raises(AssertionError):
        collate_prompts([[1], [1]], [0, 1], length=2, pad_id=0, num_rows=1)


def test_sequences_of_a_packed_row_lie_behind_each_other():
    groups = [[Row([1, 5, 6], 2), Row([1, 7], 1)], [], [Row([1, 5, 6, 8], 1, excluded=((2, 3),))]]
    rows = collate_packed(groups, length=6, pad_id=EOS, num_rows=4, num_sequences=2, with_excluded=True)
    np.testing.assert_array_equal(
        rows.tokens, [[1, 5, 6, 1, 7, EOS], [EOS] * 6, [1, 5, 6, 8, EOS, EOS], [EOS] * 6]
    )
    np.testing.assert_array_equal(rows.lengths, [[3, 2], [0, 0], [4, 0], [0, 0]])
    np.testing.assert_array_equal(rows.prompt_lengths, [[2, 1], [0, 0], [1, 0], [0, 0]])
    np.testing.assert_array_equal(
        rows.completion_mask, [[0, 0, 1, 0, 1, 0], [0] * 6, [0, 1, 0, 1, 0, 0], [0] * 6]
    )
    plain = collate_rows(groups[2], length=6, pad_id=EOS, num_rows=1, with_excluded=True)
    np.testing.assert_array_equal(plain.completion_mask, [[0, 1, 0, 1, 0, 0]])
    assert groups[2][0].num_loss_tokens == 2
