"""Per-token numbers of rows summed up over each sequence, be it alone in its row or packed with others."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Rows
from rlhf_jax.ops.masking import keep


def sums_of_sequences(x: Array, rows: Rows) -> Array:
    """Returns the sum of x over the tokens of each sequence: f32[B, 1], packed f32[B, S].

    Args:
        x: f32[B, T], 0 where a token does not count, and at padding where rows are of one sequence each.
        rows: of one sequence each, or packed.
    """
    if not rows.is_packed:
        return jnp.sum(x, axis=1, keepdims=True)
    is_of_sequence = rows.segments[:, None, :] == jnp.arange(rows.lengths.shape[1])[:, None]  # bool[B, S, T]
    return jnp.sum(keep(x[:, None, :], is_of_sequence), axis=2)


def completion_sums(x: Array, rows: Rows) -> Array:
    """Returns the sum of x over the completion tokens of each sequence: f32[B], packed f32[B * S].

    Args:
        x: f32[B, T]; what it is outside of the completions does not matter.
        rows: whose completions; a sequence that only fills up has the sum 0.
    """
    return sums_of_sequences(keep(jnp.asarray(x, jnp.float32), rows.completion_mask), rows).reshape(-1)


def completion_lengths(rows: Rows) -> Array:
    """Returns how many tokens of each sequence are the model's own: f32[B], packed f32[B * S]."""
    return completion_sums(jnp.ones(rows.tokens.shape, jnp.float32), rows)


def as_pairs(of_sequences: Array) -> tuple[Array, Array]:
    """Returns (chosen, rejected), each of shape [N], of sequences that alternate; see Examples.collate."""
    chosen, rejected = of_sequences.reshape(-1, 2).T
    return chosen, rejected
