"""Several sequences of a batch in one row, and rows no longer than they have to be, chosen on the device.

A batch of B sequences, each of up to T tokens, is computed on R = B / K rows of K sequences, one behind the
other. Shapes are static, so there is a ladder of a few widths, each with the most completion tokens that a
row of it may have, and what is computed is compiled for each; the device takes the first in which all rows
fit. Nothing depends on it but time and memory: sequences of a row do not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.batch import Rows
from rlhf_jax.sharding import num_parts


class Rung(NamedTuple):
    """A shape of rows."""

    width: int
    """W, tokens of a row."""
    num_completion: int
    """The most completion tokens of a row."""


class Placement(NamedTuple):
    """Where the B sequences of a batch are, in R rows of K sequences and W tokens."""

    sequences: Array  # i32[R, K], those of each row in their order; each of the batch once
    lengths: Array  # i32[R, K]
    rung: Rung
    num_tokens: int  # T, of the batch

    def pack(self, batch: Any) -> Any:
        """Returns the batch in these rows: of arrays [B, T] [R, W], of arrays [B] [R, K].

        Behind the sequences of a row are zeros. Where a row is one sequence, arrays [B] stay what they are.
        """
        width = self.rung.width
        if self.sequences.shape[1] == 1:
            return jax.tree.map(lambda x: x[:, :width] if x.ndim == 2 else x, batch)
        columns = jnp.arange(width)
        ends = jnp.cumsum(self.lengths, axis=1)
        number = jnp.sum(columns[:, None] >= ends[:, None, :], axis=-1)
        is_token = number < ends.shape[1]
        number = jnp.minimum(number, ends.shape[1] - 1)
        starts = jnp.take_along_axis(ends - self.lengths, number, axis=1)
        from_row = jnp.take_along_axis(self.sequences, number, axis=1)
        from_column = jnp.clip(columns - starts, 0, self.num_tokens - 1)

        def packed(x: Array) -> Array:
            if x.ndim == 1:
                return x[self.sequences]
            return jnp.where(is_token, x[from_row, from_column], jnp.zeros((), x.dtype))

        return jax.tree.map(packed, batch)

    def unpack(self, x: Array) -> Array:
        """Returns [B, T] of [R, W], zero behind each sequence; or [B] of [R * K], one for each sequence."""
        num_sequences = self.sequences.shape[1]
        if num_sequences == 1:
            return x if x.ndim == 1 else jnp.pad(x, ((0, 0), (0, self.num_tokens - x.shape[1])))
        places = jnp.argsort(self.sequences.ravel())  # of sequence b in the rows, one behind the other
        if x.ndim == 1:
            return x[places]
        starts = (jnp.cumsum(self.lengths, axis=1) - self.lengths).ravel()[places]
        columns = jnp.arange(self.num_tokens)
        found = x[(places // num_sequences)[:, None], jnp.minimum(starts[:, None] + columns, x.shape[1] - 1)]
        return jnp.where(columns < self.lengths.ravel()[places][:, None], found, jnp.zeros((), x.dtype))


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """How the sequences of a batch are laid out in rows."""

    sequences_per_row: int
    """K; divides the sequences of every batch."""
    length_buckets: int
    """Rungs of the ladder."""
    num_completion: int
    """C, the most completion tokens of a sequence."""
    prompt_length: int
    """Tokens of a prompt that rungs are made for; longer ones only make a wider rung be taken."""

    def ladder(self, num_tokens: int) -> tuple[Rung, ...]:
        """Returns the rungs for sequences of up to T tokens, each larger than the one before.

        With N of them, rung j has room for j / N of the most completion tokens, behind the prompts that are
        planned for; the last one holds whatever comes.
        """
        count, most = self.sequences_per_row, self.sequences_per_row * self.num_completion
        whole = count * num_tokens
        prompts = count * min(self.prompt_length, max(num_tokens - self.num_completion, 1))
        # Vectors of 8 numbers, tiles of 128, and the devices that divide a row's tokens.
        multiple = math.lcm(8 if whole < 1024 else 128, num_parts("length"))
        rungs = {whole: Rung(whole, most)}
        for part in range(self.length_buckets - 1, 0, -1):
            num_completion = -(-most * part // self.length_buckets)
            width = prompts + num_completion
            width = -(-width // multiple) * multiple
            if width < whole:
                rungs.setdefault(width, Rung(width, num_completion))
        return tuple(sorted(rungs.values()))

    def in_short_rows[T](self, rows: Rows, function: Callable[[Placement], T], together: int = 1) -> T:
        """Returns function(placement) for the first rung that all rows fit in.

        Args:
            rows: of one sequence each, the batch's.
            function: is traced for every rung; all that it returns has one shape, whatever the rung.
            together: sequences that stand one behind the other and stay so; see `share_rows`.
        """
        sequences = share_rows(rows.lengths, self.sequences_per_row, together)
        lengths = rows.lengths[sequences]
        completions = jnp.sum(lengths - rows.prompt_lengths[sequences], axis=1)
        ladder = self.ladder(rows.tokens.shape[1])
        fits = [
            (jnp.max(jnp.sum(lengths, axis=1)) <= rung.width) & (jnp.max(completions) <= rung.num_completion)
            for rung in ladder[:-1]
        ]
        placements = [Placement(sequences, lengths, rung, rows.tokens.shape[1]) for rung in ladder]
        if not fits:
            return function(placements[0])
        which = jnp.sum(~jnp.stack(fits))
        return lax.switch(which, [lambda at=at: function(at) for at in placements])


def share_rows(lengths: Array, sequences_per_row: int, together: int = 1) -> Array:
    """Returns which sequences share a row, i32[R, K], so that rows are about equally long.

    Sequences are dealt in K rounds, the longest first; in each round the longest goes to the row that is the
    shortest so far.

    Args:
        lengths: i32[B].
        sequences_per_row: K, divides B. With 1, sequences keep their places.
        together: so many, one behind the other, are dealt as one; divides K unless that is 1.
    """
    if together > 1 and sequences_per_row > 1:
        units = share_rows(lengths.reshape(-1, together).sum(axis=1), sequences_per_row // together)
        return (together * units[..., None] + jnp.arange(together)).reshape(len(units), -1)
    num_rows = len(lengths) // sequences_per_row
    if sequences_per_row == 1:
        return jnp.arange(num_rows)[:, None]
    by_length = jnp.argsort(-lengths, stable=True).reshape(sequences_per_row, num_rows)
    rows = by_length[0][:, None]
    for dealt in by_length[1:]:
        order = jnp.argsort(jnp.sum(lengths[rows], axis=1), stable=True)
        rows = jnp.concatenate([rows[order], dealt[:, None]], axis=1)
    return rows
