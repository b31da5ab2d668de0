"""Rows in arrays are the rows that they were made from, also joined, and count as those do."""

import numpy as np
import pytest

from rlhf_jax.data.collate import Row
from rlhf_jax.data.token_rows import token_rows

ROWS = [
    Row([1, 2, 3, 4, 5, 6], 1, excluded=((2, 3), (4, 5))),
    Row([7], 1, was_cut=True),
    Row([8, 9, 10, 11], 2, excluded=((3, 4),)),
]


def test_rows_come_back():
    rows = token_rows(ROWS)
    assert list(rows) == ROWS and rows[-1] == ROWS[2] and rows[1:] == ROWS[1:]
    with pytest.raises(IndexError):
        rows[3]
    both = rows.joined(token_rows(ROWS[1:]))
    assert list(both) == ROWS + ROWS[1:]
    assert both.num_loss_tokens.tolist() == [3, 0, 1, 0, 1]


def test_a_blank_row_is_the_row_without_its_tokens():
    rows = token_rows(ROWS)
    assert [rows.blank(number) for number in range(3)] == [
        row._replace(ids=[0] * len(row.ids)) for row in ROWS
    ]


def test_counts_by_hand():
    rows = token_rows(ROWS)
    assert rows.lengths.tolist() == [6, 1, 4] and rows.lengths.dtype == np.int32
    assert rows.num_loss_tokens.tolist() == [3, 0, 1] == [row.num_loss_tokens for row in ROWS]


@pytest.mark.parametrize(
    "changes", [{"ids": [8, 9, 10, 12]}, {"prompt_length": 1}, {"excluded": ()}, {"excluded": ((2, 3),)}]
)
def test_checksum_is_of_all_that_is_learned(changes):
    other = token_rows([*ROWS[:2], ROWS[2]._replace(**changes)])
    assert other.checksum() != token_rows(ROWS).checksum() == token_rows(list(ROWS)).checksum()


def test_checksum_tells_where_a_row_ends():
    assert token_rows([Row([1, 2], 1), Row([3], 1)]).checksum() != (
        token_rows([Row([1], 1), Row([2, 3], 1)]).checksum()
    )
