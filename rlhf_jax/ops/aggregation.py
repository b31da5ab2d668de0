"""Means of per-token terms: over tokens, or over sequences of which each is a mean or a sum of its tokens."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Mean, Rows
from rlhf_jax.ops.masking import keep, masked
from rlhf_jax.ops.sequences import sums_of_sequences


def sequence_sums(x: Array, rows: Rows) -> Array:
    """Returns the sum of x over the tokens of each sequence, at each of its tokens: f32[B, T].

    Args:
        x: f32[B, T], 0 where a token does not count.
        rows: of one sequence each, or packed; at padding the result means nothing.
    """
    sums = sums_of_sequences(x, rows)
    if not rows.is_packed:
        return jnp.broadcast_to(sums, x.shape)
    return jnp.take_along_axis(sums, jnp.minimum(rows.segments, sums.shape[1] - 1), axis=1)


def sequence_means(x: Array, mask: Array, rows: Rows) -> Array:
    """Returns the mean of x over the tokens of each sequence that the mask names, at each of these."""
    counts = sequence_sums(mask.astype(jnp.float32), rows)
    return keep(sequence_sums(keep(x, mask), rows) / jnp.maximum(counts, 1.0), mask)


def aggregated(
    x: Array, mask: Array, rows: Rows, how: Literal["token", "sequence", "constant"], longest: int
) -> Mean:
    """Returns the mean of per-token terms, as a pair that is not yet divided.

    token: sum x / number of tokens.   sequence: sum (x / |o|) / number of sequences, |o|: its tokens.
    constant: sum (x / longest) / number of sequences.

    Args:
        x: f32[B, T].
        mask: bool[B, T], the tokens that count; a sequence without any is none.
        rows: that they are of.
        how: see above.
        longest: the most completion tokens of a sequence.
    Source: arXiv:2402.03300 (sequence), arXiv:2503.14476 (token), arXiv:2503.20783 (constant).
    """
    if how == "token":
        return masked(x, mask)
    counts = jnp.maximum(sequence_sums(mask.astype(jnp.float32), rows), 1.0)
    num_sequences = jnp.sum(keep(1.0 / counts, mask))
    return Mean(jnp.sum(keep(x, mask) / (counts if how == "sequence" else longest)), num_sequences)
