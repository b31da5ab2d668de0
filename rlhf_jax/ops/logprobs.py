"""Log-probabilities of given tokens, and the one place of the shift by one.

The hidden state at column t - 1 predicts token t. Everything that is computed from hidden states (logprobs,
entropies, values) is computed on the C columns that predict a row's completion, and put back to where the
tokens stand, so that column t of a [B, T] array speaks about token t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.sharding import constrain, num_parts


class Columns(NamedTuple):
    """Which C tokens of each row are spoken about: entry j is of token tokens[j], token t has entries[t]."""

    tokens: Array  # i32[B, C]; an entry that speaks of no token of the row holds any column, also one beyond
    entries: Array  # i32[B, T]; below 0 or C or more, or anything where the caller masks: no entry


def contiguous_columns(starts: Array, num_columns: int, num_tokens: int) -> Columns:
    """Returns the columns of tokens starts, starts + 1, ...

    Args:
        starts: i32[B], the prompt's length: the place of the first token to predict, at least 1.
        num_columns: C, static.
        num_tokens: T, static.
    """
    starts = starts[:, None]
    return Columns(starts + jnp.arange(num_columns), jnp.arange(num_tokens) - starts)


def masked_columns(mask: Array, num_columns: int) -> Columns:
    """Returns the columns of the true tokens of a mask bool[B, T], of which no row has more than C."""
    # True before false, each in its order. A sort stays within a row, and so within a device.
    tokens = jnp.argsort(~mask, axis=1, stable=True)[:, :num_columns]
    return Columns(tokens, jnp.cumsum(mask, axis=1) - 1)


def gather_columns(hidden: Array, columns: Array) -> Array:
    """Returns x at some columns of each row, [B, C] or [B, C, D]; columns beyond the row are its last one.

    Args:
        hidden: [B, T, D], or [B, T].
        columns: i32[B, C].
    """
    columns = jnp.clip(columns, 0, hidden.shape[1] - 1)
    columns = columns.reshape(columns.shape + (1,) * (hidden.ndim - 2))
    return jnp.take_along_axis(hidden, columns, axis=1, mode="promise_in_bounds")


def gather_predictors(hidden: Array, columns: Columns) -> Array:
    """Returns what predicts the tokens, [B, C] or [B, C, D]: the columns before theirs, the shift by one.

    Entries that predict no token of the row are for the caller's mask to drop.

    Args:
        hidden: [B, T, D] hidden states, or [B, T] values.
        columns: of the tokens.
    """
    return gather_columns(hidden, columns.tokens - 1)


def gather_targets(tokens: Array, columns: Columns) -> Array:
    """Returns the tokens that `gather_predictors` predicts, i32[B, C], of tokens i32[B, T]."""
    return gather_columns(tokens, columns.tokens)


def put_columns(x: Array, columns: Columns, fill: float = 0) -> Array:
    """Returns [B, T] with each entry of x at the token that it speaks about, and fill elsewhere.

    The inverse of `gather_predictors` on the tokens. Nothing predicts token 0: it always gets the fill.

    Args:
        x: [B, C], one number for each gathered column.
        columns: of the tokens. Entries that would stand beyond T are dropped.
        fill: of x's type.
    """
    entries, num_columns = columns.entries, x.shape[1]
    inside = (entries >= 0) & (entries < num_columns) & (jnp.arange(entries.shape[1]) > 0)
    placed = jnp.take_along_axis(x, jnp.clip(entries, 0, num_columns - 1), axis=1, mode="promise_in_bounds")
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
        chunk: tokens whose logits exist at once, rounded to whole columns of B tokens (at least one for each
            device that divides columns); their logits are computed again in the backward pass. 0: all at
            once. A chunk has all rows and equidistant columns, so that each device computes its part of it.
        with_entropy: entropy costs another pass over the logits.

    Returns:
        logprobs f32[B, C] in nats, and entropy f32[B, C] in nats, or None.
    """

    def statistics(hidden: Array, targets: Array) -> tuple[Array, Array | None]:
        return logprobs_of_logits(logits_fn(hidden) / temperature, targets, with_entropy)

    return in_chunks(statistics, (hidden, targets), chunk)


def in_chunks(function: Callable[..., Any], columns: tuple[Array, ...], chunk: int) -> Any:
    """Returns function(*columns), which makes logits of them, computed for some columns at a time.

    Args:
        function: of arrays [B, w, ...] a tree of [B, w], each column for itself.
        columns: arrays [B, C] or [B, C, D].
        chunk: tokens whose logits exist at once, see `token_logprobs`.
    """

    def constrained(*columns: Array) -> Any:
        return function(*(x if x.ndim == 2 else constrain(x, ("batch", "length", "width")) for x in columns))

    num_rows, num_columns = columns[0].shape[:2]
    devices = num_parts("length")
    width = max(chunk // (num_rows * devices), 1) * devices
    if chunk == 0 or width >= num_columns:
        return constrained(*columns)

    num_chunks = -(-num_columns // width)
    padding = num_chunks * width - num_columns

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = constrain(x, ("batch", "length", "width")[: x.ndim])
        return jnp.moveaxis(x.reshape(num_rows, width, num_chunks, *x.shape[2:]), 2, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(num_rows, -1)[:, :num_columns]

    recomputed = jax.checkpoint(constrained, prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(lambda xs: recomputed(*xs), tuple(map(split, columns))))


def logprobs_of_logits(logits: Array, targets: Array, with_entropy: bool) -> tuple[Array, Array | None]:
    """Returns logprobs of the targets, and entropies; relative to the largest logit, which keeps digits.

    Args:
        logits: f32[..., V].
        targets: i32[...].
        with_entropy: else there is None.
    """
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shifted = logits - largest[..., None]
    log_total = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    entropy = None
    if with_entropy:
        entropy = log_total - jnp.sum(jnp.exp(shifted - log_total[..., None]) * shifted, axis=-1)
    return target_logits - largest - log_total, entropy


def kl_of_logits(old_logits: Array, logits: Array) -> Array:
    """Returns KL(old || new) of whole distributions, f32[...] in nats.

    KL_t = sum_v p_v (log p_v - log q_v),   p = softmax(old_logits), q = softmax(logits)

    Args:
        old_logits: f32[..., V].
        logits: f32[..., V].
    """
    old_logprobs = jax.nn.log_softmax(old_logits)
    return jnp.sum(jnp.exp(old_logprobs) * (old_logprobs - jax.nn.log_softmax(logits)), axis=-1)


def fisher_of_logits(logits: Array, tangents: Array) -> Array:
    """Returns the square of a change of logits as the softmax's Fisher matrix measures it, f32[...].

    u' (diag(p) - p p') u = sum_v p_v (u_v - sum_w p_w u_w)^2,   p = softmax(logits)

    Half of it is KL(p || softmax(logits + u)) up to third order. Its gradient with respect to u is twice the
    product of the matrix with u.

    Args:
        logits: f32[..., V].
        tangents: u, f32[..., V].
    Source: arXiv:1502.05477 appendix C.1.
    """
    probabilities = jax.nn.softmax(logits)
    mean = jnp.sum(probabilities * tangents, axis=-1, keepdims=True)
    return jnp.sum(probabilities * jnp.square(tangents - mean), axis=-1)
