"""The pytrees that flow between the parts of a train step, and the dimension key.

Dimension key, used as a suffix of local names where the rank matters:

    B rows   S sequences of a packed row   N prompts   G group   P prompt tokens   T tokens of a row
    C static maximum of a row's completion tokens   D model   F feed-forward   H heads   K key/value heads
    V vocabulary

Per-token arrays are [B, T]; column t speaks about token t given the tokens before it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Params = dict  # a pure dict pytree of arrays with string keys
ADAPTER = "_adapter"
"""Ends the name of an adapter, a tree {a, b}, after that of the weight beside which it stands."""


class Mean(NamedTuple):
    """A mean that is not yet divided: sums of several of these are means over their union."""

    total: Array  # f32[]
    weight: Array  # f32[]

    @property
    def value(self) -> Array:
        """Returns total / weight, f32[]; 0 where the weight is 0."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


class Max(NamedTuple):
    """A maximum over tokens, rows and minibatches."""

    value: Array  # f32[]


Metrics = dict[str, Mean | Max | Array | float]  # a float is the host's own, such as seconds


class Rows(NamedTuple):
    """Token rows for scoring and training: prompt, completion, padding; contiguous, right-padded.

    A row is one sequence, or packs up to S of them, one behind the other: then both lengths are [B, S], and a
    sequence of length 0 is none. A row that only fills up a batch has no length and so no weight anywhere.
    """

    tokens: Array  # i32[B, T]
    prompt_lengths: Array  # i32[B] or i32[B, S], tokens before the completion, BOS included
    lengths: Array  # i32[B] or i32[B, S], prompt and completion
    excluded: Array | None = None  # bool[B, T], tokens behind the prompt that are not the model's own
    ref_logprobs: Array | None = None  # f32[B] or f32[B, S], nats, of each completion by the reference; None:
    # they were not computed beforehand

    @property
    def is_packed(self) -> bool:
        """Returns whether a row may hold several sequences."""
        return self.lengths.ndim == 2

    @property
    def attention_mask(self) -> Array:
        """Returns bool[B, T]: the real tokens."""
        total = self.lengths.sum(axis=1) if self.is_packed else self.lengths
        return self._columns < total[:, None]

    @property
    def completion_mask(self) -> Array:
        """Returns bool[B, T]: the model's own tokens, its EOS included when it has one."""
        mask = self.attention_mask & ~self.prompt_mask
        return mask if self.excluded is None else mask & ~self.excluded

    @property
    def prompt_mask(self) -> Array:
        """Returns bool[B, T]: the prompts' tokens."""
        if not self.is_packed:
            return self._columns < self.prompt_lengths[:, None]
        return self.attention_mask & (self.positions < self._of_token(self.prompt_lengths))

    @property
    def segments(self) -> Array:
        """Returns i32[B, T]: the number of the sequence in its row; padding has a number of its own, S."""
        ends = jnp.cumsum(self.lengths, axis=1) if self.is_packed else self.lengths[:, None]
        return jnp.sum(self._columns[:, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32)

    @property
    def positions(self) -> Array:
        """Returns i32[B, T]: the number of the token in its sequence, counted on through the padding."""
        if not self.is_packed:
            return jnp.broadcast_to(self._columns, self.tokens.shape)
        starts = jnp.cumsum(self.lengths, axis=1) - self.lengths
        return self._columns - self._of_token(starts)

    @property
    def sequence_mask(self) -> Array:
        """Returns bool[B], packed bool[B * S]: the sequences that are data, not filling."""
        return self.lengths.reshape(-1) > 0

    @property
    def _columns(self) -> Array:
        return jnp.arange(self.tokens.shape[1])

    def _of_token(self, of_sequence: Array) -> Array:
        """Returns i32[B, T] of i32[B, S]: each token's sequence's; of padding, the last one's."""
        sequence = jnp.minimum(self.segments, self.lengths.shape[1] - 1)
        return jnp.take_along_axis(of_sequence, sequence, axis=1)


class UnpairedRows(NamedTuple):
    """Completions that are desirable or not, beside those from which their reference point is made."""

    rows: Rows
    mismatched: Rows  # the same prompts, each with the completion of another one
    is_desirable: Array  # bool[B] or bool[B, S], of the completions in rows


class JudgedRows(NamedTuple):
    """Rows of records of K completions each, and what judges said of them; filling completes a record."""

    rows: Rows
    ratings: Array  # f32[B] or f32[B, S], how good each completion is; of a pair its margin, and 0
    better: Array  # bool[B, K] or bool[B, S, K], whether it is better than the k-th of its record


RecordRows = Rows | UnpairedRows | JudgedRows
"""A batch of records, from which an offline stage learns."""


def rows_of(batch: RecordRows) -> Rows:
    """Returns the rows of a batch of records, of unpaired completions their own."""
    return batch if isinstance(batch, Rows) else batch.rows


def parts_of(batch: RecordRows) -> tuple[Rows, ...]:
    """Returns all rows of a batch of records: behind unpaired completions the mismatched ones."""
    return (batch.rows, batch.mismatched) if isinstance(batch, UnpairedRows) else (rows_of(batch),)


class Prompts(NamedTuple):
    """Prompts to complete, right-padded."""

    tokens: Array  # i32[B, P]
    lengths: Array  # i32[B]; 0 for a row that only fills up the batch
    index: Array  # i32[B], position in the data order; randomness is folded from it, never from the row


class Rollout(NamedTuple):
    """What the sampler made of a batch of prompts."""

    rows: Rows  # T = P + C
    ended: Array  # bool[B]: the completion ends with EOS
    sampler_logprobs: Array  # f32[B, T], nats, of the untruncated, temperature-scaled policy


class Scored(NamedTuple):
    """A rollout with what every role says about it."""

    rollout: Rollout
    old_logprobs: Array  # f32[B, T], nats, by the training forward of the policy that made the rollout
    ref_logprobs: Array | None  # f32[B, T], nats, by the frozen reference; None where the stage has none
    values: Array | None  # f32[B, T], the state before token t; None without a value model
    scores: Array  # f32[B], the judges' combined verdict
    greedy: Scored | None = None  # each prompt's greedy completion, only scored; None where nothing reads it


class PolicyBatch(NamedTuple):
    """What a policy update reads."""

    rows: Rows
    completion_mask: Array  # bool[B, T]; the rows' own, less the rows that the missing-EOS rule leaves out
    old_logprobs: Array  # f32[B, T], nats
    ref_logprobs: Array | None  # f32[B, T], nats; None where the stage has no reference
    old_values: Array | None  # f32[B, T]; None, like the returns, without a value model
    advantages: Array  # f32[B, T], whitened when the algorithm says so
    returns: Array | None  # f32[B, T]
    importance: Array | None = None  # f32[B, T], weights of the policy loss's terms; None: all 1
    kl_weights: Array | None = None  # f32[B, T], of the KL's terms in the loss; None: it has none
    old_kl_weights: Array | None = None  # f32[B, T], the same of the KL from the old policy
    scores: Array | None = None  # f32[B], as they were judged; None where nothing is kept of them
    ptx: Rows | None = None  # B rows of their own length: demonstrations, which are learned beside the others


class TrainState(NamedTuple):
    """All that changes during a stage, and all that a resumed run needs."""

    step: Array  # i32[], updates done
    position: Array  # i32[], units of the data order consumed: records, or rows where they are packed
    params: Params  # {role: tree} of the roles that are trained
    opt_state: Params  # {role: optax state}
    aux: dict[str, Array]  # named arrays of the algorithm, such as an adaptive coefficient
    ahead: Rollout | None = None  # of the next step, where it was made before this one's update was done


def token_counts(batch: RecordRows) -> dict[str, float]:
    """Returns metrics of a batch on the host: tokens without padding, the prompts' among them, sequences."""
    parts = parts_of(batch)
    return {
        "perf/tokens": float(sum(rows.lengths.sum() for rows in parts)),
        "perf/prompt_tokens": float(sum(rows.prompt_lengths.sum() for rows in parts)),
        "perf/sequences": float(sum((rows.lengths > 0).sum() for rows in parts)),
    }


def num_rows(batch: object) -> int:
    """Returns the size of the leading axis that all arrays of a batch share."""
    return jax.tree.leaves(batch)[0].shape[0]


def reduce_metrics(stacked: Metrics) -> Metrics:
    """Returns metrics over a leading axis: sums of means' parts, maxima of maxima, averages of the rest."""

    def reduce(metric: Mean | Max | Array | float) -> Mean | Max | Array:
        if isinstance(metric, Mean):
            return Mean(jnp.sum(metric.total, axis=0), jnp.sum(metric.weight, axis=0))
        return Max(jnp.max(metric.value, axis=0)) if isinstance(metric, Max) else jnp.mean(metric, axis=0)

    return {name: reduce(metric) for name, metric in stacked.items()}
