"""Whether two rollouts hold the same completions: token by token, but for draws that fall on a tie.

Sums in another order differ in their last digits, so a random number that lies that near to the edge between
two tokens may fall on either side. Such a token is allowed; that it is one is asserted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.batch import Params, Prompts, Rollout
from rlhf_jax.models.transformer import Model
from rlhf_jax.rollout.sampling import row_keys, uniforms

TIE = 1e-4  # of the cumulative probability: a number so near to a token's edge may fall on either side


def completion(rollout: Rollout, row: int) -> list[int]:
    """Returns the tokens of a row's completion; the rollout is on the host."""
    rows = rollout.rows
    return rows.tokens[row, rows.prompt_lengths[row] : rows.lengths[row]].tolist()


def next_token_logits(model: Model, policy: Params, temperature: float) -> Callable[[list[int]], Array]:
    """Returns a function of token ids -> logits f32[V] of the next one, by the full forward pass."""

    def logits(ids: list[int]) -> Array:
        return model.logits(policy, model.hidden(policy["trunk"], jnp.asarray([ids]))[0, -1]) / temperature

    return logits


def assert_same_completions(
    found: Rollout,
    expected: Rollout,
    prompts: Prompts,
    key: Array,
    logits: Callable[[list[int]], Array],
    order: Iterable[int] | None = None,
) -> int:
    """Asserts that row `order[i]` of `found` is row i of `expected`, but for ties; returns the rows with one.

    Args:
        found, expected: on the host.
        prompts: of `expected`, on the host.
        key: of both.
        logits: token ids -> logits of the next token; see next_token_logits.
        order: the rows' own order by default.
    """
    num_ties = 0
    for row, place in enumerate(range(len(expected.ended)) if order is None else order):
        a, b = completion(found, place), completion(expected, row)
        if a == b:
            assert found.ended[place] == expected.ended[row]
            mask = expected.rows.completion_mask[row]
            gap = np.abs(found.sampler_logprobs[place] - expected.sampler_logprobs[row])
            assert np.max(gap, where=mask, initial=0) < 1e-5
            continue
        first = next(i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y)
        ids = [*prompts.tokens[row, : prompts.lengths[row]].tolist(), *a[:first]]
        distance = _edge_distance(logits(ids), int(prompts.index[row]), first, (a[first], b[first]), key)
        assert distance < TIE, (row, first, distance)
        num_ties += 1
    return num_ties


def _edge_distance(logits: Array, index: int, position: int, tokens: tuple[int, int], key: Array) -> float:
    """Returns how far a draw's random number is from what parts two tokens in the cumulative distribution."""
    cumulative = np.cumsum(np.asarray(jax.nn.softmax(logits), np.float64))
    number = float(uniforms(row_keys(key, jnp.array([index]), jnp.array([0])), jnp.int32(position))[0])
    low, high = sorted(tokens)
    return max(abs(number - cumulative[low]), abs(number - cumulative[high - 1]))
