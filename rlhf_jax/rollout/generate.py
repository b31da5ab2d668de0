"""Completions of a batch of prompts: prefill, then one token per row and step, until every row has ended."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.batch import Params, Prompts, Rollout, Rows
from rlhf_jax.models.kv_cache import KVCache, decode_logits, decode_step, prefill, unstack
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.logprobs import contiguous_columns, put_columns
from rlhf_jax.rollout.sampling import most_likely, row_keys, sample, uniforms


class _Progress(NamedTuple):
    """What the decode loop carries; completion column s holds token number s of every row."""

    step: Array  # i32[], tokens drawn
    tokens: Array  # i32[B, C], pad where nothing was drawn
    logprobs: Array  # f32[B, C]
    lengths: Array  # i32[B], tokens of the completion so far, EOS included
    ended: Array  # bool[B], EOS was drawn
    cache: KVCache


def generate(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
    eos_id: int,
    pad_id: int,
) -> Rollout:
    """Returns a completion of each prompt: sampled, or with the most likely token at each step.

    A row's tokens depend on its prompt, the key and the prompt's index alone: not on its neighbours or its
    place among them, and those of a smaller max_new_tokens are a prefix of those of a larger one. A
    completion ends with EOS, or has max_new_tokens tokens. Filling rows draw nothing: their length
    stays 0.

    Args:
        model: reads architecture and compute dtype; params are the policy's.
        params: {"trunk", "lm_head" where embeddings are not tied, and "adapter" where it has one}.
        prompts: right-padded, of static width P.
        key: of this rollout.
        max_new_tokens: C, static.
        temperature: divides the logits; of greedy completions it only changes the log-probabilities.
        greedy: static.
        eos_id: the token that ends a completion.
        pad_id: what stands behind the rows.

    Returns:
        Rows of width P + C, the completion right behind the prompt; ended; sampler_logprobs, 0 outside
            completions.

    Raises:
        ValueError: P + C does not fit the model's context.
    """
    weights = unstack(params, model.architecture, model.dtype, model.lora)
    num_rows = prompts.lengths.shape[0]
    real = prompts.lengths > 0
    keys = row_keys(key, prompts.index, jnp.zeros_like(prompts.index))

    def draw(progress: _Progress, hidden_BD: Array) -> _Progress:
        logits_BV = decode_logits(weights, hidden_BD)
        if greedy:
            tokens_B, logprobs_B = most_likely(logits_BV, temperature)
        else:
            tokens_B, logprobs_B = sample(logits_BV, uniforms(keys, progress.step), temperature)
        live = real & ~progress.ended
        return progress._replace(
            step=progress.step + 1,
            tokens=_write(progress.tokens, jnp.where(live, tokens_B, pad_id), progress.step),
            logprobs=_write(progress.logprobs, jnp.where(live, logprobs_B, 0.0), progress.step),
            lengths=progress.lengths + live,
            ended=progress.ended | (live & (tokens_B == eos_id)),
        )

    def unfinished(progress: _Progress) -> Array:
        return (progress.step < max_new_tokens) & jnp.any(real & ~progress.ended)

    def decode(progress: _Progress) -> _Progress:
        last = progress.step - 1
        tokens_B = jax.lax.dynamic_index_in_dim(progress.tokens, last, axis=1, keepdims=False)
        hidden_BD, cache = decode_step(weights, progress.cache, tokens_B, last)
        return draw(progress._replace(cache=cache), hidden_BD)

    hidden_BD, cache = prefill(weights, prompts.tokens, prompts.lengths, max_new_tokens)
    nothing = _Progress(
        step=jnp.int32(0),
        tokens=jnp.full((num_rows, max_new_tokens), pad_id, jnp.int32),
        logprobs=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        lengths=jnp.zeros_like(prompts.lengths),
        ended=jnp.zeros_like(real),
        cache=cache,
    )
    return _assemble(prompts, jax.lax.while_loop(unfinished, decode, draw(nothing, hidden_BD)), pad_id)


def _write(x_BC: Array, column_B: Array, step: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BC, column_B[:, None], step, axis=1)


def _assemble(prompts: Prompts, progress: _Progress, pad_id: int) -> Rollout:
    """Returns the completions moved right behind their prompts."""
    num_columns = progress.tokens.shape[1]
    columns = contiguous_columns(prompts.lengths, num_columns, prompts.tokens.shape[1] + num_columns)
    padded_prompts = jnp.pad(prompts.tokens, ((0, 0), (0, num_columns)))
    rows = Rows(padded_prompts, prompts.lengths, prompts.lengths + progress.lengths)
    completions = put_columns(progress.tokens, columns)
    tokens = jnp.where(rows.prompt_mask, padded_prompts, jnp.where(rows.completion_mask, completions, pad_id))
    logprobs = put_columns(progress.logprobs, columns)
    return Rollout(
        rows=rows._replace(tokens=tokens),
        ended=progress.ended,
        sampler_logprobs=jnp.where(rows.completion_mask, logprobs, 0.0),
    )
