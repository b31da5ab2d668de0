"""One token per row from its logits, and the random number that chooses it.

A draw needs one uniform number per row, and reads the logits twice (their maximum, their exponentials' sums
by block): the cumulative distribution is inverted in two levels, first over blocks of the vocabulary, then
within the block. Noise for every word, as jax.random.categorical makes it, costs as much as a small model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 128  # words; a TPU's lane width


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


def uniforms(keys: Array, position: Array) -> Array:
    """Returns f32[B] in (0, 1): the random number of token `position` (i32[]) of each row's completion.

    They are the middles of 2^23 equal intervals. Their left ends would have 0 among them, which draws the
    first word of the vocabulary, however improbable, once in 2^23 tokens.
    """
    left_ends = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(keys)
    return left_ends + 2.0**-24


def sample(logits: Array, uniforms: Array, temperature: float) -> tuple[Array, Array]:
    """Returns a token for each row, drawn from softmax(logits / temperature), and its log-probability.

    The token is the first at which the cumulative probability exceeds the row's number; it never is one whose
    probability is 0 in float32.

    Args:
        logits: f32[B, V].
        uniforms: f32[B] in [0, 1); their resolution is that of the probabilities.
        temperature: above 0.

    Returns:
        tokens i32[B], logprobs f32[B] in nats.
    """
    blocks = _blocks(logits / temperature)
    largest = jnp.max(blocks, axis=(-2, -1))
    sums = jnp.sum(jnp.exp(blocks - largest[:, None, None]), axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    total = cumulative[:, -1]

    target = uniforms * total
    block = _first_beyond(cumulative, sums, target)
    before = _pick(cumulative, block) - _pick(sums, block)

    shifted = _pick(blocks, block) - largest[:, None]
    weights = jnp.exp(shifted)
    word = _first_beyond(jnp.cumsum(weights, axis=-1), weights, target - before)
    return (block * BLOCK + word).astype(jnp.int32), _pick(shifted, word) - jnp.log(total)


def most_likely(logits: Array, temperature: float) -> tuple[Array, Array]:
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
    return (block * BLOCK + word).astype(jnp.int32), -jnp.log(total)


def _blocks(logits: Array) -> Array:
    """Returns [B, V / BLOCK, BLOCK]; words that fill up the last block have probability 0."""
    padding = -logits.shape[1] % BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return padded.reshape(logits.shape[0], -1, BLOCK)


def _first_beyond(cumulative: Array, weights: Array, target: Array) -> Array:
    """Returns i32[B], the first entry of positive weight where the cumulative sum exceeds the target.

    Where rounding leaves none, it is the last entry of positive weight.
    """
    entry = jnp.arange(weights.shape[1])
    last = jnp.max(jnp.where(weights > 0, entry, 0), axis=-1)
    beyond = (weights > 0) & (cumulative > target[:, None])
    return jnp.min(jnp.where(beyond, entry, last[:, None]), axis=-1)


def _pick(x: Array, entries: Array) -> Array:
    """Returns x[b, entries[b]] for each row b: [B] of [B, n], [B, k] of [B, n, k]."""
    index = entries.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")[:, 0]
