"""The decode loop: a queue of prompts on a few slots, all on the device.

A slot completes one prompt, or a group of G completions of it. Where R slots are free, the next R prompts of
the queue are prefilled into them; else every slot draws one token. A batch would wait for its longest row.
Devices that divide rows have their own parts of the slots and of the queue; all do the same at the same time,
prefill or decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from rlhf_jax.batch import Prompts
from rlhf_jax.models.kv_cache import (
    DecodeWeights,
    KVCache,
    decode_logits,
    decode_step,
    empty_prompts,
    prefill,
    put_prompts,
    with_room,
)
from rlhf_jax.rollout.sampling import Sampling, most_likely, row_keys, sample, uniforms
from rlhf_jax.shard_map import any_device, by_rows, num_row_parts
from rlhf_jax.sharding import constrain, dividing_sharding


class Queue(NamedTuple):
    """What is to be completed; each prompt has G rows of completions, one behind the other."""

    prompts: Prompts  # of Q prompts
    limits: Array  # i32[Q], the most tokens of a completion, EOS included


class Completions(NamedTuple):
    """What was drawn; column s holds token number s of a row."""

    tokens: Array  # i32[Q * G, C], pad where nothing was drawn
    logprobs: Array  # f32[Q * G, C]
    lengths: Array  # i32[Q * G]
    ended: Array  # bool[Q * G], the last token is one that ends completions


class Slots(NamedTuple):
    """What the loop carries: N slots, B = N * G rows."""

    cache: KVCache
    prompt: Array  # i32[N], which of its queue each slot completes
    tokens: Array  # i32[B], the newest of each row
    counts: Array  # i32[B], tokens of each row so far
    live: Array  # bool[B], rows that go on
    taken: Array  # i32[devices that divide rows], prompts that have left their queues
    done: Completions
    steps: Array  # i32[], decode steps of all slots
    refills: Array  # i32[]
    wants: Array  # bool[], prompts wait for slots that are free
    going: Array  # bool[], something is left to do


_Drawn = tuple[Completions, Array, Array, Array]


@dataclass(frozen=True)
class Engine:
    """The loop's static settings."""

    num_columns: int
    """C, the most tokens of any completion."""
    pad_id: int
    """What stands where no token was drawn."""
    num_slots: int = 0
    """N, on all devices; 0, or more than there are prompts: one for each."""
    refill_size: int = 0
    """R, slots of a device that are filled at once; 0: an eighth of them."""
    group_size: int = 1
    """G."""
    greedy: bool = False

    def start(self, weights: DecodeWeights, prompts: Prompts) -> Slots:
        """Returns empty slots, before a queue of Q prompts of up to P tokens.

        Raises:
            ValueError: P + C does not fit the context, or the devices do not divide prompts and slots.
        """
        num_prompts, width = prompts.tokens.shape
        limit = weights.architecture.context_length
        if width + self.num_columns > limit:
            raise ValueError(
                f"prompts of up to {width} tokens and completions of up to {self.num_columns} do not fit the "
                f"model's context length of {limit}; shorten one of them"
            )
        num_slots = min(self.num_slots or num_prompts, num_prompts)
        if num_prompts % num_row_parts() or num_slots % num_row_parts():
            raise ValueError(
                f"{num_prompts} prompts and {num_slots} slots must be multiples of {num_row_parts()}, the "
                "devices over which rows are divided"
            )
        num_rows = num_prompts * self.group_size
        prompt_cache = empty_prompts(weights, num_slots, width)
        cache = with_room(prompt_cache, self.num_columns, self.group_size)
        rows = jnp.zeros(num_slots * self.group_size, jnp.int32)
        done = Completions(
            tokens=jnp.full((num_rows, self.num_columns), self.pad_id, jnp.int32),
            logprobs=jnp.zeros((num_rows, self.num_columns), jnp.float32),
            lengths=jnp.zeros(num_rows, jnp.int32),
            ended=jnp.zeros(num_rows, bool),
        )
        slots = Slots(
            cache=cache,
            prompt=jnp.zeros(num_slots, jnp.int32),
            tokens=rows,
            counts=rows,
            live=jnp.zeros_like(rows, bool),
            taken=jnp.zeros(num_row_parts(), jnp.int32),
            done=done,
            steps=jnp.int32(0),
            refills=jnp.int32(0),
            wants=jnp.bool(True),
            going=jnp.bool(True),
        )
        return laid_out(slots)

    def run(
        self,
        weights: DecodeWeights,
        queue: Queue,
        sampling: Sampling,
        key: Array,
        slots: Slots,
        max_steps: Array | int = 2**30,
    ) -> Slots:
        """Returns the slots after at most so many more decode steps, or when every row has ended.

        What is drawn does not depend on the number of slots or steps, or on the devices: a row's random
        numbers are those of its prompt's index, its number in the group, and the token's number.

        Args:
            weights: of the policy.
            queue: of Q prompts.
            sampling: how tokens are drawn; of greedy completions only the temperature is read, for their
                log-probabilities.
            key: of this rollout.
            slots: of `start`, or of `run` with the same arguments.
            max_steps: i32[].
        """

        def on_device(
            rows: tuple[Queue, Slots], whole: tuple[DecodeWeights, Sampling, Array, Array]
        ) -> tuple[Queue, Slots]:
            return rows[0], self._run(*whole, *rows)

        queue, sampling = jax.tree.map(jnp.asarray, (queue, sampling))
        whole = weights, sampling, key, slots.steps + max_steps
        # Laid out as `start` does, so that going on compiles nothing anew.
        return laid_out(by_rows(on_device, (queue, slots), whole)[1])

    def end(self, slots: Slots, stops: Array) -> Slots:
        """Returns the slots with rows that the host has cut: each has ended with its last token.

        Args:
            slots: of `run`, which is then called with these.
            stops: i32[Q * G], the tokens that are left of each row; 0 where it stays as it is.
        """

        def on_device(rows: tuple[Array, Slots], whole: tuple[()]) -> tuple[Array, Slots]:
            stops, slots = rows
            is_cut = stops > 0
            done = slots.done._replace(
                lengths=jnp.where(is_cut, stops, slots.done.lengths), ended=slots.done.ended | is_cut
            )
            live = slots.live & ~is_cut[self._rows(slots.prompt)]
            return stops, slots._replace(live=live, done=done)

        return laid_out(by_rows(on_device, (stops, slots), ())[1])

    def _run(
        self,
        weights: DecodeWeights,
        sampling: Sampling,
        key: Array,
        last_step: Array,
        queue: Queue,
        slots: Slots,
    ) -> Slots:
        num_prompts, num_slots = len(queue.limits), len(slots.prompt)
        refill_size = num_slots if num_slots == num_prompts else self.refill_size or -(-num_slots // 8)
        refill_size = min(refill_size, num_slots)
        index = jnp.repeat(queue.prompts.index, self.group_size)
        keys = row_keys(key, index, jnp.tile(jnp.arange(self.group_size), num_prompts))
        limits = jnp.repeat(queue.limits, self.group_size)

        def draw(slots: Slots, hidden: Array, rows: Array, drawn: Array, counts: Array) -> _Drawn:
            """Returns (completions, tokens, counts, live) of one more token for completions `rows`."""
            logits = decode_logits(weights, hidden)
            if self.greedy:
                tokens, logprobs = most_likely(logits, sampling.temperature)
            else:
                tokens, logprobs = sample(logits, uniforms(keys[rows], counts), sampling)
            stops = drawn & jnp.isin(tokens, sampling.stop_ids)
            where = jnp.where(drawn, rows, len(keys))  # behind the last: left out
            done = Completions(
                slots.done.tokens.at[where, counts].set(tokens, mode="drop"),
                slots.done.logprobs.at[where, counts].set(logprobs, mode="drop"),
                slots.done.lengths.at[where].set(counts + 1, mode="drop"),
                slots.done.ended.at[where].set(stops, mode="drop"),
            )
            counts = counts + drawn
            return done, tokens, counts, drawn & ~stops & (counts < limits[rows])

        def told(slots: Slots) -> Slots:
            """Returns the slots, and on every device whether any wants prompts or goes on."""
            free = jnp.sum(~self._busy(slots))
            waiting = slots.taken[0] < num_prompts
            wants = waiting & (free >= refill_size)
            going = waiting | jnp.any(slots.live)
            wants, going = any_device(jnp.stack([wants, going]))
            return slots._replace(wants=wants, going=going)

        def refill(slots: Slots) -> Slots:
            order = jnp.argsort(self._busy(slots), stable=True)[:refill_size]  # free slots first
            prompt = slots.taken[0] + jnp.arange(len(order))
            taken = ~self._busy(slots)[order] & (prompt < num_prompts)
            prompt = jnp.minimum(prompt, num_prompts - 1)
            lengths = queue.prompts.lengths[prompt]
            hidden, new = prefill(weights, queue.prompts.tokens[prompt], lengths)
            drawn = jnp.repeat(taken & (lengths > 0) & (queue.limits[prompt] > 0), self.group_size)
            at = jnp.where(taken, order, num_slots)
            at_rows, rows = self._rows(at), self._rows(prompt)
            done, tokens, counts, live = draw(
                slots, jnp.repeat(hidden, self.group_size, axis=0), rows, drawn, jnp.zeros_like(rows)
            )
            return told(
                slots._replace(
                    # Where all prompts have slots, one refill takes them all, in their order.
                    cache=slots.cache._replace(prompt=new)
                    if num_slots == num_prompts
                    else put_prompts(slots.cache, new, order, taken),
                    prompt=slots.prompt.at[at].set(prompt, mode="drop"),
                    tokens=slots.tokens.at[at_rows].set(tokens, mode="drop"),
                    counts=slots.counts.at[at_rows].set(counts, mode="drop"),
                    live=slots.live.at[at_rows].set(live, mode="drop"),
                    taken=slots.taken + jnp.sum(taken),
                    done=done,
                    refills=slots.refills + 1,
                )
            )

        def decode(slots: Slots) -> Slots:
            rows = self._rows(slots.prompt)
            counts = jnp.maximum(slots.counts, 1)  # an empty slot has a token too: its numbers stay finite
            hidden, cache = decode_step(weights, slots.cache, slots.tokens, counts)
            done, tokens, counts, live = draw(slots, hidden, rows, slots.live, slots.counts)
            slots = slots._replace(cache=cache, tokens=tokens, counts=counts, live=live, done=done)
            return told(slots._replace(steps=slots.steps + 1))

        def wants(slots: Slots) -> Array:
            return slots.wants & (slots.steps < last_step)

        def decodes(slots: Slots) -> Array:
            return slots.going & ~slots.wants & (slots.steps < last_step)

        def refill_then_decode(slots: Slots) -> Slots:
            return jax.lax.while_loop(decodes, decode, jax.lax.while_loop(wants, refill, slots))

        return jax.lax.while_loop(
            lambda slots: slots.going & (slots.steps < last_step),
            refill_then_decode,
            told(slots),  # the host may have ended rows
        )

    def _rows(self, numbers: Array) -> Array:
        """Returns i32[n * G], the rows of prompts or slots of these numbers."""
        return (numbers[:, None] * self.group_size + jnp.arange(self.group_size)).ravel()

    def _busy(self, slots: Slots) -> Array:
        """Returns bool[N]: slots of which a row goes on."""
        return jnp.any(slots.live.reshape(-1, self.group_size), axis=1)


def _axes(x: Array) -> tuple[str, ...]:
    """Returns the logical axes of one of the arrays that the loop carries."""
    return ("batch", "kv_heads", "whole_length", "head_dim") if x.ndim == 4 else ("batch",) * min(x.ndim, 1)


def laid_out(slots: Slots) -> Slots:
    """Returns the slots with their arrays divided over the mesh."""
    return jax.tree.map(lambda x: constrain(x, _axes(x)), slots)


def slot_shardings(mesh: Mesh, slots: Slots) -> Slots:
    """Returns the sharding of each of the arrays that the loop carries, or of their shapes."""
    return jax.tree.map(lambda x: dividing_sharding(mesh, _axes(x), x.shape), slots)
