"""Rows of tokens in flat arrays: what is asked of all rows is answered without going through them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np

from rlhf_jax.data.collate import Row


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRows(Sequence[Row]):
    """Rows that lie in arrays, in memory or mapped from disk."""

    tokens: np.ndarray  # i32[all tokens]
    ends: np.ndarray  # i64[rows], where each row ends in tokens
    prompt_lengths: np.ndarray  # i32[rows]
    was_cut: np.ndarray  # bool[rows]
    excluded: np.ndarray  # i64[ranges, 3], sorted: row, start, end

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        start = int(self.ends[number - 1]) if number else 0
        ids = self.tokens[start : self.ends[number]].tolist()
        return Row(ids, int(self.prompt_lengths[number]), bool(self.was_cut[number]), self._excluded(number))

    def blank(self, number: int) -> Row:
        """Returns a row whose tokens are all 0 and none of which is read; the rest of it is the row's."""
        ids = [0] * int(self.lengths[number])
        return Row(ids, int(self.prompt_lengths[number]), bool(self.was_cut[number]), self._excluded(number))

    def _excluded(self, number: int) -> tuple[tuple[int, int], ...]:
        first, behind = np.searchsorted(self.excluded[:, 0], [number, number + 1])
        return tuple((int(a), int(b)) for _, a, b in self.excluded[first:behind])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Returns i32[rows], the tokens of each row."""
        return np.diff(self.ends, prepend=0).astype(np.int32)

    @functools.cached_property
    def num_loss_tokens(self) -> np.ndarray:
        """Returns i32[rows], how many tokens of each row are the model's own."""
        counts = self.lengths - self.prompt_lengths
        rows, starts, ends = self.excluded.T
        np.subtract.at(counts, rows, (ends - starts).astype(np.int32))
        return counts

    def checksum(self) -> int:
        """Returns one of the tokens of all rows in their order, and of which of them carry loss."""
        arrays = (self.tokens, self.ends, self.prompt_lengths, self.excluded)
        return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array), crc), arrays, 0)

    def spread(self, rows_per_record: int, new_rows_per_record: int) -> TokenRows:
        """Returns the rows with further ones behind those of each record, which are empty."""
        num_records, more = len(self) // rows_per_record, new_rows_per_record - rows_per_record

        def per_record(of_rows: np.ndarray, mode: Literal["edge", "constant"]) -> np.ndarray:
            return np.pad(of_rows.reshape(num_records, -1), ((0, 0), (0, more)), mode).ravel()

        rows, starts, ends = self.excluded.T
        rows = rows // rows_per_record * new_rows_per_record + rows % rows_per_record
        return TokenRows(
            tokens=self.tokens,
            ends=per_record(self.ends, "edge"),
            prompt_lengths=per_record(self.prompt_lengths, "constant"),
            was_cut=per_record(self.was_cut, "constant"),
            excluded=np.stack([rows, starts, ends], axis=1),
        )

    def joined(self, other: TokenRows) -> TokenRows:
        """Returns these rows and then the other ones."""
        return TokenRows(
            tokens=np.concatenate([self.tokens, other.tokens]),
            ends=np.concatenate([self.ends, other.ends + len(self.tokens)]),
            prompt_lengths=np.concatenate([self.prompt_lengths, other.prompt_lengths]),
            was_cut=np.concatenate([self.was_cut, other.was_cut]),
            excluded=np.concatenate([self.excluded, other.excluded + np.array([len(self), 0, 0])]),
        )


def token_rows(rows: Sequence[Row]) -> TokenRows:
    """Returns rows as arrays."""
    ends = np.cumsum([len(row.ids) for row in rows])
    excluded = [(number, *part) for number, row in enumerate(rows) for part in row.excluded]
    return TokenRows(
        tokens=np.fromiter(itertools.chain.from_iterable(row.ids for row in rows), np.int32, ends[-1]),
        ends=ends,
        prompt_lengths=np.array([row.prompt_length for row in rows], np.int32),
        was_cut=np.array([row.was_cut for row in rows]),
        excluded=np.array(excluded, np.int64).reshape(-1, 3),
    )
