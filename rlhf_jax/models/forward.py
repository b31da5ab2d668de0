"""What algorithms see of the models: pure callables of parameters and rows. Role routing lives here alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Params, Rows
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.logprobs import (
    Columns,
    contiguous_columns,
    gather_predictors,
    gather_targets,
    masked_columns,
    put_columns,
    token_logprobs,
)

RoleFunction = Callable[[Params, Params, Rows], Array]


class Forward(NamedTuple):
    """Forward passes by role; each takes the trained parameters, the frozen ones, and the rows.

    A role is looked up among the trained parameters first. Per-token results are [B, T], zero outside the
    completion.
    """

    logprobs: Callable[[Params, Params, Rows], tuple[Array, Array]]
    """Of the policy: log-probabilities f32[B, T] in nats, entropies f32[B, T] in nats."""
    ref_logprobs: RoleFunction
    """Of the reference, f32[B, T]."""
    values: RoleFunction
    """Of the value model, f32[B, T]; column t is the state before token t."""
    scores: RoleFunction
    """Of the reward model, at the last real token of each sequence: f32[B], packed f32[B * S]."""


def make_forward(
    model: Model, num_completion: int, temperature: float = 1.0, logprob_chunk: int = 0
) -> Forward:
    """Returns the forward passes of a model.

    Args:
        model: the transformer's pure functions.
        num_completion: C, the static maximum of completion tokens of a row; the LM head runs on C columns.
        temperature: divides the logits of policy and reference.
        logprob_chunk: tokens whose logits exist at once; 0: all.
    """

    def hidden(trunk: Params, rows: Rows) -> Array:
        if rows.is_packed:
            return model.hidden(trunk, rows.tokens, rows.positions, rows.segments)
        return model.hidden(trunk, rows.tokens)

    def columns(rows: Rows) -> Columns:
        num_tokens = rows.tokens.shape[1]
        num_columns = min(num_completion, num_tokens)
        if rows.is_packed or rows.excluded is not None:
            return masked_columns(rows.completion_mask, num_columns)
        return contiguous_columns(rows.prompt_lengths, num_columns, num_tokens)

    def put(x_BC: Array, rows: Rows) -> Array:
        return jnp.where(rows.completion_mask, put_columns(x_BC, columns(rows)), 0.0)

    def role_logprobs(weights: Params, rows: Rows, *, with_entropy: bool) -> tuple[Array, Array | None]:
        logprobs_BC, entropy_BC = token_logprobs(
            partial(model.logits, weights),
            gather_predictors(hidden(weights["trunk"], rows), columns(rows)),
            gather_targets(rows.tokens, columns(rows)),
            temperature=temperature,
            chunk=logprob_chunk,
            with_entropy=with_entropy,
        )
        return put(logprobs_BC, rows), None if entropy_BC is None else put(entropy_BC, rows)

    def logprobs(params: Params, frozen: Params, rows: Rows) -> tuple[Array, Array]:
        logprobs, entropy = role_logprobs((frozen | params)["policy"], rows, with_entropy=True)
        assert entropy is not None
        return logprobs, entropy

    def ref_logprobs(params: Params, frozen: Params, rows: Rows) -> Array:
        return role_logprobs((frozen | params)["reference"], rows, with_entropy=False)[0]

    def values(params: Params, frozen: Params, rows: Rows) -> Array:
        weights = (frozen | params)["value"]
        before = gather_predictors(hidden(weights["trunk"], rows), columns(rows))
        return put(heads.values(weights["score_head"], before), rows)

    def scores(params: Params, frozen: Params, rows: Rows) -> Array:
        weights = (frozen | params)["reward"]
        return heads.scores(weights["score_head"], hidden(weights["trunk"], rows), rows.lengths)

    return Forward(logprobs, ref_logprobs, values, scores)


def blank_forward() -> Forward:
    """Returns a forward of zeros: it gives a loss's weights, which depend on masks and data alone."""

    def per_token(params: Params, frozen: Params, rows: Rows) -> Array:
        return jnp.zeros(rows.tokens.shape, jnp.float32)

    def per_sequence(params: Params, frozen: Params, rows: Rows) -> Array:
        return jnp.zeros(rows.lengths.size, jnp.float32)

    return Forward(lambda *args: (per_token(*args), per_token(*args)), per_token, per_token, per_sequence)
