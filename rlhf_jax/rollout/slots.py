"""The decode loop: a queue of prompts on a few slots, all on the device.

A slot completes one prompt, or a group of G completions of it, and takes the next when it has ended: a batch
would wait for its longest row. Prompts are prefilled R at once, which costs much less than one by one, into a
reserve, from which slots take them as they become free. Each step either refills the reserve, where it is
empty and a slot is free, or draws one token in every slot.
Devices that divide rows have their own parts of the slots and of the queue; all do the same at the same time,
prefill or decode. So that they end together, prompts are dealt to them by what is known of their lengths.
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
    PromptCache,
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
    limits: Array
    """i32[Q] or i32[Q * G]: the most tokens of a prompt's completions, or of each completion, with EOS."""


class Completions(NamedTuple):
    """What was drawn; column s holds token number s of a row."""

    tokens: Array  # i32[Q * G, C], pad where nothing was drawn
    logprobs: Array  # f32[Q * G, C]
    lengths: Array  # i32[Q * G]
    ended: Array  # bool[Q * G], the last token is one that ends completions


class Reserve(NamedTuple):
    """R prompts on each device that divides rows, prefilled before there are slots for them."""

    prompts: PromptCache
    hidden: Array  # [R * devices, D], of each prompt's last token
    end: Array  # i32[devices], prompts that have left their queues for the reserve; it has the last R of them


