"""Lists of token ids become arrays of a static shape. Masks are born from the lengths written here.

Arrays are numpy's until a program places them on its devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from jax import Array

from rlhf_jax.batch import Prompts, Rows

LENGTH_MULTIPLE = 8  # static lengths are rounded up to it, so that few programs are compiled


class Row(NamedTuple):
    """One row before padding."""

    ids: Sequence[int]
    prompt_length: int
    was_cut: bool = False
    excluded: tuple[tuple[int, int], ...] = ()  # ranges of ids behind the prompt that are not the model's own

    @property
    def num_loss_tokens(self) -> int:
        """Returns how many tokens are the model's own."""
        return len(self.ids) - self.prompt_length - sum(end - start for start, end in self.excluded)


def static_length(longest: int, limit: int) -> int:
    """Returns the least multiple of LENGTH_MULTIPLE that holds the longest row, at most limit."""
    return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, limit)


def collate_rows(
    rows: Sequence[Row], length: int, pad_id: int, num_rows: int, *, with_excluded: bool = False
) -> Rows:
    """Returns Rows of num_rows rows of `length` tokens, right-padded; rows that only fill up have length 0.

    Args:
        rows: at most num_rows rows of at most `length` tokens.
        length: T.
        pad_id: written after the tokens; any id will do, EOS too, for masks come from lengths.
        num_rows: B.
        with_excluded: whether any row of the data excludes tokens: batches of one stage have one structure.
    """
    packed = collate_packed([[row] for row in rows], length, pad_id, num_rows, 1, with_excluded=with_excluded)
    return packed._replace(prompt_lengths=packed.prompt_lengths[:, 0], lengths=packed.lengths[:, 0])


def collate_packed(
    groups: Sequence[Sequence[Row]],
    length: int,
    pad_id: int,
    num_rows: int,
    num_sequences: int,
    *,
    with_excluded: bool = False,
) -> Rows:
    """Returns Rows of num_rows rows, each with the sequences of a group behind each other; see collate_rows.

    Args:
        groups: at most num_rows groups of at most num_sequences rows and `length` tokens together.
        length: T.
        pad_id: written after the tokens.
        num_rows: B.
        num_sequences: S.
        with_excluded: whether any row of the data excludes tokens.
    """
    assert len(groups) <= num_rows, (len(groups), num_rows)
    tokens = np.full((num_rows, length), pad_id, np.int32)
    excluded = np.zeros((num_rows, length), bool)
    lengths = np.zeros((num_rows, num_sequences), np.int32)
    prompt_lengths = np.zeros((num_rows, num_sequences), np.int32)
    for number, group in enumerate(groups):
        start = 0
        for place, row in enumerate(group):
            end = start + len(row.ids)
            assert end <= length, (end, length)
            tokens[number, start:end] = row.ids
            lengths[number, place], prompt_lengths[number, place] = len(row.ids), row.prompt_length
            for first, behind in row.excluded:
                excluded[number, start + first : start + behind] = True
            start = end
    rows = Rows(_host(tokens), _host(prompt_lengths), _host(lengths))
    return rows._replace(excluded=_host(excluded)) if with_excluded else rows


def of_sequences(known: np.ndarray, units: Sequence[Sequence[int]], shape: tuple[int, ...]) -> Array:
    """Returns what is known of each sequence of collated rows, 0 (false) of those that only fill up.

    Args:
        known: [N, K, ...], of each record's K sequences.
        units: for each unit of the batch the numbers of its records.
        shape: of the rows' lengths, [B] or [B, S].
    """
    made = np.zeros((*shape, *known.shape[2:]), known.dtype)
    if len(shape) == 1:
        filled = [(made, [number for unit in units for number in unit])]
    else:
        filled = zip(made, units, strict=False)
    for places, numbers in filled:
        of_each = known[list(numbers)].reshape(-1, *known.shape[2:])
        places[: len(of_each)] = of_each
    return _host(made)


def collate_prompts(
    prompts: Sequence[Sequence[int]], index: Sequence[int], length: int, pad_id: int, num_rows: int
) -> Prompts:
    """Returns Prompts of num_rows rows of `length` tokens (P), right-padded.

    Rows that only fill up have length 0 and index 0.
    """
    tokens, lengths = _pad(prompts, length, pad_id, num_rows)
    indices = np.zeros(num_rows, np.int32)
    indices[: len(prompts)] = index
    return Prompts(_host(tokens), _host(lengths), _host(indices))


def _pad(
    lists: Sequence[Sequence[int]], length: int, pad_id: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns i32[num_rows, length] tokens and i32[num_rows] lengths."""
    assert len(lists) <= num_rows, (len(lists), num_rows)
    tokens = np.full((num_rows, length), pad_id, np.int32)
    lengths = np.zeros(num_rows, np.int32)
    for i, ids in enumerate(lists):
        assert len(ids) <= length, (len(ids), length)
        tokens[i, : len(ids)] = ids
        lengths[i] = len(ids)
    return tokens, lengths


def _host(array: np.ndarray) -> Array:
    return cast(Array, array)
