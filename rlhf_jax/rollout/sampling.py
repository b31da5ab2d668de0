"""One token per row from its logits, and the random number that chooses it.

A draw needs one uniform number per row, and reads the logits twice (their maximum, their exponentials' sums
by block): the cumulative distribution is inverted in two levels, first over blocks of the vocabulary, then
within the block. Noise for every word, as jax.random.categorical makes it, costs as much as a small model.
Truncation (top-k, top-p, min-p) finds the least logit that stays by bisection, bit by bit, without a sort.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.config import RolloutConfig
from rlhf_jax.sharding import constrain, num_parts

BLOCK = 128  # words; a TPU's lane width


class Sampling(NamedTuple):
    """How tokens are drawn. Another value compiles nothing anew; only whether there is one does."""

    temperature: Array | float
    """f32[], above 0; divides the logits."""
    stop_ids: Array
    """i32[n], tokens that end a completion."""
    top_k: Array | int | None = None
    """i32[], at least 1: only the k most likely words, and equals of the last of them."""
    top_p: Array | float | None = None
    """f32[] in (0, 1]: of these, the fewest whose share is at least p."""
    min_p: Array | float | None = None
    """f32[] in (0, 1]: no word less likely than p times the likeliest."""

    @property
    def truncates(self) -> bool:
        """Returns whether some words are never drawn."""
        return any(limit is not None for limit in (self.top_k, self.top_p, self.min_p))


def read_sampling(cfg: RolloutConfig, stop_ids: Array) -> Sampling:
    """Returns how tokens are drawn by the options of a configuration.

    Args:
        cfg: reads temperature, top_k, top_p, min_p.
        stop_ids: i32[n].
    """
    return Sampling(
        cfg.temperature,
        stop_ids,
        top_k=cfg.top_k or None,
        top_p=None if cfg.top_p == 1 else cfg.top_p,
        min_p=cfg.min_p or None,
    )


def row_keys(key: Array, prompt_index: Array, sample_index: Array) -> Array:
    """Returns a key for each row, key[B], by what the row is about and not by where it stands.

    Args:
        key: of this rollout.
        prompt_index: i32[B], the prompt's position in the data order.
        sample_index: i32[B], which of the prompt's completions.
    """
    fold = jax.vmap(jax.random.fold_in)
    prompt_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, prompt_index)
    return fold(prompt_keys, sample_index)


def uniforms(keys: Array, positions: Array) -> Array:
    """Returns f32[B] in (0, 1): the random number of token number positions[b] of each row's completion.

    They are the middles of 2^23 equal intervals. Their left ends would have 0 among them, which draws the
    first word of the vocabulary, however improbable, once in 2^23 tokens.

    Args:
        keys: key[B], of `row_keys`.
        positions: i32[B], or i32[] where they are the same.
    """
    positions = jnp.broadcast_to(positions, keys.shape)
    fold = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))
    return fold(keys, positions) + 2.0**-24


def sample(logits: Array, uniforms: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Returns a token for each row, drawn as `sampling` says, and its log-probability.

    The token is the first at which the cumulative probability exceeds the row's number; it never is one whose
    probability is 0 in float32.

    Args:
        logits: f32[B, V].
        uniforms: f32[B] in [0, 1); their resolution is that of the probabilities.
        sampling: temperature, and what is left out.

    Returns:
        tokens i32[B], logprobs f32[B] in nats: of softmax(logits / temperature), truncated or not.
    """
    scaled = logits / sampling.temperature
    blocks = _blocks(scaled)
    largest = jnp.max(blocks, axis=(-2, -1))
    sums = jnp.sum(jnp.exp(blocks - largest[:, None, None]), axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    whole = total = cumulative[:, -1]
    if sampling.truncates:
        blocks = jnp.where(blocks >= least_kept(scaled, sampling)[:, None, None], blocks, -jnp.inf)
        sums = jnp.sum(jnp.exp(blocks - largest[:, None, None]), axis=-1)
        cumulative = jnp.cumsum(sums, axis=-1)
        total = cumulative[:, -1]

    target = uniforms * total
    block = _first_beyond(cumulative, sums, target)
    before = _pick(cumulative, block) - _pick(sums, block)

    shifted = _pick(blocks, block) - largest[:, None]
    weights = jnp.exp(shifted)
    word = _first_beyond(jnp.cumsum(weights, axis=-1), weights, target - before)
    return (block * blocks.shape[2] + word).astype(jnp.int32), _pick(shifted, word) - jnp.log(whole)


def least_kept(scaled: Array, sampling: Sampling) -> Array:
    """Returns f32[B], the least of each row's logits that truncation keeps; words equal to it stay too.

    Top-k comes first, top-p is of the probabilities that are left, then min-p, as in transformers.

    Args:
        scaled: f32[B, V], logits / temperature.
        sampling: says which truncation there is.
    """
    largest = jnp.max(scaled, axis=-1)
    least = jnp.full_like(largest, -jnp.inf)
    if sampling.top_k is not None:
        least = _least_of_mass(scaled, jnp.ones_like(scaled), jnp.full_like(largest, sampling.top_k))
    if sampling.top_p is not None:
        weights = jnp.exp(scaled - largest[:, None])
        weights = jnp.where(scaled >= least[:, None], weights, 0.0)
        nucleus = _least_of_mass(scaled, weights, sampling.top_p * jnp.sum(weights, axis=-1))
        least = jnp.maximum(least, nucleus)  # rounding may find less than all of the mass for p = 1
    if sampling.min_p is not None:
        least = jnp.maximum(least, largest + jnp.log(sampling.min_p))
    return least


def _least_of_mass(x: Array, weights: Array, mass: Array) -> Array:
    """Returns the largest t[B] at which the weights of the entries x >= t sum up to the mass.

    It sets the bits of t from the highest on, in the order of unsigned numbers that is that of floats.
    """
    ordered = _ordered(x)

    def set_bit(i: Array, t: Array) -> Array:
        candidate = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        above = jnp.sum(jnp.where(ordered >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(above >= mass, candidate, t)

    found = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(mass, jnp.uint32))
    return jnp.where(found == 0, -jnp.inf, _floats(found))  # all entries together may have less


def _ordered(x: Array) -> Array:
    """Returns u32 of f32, in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _floats(ordered: Array) -> Array:
    """Returns the f32 of `_ordered`."""
    bits = jnp.where(ordered >> 31 == 1, ordered ^ jnp.uint32(1 << 31), ~ordered)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def most_likely(logits: Array, temperature: Array | float) -> tuple[Array, Array]:
    """Returns each row's most likely token (the first of equals), and its log-probability at the temperature.

    Args:
        logits: f32[B, V].
        temperature: above 0; it changes the log-probability alone.

    Returns:
        tokens i32[B], logprobs f32[B] in nats.
    """
    blocks = _blocks(logits / temperature)
    largest_in_block = jnp.max(blocks, axis=-1)
    largest = jnp.max(largest_in_block, axis=-1)
    total = jnp.sum(jnp.exp(blocks - largest[:, None, None]), axis=(-2, -1))
    block = jnp.argmax(largest_in_block, axis=-1)
    word = jnp.argmax(_pick(blocks, block), axis=-1)
    return (block * blocks.shape[2] + word).astype(jnp.int32), -jnp.log(total)


def _blocks(logits: Array) -> Array:
    """Returns [B, V / n, n], n being BLOCK; words that fill up the last block have probability 0.

    Where devices divide the vocabulary, n is a factor of BLOCK such that each of them has whole blocks.
    """
    num_rows, num_words = logits.shape
    parts = num_parts("vocab")
    size = BLOCK if parts == 1 or num_words % parts else math.gcd(BLOCK, num_words // parts)
    padding = -num_words % size
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return constrain(padded.reshape(num_rows, -1, size), ("batch", "vocab"))


def _first_beyond(cumulative: Array, weights: Array, target: Array) -> Array:
    """Returns i32[B], the first entry of positive weight where the cumulative sum exceeds the target.

    Where rounding leaves none, it is the last entry of positive weight.
    """
    entry = jnp.arange(weights.shape[1])
    last = jnp.max(jnp.where(weights > 0, entry, 0), axis=-1)
    beyond = (weights > 0) & (cumulative > target[:, None])
    return jnp.min(jnp.where(beyond, entry, last[:, None]), axis=-1)


def _pick(x: Array, entries: Array) -> Array:
    """Returns x[b, entries[b]] for each row b: [B] of [B, n], [B, k] of [B, n, k].

    Where devices divide the vocabulary they add up what they have: an index would gather it on each.
    """
    if num_parts("vocab") > 1:
        chosen = jnp.arange(x.shape[1]) == entries[:, None]
        return jnp.sum(jnp.where(chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2)), x, 0.0), axis=1)
    index = entries.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")[:, 0]