class Slots(NamedTuple):
    """What the loop carries: N slots, B = N * G rows."""

    cache: KVCache
    reserve: Reserve | None  # None: every prompt has a slot from the start
    first: Array | None  # [N, D], the hidden state of each slot's prompt, which predicts the first token
    prompt: Array  # i32[N], which of its queue each slot completes
    tokens: Array  # i32[B], the newest of each row
    counts: Array  # i32[B], tokens of each row so far
    live: Array  # bool[B], rows that go on
    taken: Array  # i32[devices that divide rows], prompts that slots have taken
    done: Completions  # in the order in which prompts are dealt, see `Engine.in_order`
    steps: Array  # i32[], decode steps of all slots
    refills: Array  # i32[]
    wants: Array  # bool[], slots are free, prompts wait, and the reserve is empty
    going: Array  # bool[], something is left to do


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
    """R, prompts that a device prefills at once, before slots take them; 0: for a quarter of its slots."""
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
        num_slots = self._num_slots(num_prompts)
        if num_prompts % num_row_parts() or num_slots % num_row_parts():
            raise ValueError(
                f"{num_prompts} prompts and {num_slots} slots must be multiples of {num_row_parts()}, the "
                "devices over which rows are divided"
            )
        num_rows = num_prompts * self.group_size
        prompt_cache = empty_prompts(weights, num_slots, width)
        cache = with_room(prompt_cache, self.num_columns, self.group_size)
        reserve = first = None
        if num_slots < num_prompts:
            size = self._reserve_size(num_slots // num_row_parts()) * num_row_parts()
            embedding = weights.params["trunk"]["embed"]["embedding"]
            hidden = jnp.zeros((size, embedding.shape[1]), embedding.dtype)
            none_taken = jnp.zeros(num_row_parts(), jnp.int32)
            reserve = Reserve(empty_prompts(weights, size, width), hidden, none_taken)
            first = jnp.zeros((num_slots, embedding.shape[1]), embedding.dtype)
        rows = jnp.zeros(num_slots * self.group_size, jnp.int32)
        done = Completions(
            tokens=jnp.full((num_rows, self.num_columns), self.pad_id, jnp.int32),
            logprobs=jnp.zeros((num_rows, self.num_columns), jnp.float32),
            lengths=jnp.zeros(num_rows, jnp.int32),
            ended=jnp.zeros(num_rows, bool),
        )
        slots = Slots(
            cache=cache,
            reserve=reserve,
            first=first,
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
        """Returns the slots after at most so many more decode steps and refills, or when all rows have ended.

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
        if (order := self._dealt(queue)) is not None:
            limits = queue.limits.reshape(len(order), -1)[order].ravel()
            queue = Queue(jax.tree.map(lambda x: x[order], queue.prompts), limits)
        whole = weights, sampling, key, slots.steps + slots.refills + max_steps
        # Laid out as `start` does, so that going on compiles nothing anew.
        return laid_out(by_rows(on_device, (queue, slots), whole)[1])

    def end(self, slots: Slots, stops: Array) -> Slots:
        """Returns the slots with rows that the host has cut: each has ended with its last token.

        Args:
            slots: of `run`, which is then called with these.
            stops: i32[Q * G], the tokens that are left of each row, in the order of `Slots.done`; 0 where it
                stays as it is.
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

    def in_order(self, queue: Queue, done: Completions) -> Completions:
        """Returns what `run` has drawn, in the queue's order."""
        order = self._dealt(queue)
        if order is None:
            return done
        rows = self._rows(jnp.argsort(order))
        return jax.tree.map(lambda x: x[rows], done)

    def _num_slots(self, num_prompts: int) -> int:
        return min(self.num_slots or num_prompts, num_prompts)

    def _reserve_size(self, num_slots: int) -> int:
        """Returns R, for the slots of a device."""
        return min(self.refill_size or -(-num_slots // 4), num_slots)

    def _dealt(self, queue: Queue) -> Array | None:
        """Returns i32[Q], the prompts in the order in which devices get them, in parts; None: as they are.

        Those that may become longest come first, and go to the devices in turn, to and fro: expected lengths
        then are as even as they can be told. What is drawn does not depend on it.
        """
        num_prompts, parts = len(queue.prompts.lengths), num_row_parts()
        if parts == 1 or self._num_slots(num_prompts) == num_prompts:
            return None
        lengths = queue.prompts.lengths
        longest = queue.limits.reshape(num_prompts, -1).max(axis=1)
        order = jnp.lexsort((-lengths, -jnp.where(lengths > 0, longest, 0)))
        turns = order.reshape(-1, parts)
        return turns.at[1::2].set(turns[1::2, ::-1]).T.ravel()

    def _run(
        self,
        weights: DecodeWeights,
        sampling: Sampling,
        key: Array,
        budget: Array,
        queue: Queue,
        slots: Slots,
    ) -> Slots:
        num_prompts, num_slots = len(queue.prompts.lengths), len(slots.prompt)
        index = jnp.repeat(queue.prompts.index, self.group_size)
        keys = row_keys(key, index, jnp.tile(jnp.arange(self.group_size), num_prompts))
        limits = jnp.repeat(queue.limits, len(keys) // len(queue.limits))
        starts = jnp.repeat(queue.prompts.lengths > 0, self.group_size) & (limits > 0)

        def draw(slots: Slots, hidden: Array) -> Slots:
            """Returns the slots with one more token of every row that goes on, from hidden states [B, D]."""
            rows, counts, live = self._rows(slots.prompt), slots.counts, slots.live
            logits = decode_logits(weights, hidden)
            if self.greedy:
                tokens, logprobs = most_likely(logits, sampling.temperature)
            else:
                tokens, logprobs = sample(logits, uniforms(keys[rows], counts), sampling)
            stops = live & jnp.isin(tokens, sampling.stop_ids)
            where = jnp.where(live, rows, len(keys))  # behind the last: left out
            done = Completions(
                slots.done.tokens.at[where, counts].set(tokens, mode="drop"),
                slots.done.logprobs.at[where, counts].set(logprobs, mode="drop"),
                slots.done.lengths.at[where].set(counts + 1, mode="drop"),
                slots.done.ended.at[where].set(stops, mode="drop"),
            )
            counts = counts + live
            live = live & ~stops & (counts < limits[rows])
            return slots._replace(tokens=tokens, counts=counts, live=live, done=done)

        def take(slots: Slots) -> Slots:
            """Returns the slots with prompts of the reserve in those that are free."""
            reserve, taken = slots.reserve, slots.taken[0]
            assert reserve is not None and slots.first is not None
            busy = self._busy(slots)
            order = jnp.argsort(busy, stable=True)  # free slots first
            count = jnp.minimum(jnp.sum(~busy), jnp.minimum(reserve.end[0], num_prompts) - taken)
            is_put = jnp.arange(num_slots) < count
            prompt = jnp.where(is_put, taken + jnp.arange(num_slots), 0)
            source = jnp.where(is_put, prompt - (reserve.end[0] - len(reserve.hidden)), 0)
            at = jnp.where(is_put, order, num_slots)
            return slots._replace(
                cache=put_prompts(slots.cache, reserve.prompts, source, order, count),
                first=slots.first.at[at].set(reserve.hidden[source], mode="drop"),
                prompt=slots.prompt.at[at].set(prompt, mode="drop"),
                counts=slots.counts.at[self._rows(at)].set(0, mode="drop"),
                live=slots.live.at[self._rows(at)].set(starts[self._rows(prompt)], mode="drop"),
                taken=slots.taken + count,
            )

        def told(slots: Slots) -> Slots:
            """Returns the slots, and on every device whether any wants prompts or goes on."""
            wants, going = self._wants(slots, num_prompts), jnp.any(slots.live)
            wants, going = any_device(jnp.stack([wants, going | (slots.taken[0] < num_prompts)]))
            return slots._replace(wants=wants, going=going)

        def refill(slots: Slots) -> Slots:
            slots = slots._replace(refills=slots.refills + 1)
            if slots.reserve is None:  # all prompts have slots, in their order
                hidden, new = prefill(weights, queue.prompts.tokens, queue.prompts.lengths)
                slots = slots._replace(
                    cache=slots.cache._replace(prompt=new),
                    prompt=slots.taken[0] + jnp.arange(num_slots),
                    live=starts,
                    taken=slots.taken + num_prompts,
                )
                return told(draw(slots, jnp.repeat(hidden, self.group_size, axis=0)))
            reserve = slots.reserve
            prompt = jnp.minimum(reserve.end[0] + jnp.arange(len(reserve.hidden)), num_prompts - 1)
            hidden, new = prefill(weights, queue.prompts.tokens[prompt], queue.prompts.lengths[prompt])
            refilled = Reserve(new, hidden, reserve.end + len(prompt))
            is_own = self._wants(slots, num_prompts)  # else another device's
            reserve = jax.tree.map(lambda new, old: jnp.where(is_own, new, old), refilled, reserve)
            return told(take(slots._replace(reserve=reserve)))

        def decode(slots: Slots) -> Slots:
            counts = jnp.maximum(slots.counts, 1)  # an empty slot has a token too: its numbers stay finite
            hidden, cache = decode_step(weights, slots.cache, slots.tokens, counts)
            slots = slots._replace(cache=cache, steps=slots.steps + 1)
            if slots.first is None:
                return told(draw(slots, hidden))
            first = jnp.repeat(slots.first, self.group_size, axis=0)
            return told(take(draw(slots, jnp.where(slots.counts[:, None] == 0, first, hidden))))

        def goes_on(slots: Slots) -> Array:
            return slots.going & (slots.steps + slots.refills < budget)

        def wants(slots: Slots) -> Array:
            return slots.wants & goes_on(slots)

        def decodes(slots: Slots) -> Array:
            return ~slots.wants & goes_on(slots)

        def refill_then_decode(slots: Slots) -> Slots:
            return jax.lax.while_loop(decodes, decode, jax.lax.while_loop(wants, refill, slots))

        return jax.lax.while_loop(goes_on, refill_then_decode, told(slots))  # the host may have ended rows

    def _wants(self, slots: Slots, num_prompts: int) -> Array:
        """Returns bool[]: this device has a free slot, and prompts for it that are not yet prefilled."""
        end = slots.taken if slots.reserve is None else slots.reserve.end
        is_empty = slots.taken[0] == end[0]
        return is_empty & (end[0] < num_prompts) & ~jnp.all(self._busy(slots))

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
