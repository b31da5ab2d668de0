"""Log-probabilities of given tokens, and the one place of the shift by one.

The hidden state at column t - 1 predicts token t. Everything that is computed from hidden states (logprobs,
entropies, values) is computed on the C columns that predict a row's completion, and put back to where the
tokens stand, so that column t of a [B, T] array speaks about token t.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def gather_columns(hidden: Array, starts: Array, num_columns: int) -> Array:
    """Returns the columns that predict tokens starts, starts + 1, ...: [B, C] or [B, C, D].

    Entry j is column starts - 1 + j. Columns beyond the row repeat its last one, and the column before the
    first is the first: entries that predict no token of the row are for the caller's mask to drop.

    Args:
        hidden: [B, T, D] hidden states, or [B, T] values.
        starts: i32[B], the prompt's length: the place of the first token to predict, at least 1.
        num_columns: C, static.
    """
    num_tokens = hidden.shape[1]
    columns = jnp.clip(starts[:, None] - 1 + jnp.arange(num_columns), 0, num_tokens - 1)
    columns = columns.reshape(columns.shape + (1,) * (hidden.ndim - 2))
    return jnp.take_along_axis(hidden, columns, axis=1, mode="promise_in_bounds")


def gather_targets(tokens: Array, starts: Array, num_columns: int) -> Array:
    """Returns the tokens that `gather_columns` predicts, i32[B, C]: entry j is token starts + j.

    Args:
        tokens: i32[B, T].
        starts: i32[B].
        num_columns: C, static. Entries beyond the row repeat its last token.
    """
    return gather_columns(tokens, starts + 1, num_columns)


def put_columns(x: Array, starts: Array, num_tokens: int, fill: float = 0) -> Array:
    """Returns [B, T] with entry j of x at the token that it speaks about, starts + j, and fill elsewhere.

    The inverse of `gather_columns` on the tokens of the row. Nothing predicts token 0: it always gets
    the fill.

    Args:
        x: [B, C], one number for each gathered column.
        starts: i32[B].
        num_tokens: T, static. Entries that would stand beyond are dropped.
        fill: of x's type.
    """
    token = jnp.arange(num_tokens)
    entries = token - starts[:, None]
    inside = (entries >= 0) & (entries < x.shape[1]) & (token > 0)
    placed = jnp.take_along_axis(x, jnp.clip(entries, 0, x.shape[1] - 1), axis=1, mode="promise_in_bounds")
    return jnp.where(inside, placed, jnp.asarray(fill, x.dtype))


def token_logprobs(
    logits_fn: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    *,
    temperature: float,
    chunk: int,
    with_entropy: bool,
) -> tuple[Array, Array | None]:
    """Returns log p(target) and, when asked for, the entropy of p, where p = softmax(logits / temperature).

    Args:
        logits_fn: hidden [..., D] -> f32[..., V].
        hidden: [B, C, D], the columns that predict the targets.
        targets: i32[B, C].
        temperature: divides the logits, as it does when the tokens are sampled.
        chunk: tokens whose logits exist at once, rounded to whole columns of B tokens (at least one); their
            logits are computed again in the backward pass. 0: all at once. Chunks run along C, so that a
            batch that is sharded over devices stays so in each.
        with_entropy: entropy costs another pass over the logits.

    Returns:
        logprobs f32[B, C] in nats, and entropy f32[B, C] in nats, or None.
    """

    def statistics(hidden: Array, targets: Array) -> tuple[Array, Array | None]:
        return _logprobs_of_logits(logits_fn(hidden) / temperature, targets, with_entropy)

    num_rows, num_columns = targets.shape
    width = max(chunk // num_rows, 1)
    if chunk == 0 or width >= num_columns:
        return statistics(hidden, targets)

    num_chunks = -(-num_columns // width)
    padding = num_chunks * width - num_columns

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(num_rows, num_chunks, width, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(num_rows, -1)[:, :num_columns]

    recomputed = jax.checkpoint(statistics, prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(lambda xs: recomputed(*xs), (split(hidden), split(targets))))


def _logprobs_of_logits(logits: Array, targets: Array, with_entropy: bool) -> tuple[Array, Array | None]:
    """Returns logprobs of the targets, and entropies; relative to the largest logit, which keeps digits."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shifted = logits - largest[..., None]
    log_total = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    entropy = None
    if with_entropy:
        entropy = log_total - jnp.sum(jnp.exp(shifted - log_total[..., None]) * shifted, axis=-1)
    return target_logits - largest - log_total, entropy
