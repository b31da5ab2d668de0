"""Which records share a row: planned once from lengths alone, filled anew in every epoch.

A plan says which lengths go together: best fit decreasing over the whole set, so that the number of rows and
the shape of a batch are the same in every epoch. Which of the records of one length goes where, and the order
of the rows, are drawn for each epoch. Every record is in one row of an epoch, whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """A plan of rows. Rank k is the place of a record that has the k-th greatest length."""

    capacity: int
    """T: tokens of a row."""
    ranks: np.ndarray
    """i64[N], each once: those of the first row, of the second, and so on."""
    starts: np.ndarray
    """i64[R + 1]: row r has ranks[starts[r] : starts[r + 1]]."""

    @property
    def num_rows(self) -> int:
        """Returns R."""
        return len(self.starts) - 1

    @property
    def most_records(self) -> int:
        """Returns the greatest number of records that share a row."""
        return int(np.diff(self.starts).max())

    def row(self, number: int) -> np.ndarray:
        """Returns the ranks of one row."""
        return self.ranks[self.starts[number] : self.starts[number + 1]]

    def most(self, lengths: np.ndarray, counts: np.ndarray) -> int:
        """Returns the most that the counts of a row's records sum up to, whichever epoch it is.

        Args:
            lengths: i32[N], those that the plan was made from.
            counts: i32[N], for instance of tokens that carry loss.
        """
        of_length = np.zeros(self.capacity + 1, np.int64)
        np.maximum.at(of_length, lengths, counts)
        of_rank = of_length[-np.sort(-lengths)]
        return int(np.add.reduceat(of_rank[self.ranks], self.starts[:-1]).max())

    def fill(self, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Returns i64[N], the record that takes each rank; those of one length come in the given order.

        Args:
            lengths: i32[N], those that the plan was made from.
            order: i64[N], a permutation of the records.
        """
        return order[np.argsort(-lengths[order], kind="stable")]


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Returns a plan for records of these lengths: best fit, longest first.

    Each record is put into the row with the least space that holds it. A function of the arguments alone; a
    million records take less than a second.

    Args:
        lengths: i32[N], each 1 to capacity.
        capacity: tokens of a row.
    Source: best fit decreasing, at most 11/9 of the fewest rows and one more (Johnson 1973).
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where some row has s tokens of space
    for rank, length in enumerate((-np.sort(-lengths)).tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(rank)
        left = space - length
        with_space[left].append(row)
        if left:
            spaces |= 1 << left
    starts = np.cumsum([0, *map(len, rows)])
    return Packing(capacity, np.fromiter(itertools.chain.from_iterable(rows), np.int64), starts)


def length_ladder(lengths: Sequence[int] | np.ndarray, num_buckets: int, multiple: int) -> tuple[int, ...]:
    """Returns at most num_buckets static lengths, ascending: each holds about as many records as the next.

    They are the quantiles of the lengths, rounded up to the multiple; the last one holds the longest record.
    """
    shares = np.arange(1, num_buckets + 1) / num_buckets
    quantiles = np.quantile(np.asarray(lengths), shares, method="inverted_cdf")
    return tuple(sorted({int(-(-quantile // multiple) * multiple) for quantile in quantiles}))
