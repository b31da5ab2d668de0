"""Completions of a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import watchdog
from rlhf_jax.batch import Params, Prompts, Rollout, Rows
from rlhf_jax.models.kv_cache import DecodeWeights, unstack
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.logprobs import contiguous_columns, put_columns
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.rollout.slots import Completions, Engine, Queue, Slots
from rlhf_jax.rollout.stops import StopStrings, StopWatch
from rlhf_jax.sharding import gathered


def generate(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Array,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    pad_id: int,
    limits: Array | None = None,
    greedy: bool = False,
    num_slots: int = 0,
    refill_size: int = 0,
    group_size: int = 1,
) -> Rollout:
    """Returns G completions of each of Q prompts: sampled, or with the most likely token at each step.

    A row's tokens depend on its prompt, the key, the prompt's index and the row's number in its group alone:
    not on its neighbours, its place among them, or the number of slots; and those of a smaller
    max_new_tokens are a prefix of those of a larger one. A completion ends with a token of
    sampling.stop_ids, or has max_new_tokens tokens. Filling rows draw nothing: their length stays 0.

    Args:
        model: reads architecture and compute dtype; params are the policy's.
        params: {"trunk", "lm_head" where embeddings are not tied, and "adapter" where it has one}.
        prompts: right-padded, of static width P.
        key: of this rollout.
        sampling: how tokens are drawn.
        max_new_tokens: C, static.
        pad_id: what stands behind the rows.
        limits: i32[Q], the most tokens of each prompt's completions, or i32[Q * G], of each completion; C by
            default and at most.
        greedy: static.
        num_slots: static, of a prompt each, on all devices; 0: one for each prompt.
        refill_size: static, prompts that a device prefills at once; 0: for a quarter of its slots.
        group_size: G, static.

    Returns:
        Q * G rows of width P + C, the completion right behind the prompt; ended; sampler_logprobs, 0 outside
            completions.

    Raises:
        ValueError: P + C does not fit the model's context, or the devices do not divide prompts and slots.
    """
    weights = unstack(params, model.architecture, model.dtype, model.lora)
    engine = Engine(max_new_tokens, pad_id, num_slots, refill_size, group_size, greedy)
    slots = engine.start(weights, prompts)
    queue = make_queue(prompts, max_new_tokens, limits)
    slots = engine.run(weights, queue, sampling, key, slots)
    return assemble(prompts, engine.in_order(queue, slots.done), pad_id)


class RolloutPrograms(NamedTuple):
    """The compiled rollout of a stage, which returns to the host after some decode steps and refills."""

    start: Callable[[Params, Params, Prompts], tuple[DecodeWeights, Slots]]
    """Trained and frozen parameters, prompts -> the policy's weights as decoding wants them, empty slots."""
    run: Callable[[DecodeWeights, Prompts, Array, Slots], Slots]
    """Weights, prompts, key, slots (donated) -> the slots some steps later."""
    end: Callable[[Slots, Array], Slots]
    """Slots (donated), tokens left of rows that the host has cut -> slots in which they have ended."""
    finish: Callable[[Prompts, Completions], Rollout]
    """Prompts, what was drawn -> rows."""
    stops: StopStrings | None = None
    """Strings that end completions."""

    def __call__(self, params: Params, frozen: Params, prompts: Prompts, key: Array) -> Rollout:
        """Returns completions of the prompts by the policy."""
        return self.begin(params, frozen, prompts, key)()

    def begin(self, params: Params, frozen: Params, prompts: Prompts, key: Array) -> Callable[[], Rollout]:
        """Returns what waits for the completions and returns them; the first steps are on their way."""
        weights, slots = self.start(params, frozen, prompts)
        run = partial(self.run, weights, prompts, key)
        slots = run(slots)

        def finish() -> Rollout:
            watch = StopWatch(self.stops) if self.stops else None
            return self.finish(prompts, run_to_end(run, self.end, slots, watch).done)

        return finish


def run_to_end(
    run: Callable[[Slots], Slots], end: Callable[[Slots, Any], Slots], slots: Slots, watch: StopWatch | None
) -> Slots:
    """Returns the slots when all of their rows have ended.

    Args:
        run: some steps of the loop; slots are donated.
        end: as in `RolloutPrograms`.
        slots: of `run`.
        watch: looks for stop strings whenever `run` returns.
    """
    while True:
        is_going = bool(np.asarray(slots.going))
        if watch is not None:
            stops = watch(*gathered((slots.done.tokens, slots.done.lengths)))
            slots = end(slots, stops)  # also where none is met: nothing is compiled later than at first
        if not is_going:
            return slots
        watchdog.beat()
        slots = run(slots)


def make_queue(prompts: Prompts, max_new_tokens: int, limits: Array | None = None) -> Queue:
    """Returns prompts with the most tokens of each one's completions, which is max_new_tokens at most."""
    if limits is None:
        limits = jnp.full(len(prompts.lengths), max_new_tokens, jnp.int32)
    return Queue(prompts, jnp.minimum(limits, max_new_tokens))


def assemble(prompts: Prompts, done: Completions, pad_id: int) -> Rollout:
    """Returns the completions, moved right behind their prompts."""
    num_rows, num_columns = done.tokens.shape
    group_size = num_rows // len(prompts.lengths)
    prompt_lengths = jnp.repeat(prompts.lengths, group_size)
    columns = contiguous_columns(prompt_lengths, num_columns, prompts.tokens.shape[1] + num_columns)
    padded_prompts = jnp.repeat(jnp.pad(prompts.tokens, ((0, 0), (0, num_columns))), group_size, axis=0)
    rows = Rows(padded_prompts, prompt_lengths, prompt_lengths + done.lengths)
    tokens = jnp.where(rows.completion_mask, put_columns(done.tokens, columns), pad_id)
    return Rollout(
        rows=rows._replace(tokens=jnp.where(rows.prompt_mask, padded_prompts, tokens)),
        ended=done.ended,
        sampler_logprobs=jnp.where(rows.completion_mask, put_columns(done.logprobs, columns), 0.0),
    )
