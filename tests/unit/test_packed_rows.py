"""Which sequences share a row, and that every token is in one, once, in its order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import PolicyBatch, Rows
from rlhf_jax.ops.packed_rows import RowLayout, Rung, share_rows
from tests import tiny

T, C = 16, 8  # of tiny.rows, prompts have 8 tokens at most


def layout(count, buckets=1, prompt_length=8):
    return RowLayout(
        sequences_per_row=count, length_buckets=buckets, num_completion=C, prompt_length=prompt_length
    )


def placed(rows, count, buckets=1):
    """Returns the placement in the widest row, with concrete numbers."""
    found = []
    layout(count, buckets).in_short_rows(rows, lambda at: found.append(at) or jnp.zeros(()))
    return found[-1]


def with_filling(rows):
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:4])]), rows)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_token_is_in_one_row_once_and_comes_back(count):
    rows = with_filling(tiny.rows())
    at = placed(rows, count)
    packed = jax.jit(at.pack)(rows)
    assert sorted(np.asarray(at.sequences).ravel()) == list(range(12))
    assert packed.tokens.shape == (12 // count, count * T)
    numbers = jnp.arange(12 * T, dtype=jnp.int32).reshape(12, T)  # each token's own
    kept = np.asarray(rows.attention_mask)
    there = np.asarray(jax.jit(at.pack)(numbers))[np.asarray(packed.attention_mask)]
    assert sorted(there) == sorted(np.asarray(numbers)[kept])
    back = np.asarray(jax.jit(lambda x: at.unpack(at.pack(x)))(numbers))
    assert np.array_equal(back[kept], np.asarray(numbers)[kept])
    if count > 1:
        assert not back[~kept].any()
        assert not np.asarray(packed.tokens)[~np.asarray(packed.attention_mask)].any()
    for mask in ("prompt_mask", "completion_mask", "positions"):
        ours = jax.jit(at.unpack)(getattr(packed, mask))
        assert np.array_equal(np.asarray(ours)[kept], np.asarray(getattr(rows, mask))[kept]), mask


@pytest.mark.parametrize("count", [2, 4])
def test_sequences_keep_their_order_and_are_contiguous(count):
    rows = tiny.rows()
    at = placed(rows, count)
    packed = jax.jit(at.pack)(rows)
    for row, group in enumerate(np.asarray(at.sequences)):
        expected = np.concatenate([np.asarray(rows.tokens)[b, : int(rows.lengths[b])] for b in group])
        assert np.array_equal(np.asarray(packed.tokens)[row, : len(expected)], expected)


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_said_of_sequences_comes_back_in_their_order(count):
    rows = tiny.rows()
    at = placed(rows, count)
    scores = at.pack(rows).lengths.reshape(-1)  # as heads.scores gives one for each sequence
    assert np.array_equal(at.unpack(scores), rows.lengths)


def test_masks_of_a_batch_are_false_behind_its_sequences():
    rows = tiny.rows()
    poison = jnp.full(rows.tokens.shape, 1e6)
    batch = PolicyBatch(rows, jnp.ones(rows.tokens.shape, bool), *[poison] * 5)
    packed = placed(rows, 4).pack(batch)
    beyond = ~np.asarray(packed.rows.attention_mask)
    assert beyond.any()
    assert not np.asarray(packed.completion_mask)[beyond].any()
    assert not np.asarray(packed.advantages)[beyond].any()


def test_rows_are_about_equally_long():
    """The longest with the shortest; of more than two, the longest that is left to the shortest row."""
    lengths = jnp.asarray([9, 1, 8, 2, 7, 3])
    assert np.asarray(lengths)[np.asarray(share_rows(lengths, 2))].tolist() == [[7, 3], [8, 2], [9, 1]]
    rng = np.random.default_rng(0)
    for count in (2, 4, 8):
        drawn = rng.geometric(0.05, 64)
        share = jax.jit(share_rows, static_argnums=1)
        sums = drawn[np.asarray(share(jnp.asarray(drawn), count))].sum(axis=1)
        assert max(sums) - min(sums) <= max(drawn)
        assert max(sums) <= 1.35 * max(sums.mean(), max(drawn) / 1.2)


def test_sequences_of_a_unit_share_a_row():
    lengths = jnp.asarray([9, 1, 8, 2, 0, 0, 3, 3])  # units of 10, 10, 0 and 6 tokens
    assert np.asarray(share_rows(lengths, 4, 2)).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert np.asarray(share_rows(lengths, 2, 2)).ravel().tolist() == list(range(8))
    assert np.asarray(share_rows(lengths, 1, 2)).ravel().tolist() == list(range(8))


def test_the_ladder_ends_with_rows_that_hold_everything():
    assert layout(2).ladder(T) == (Rung(32, 16),)
    # prompts of 8, and a half and the whole of 8 tokens of a completion, in vectors of 8
    assert layout(2, 2).ladder(T) == (Rung(24, 8), Rung(32, 16))
    # narrower prompts; a width that holds more completion tokens than another of the same width
    assert layout(2, 4, prompt_length=2).ladder(T) == (Rung(8, 4), Rung(16, 12), Rung(32, 16))
    assert all(rung.width % 128 == 0 for rung in layout(64, 8).ladder(T)[:-1])


@pytest.mark.parametrize("count, buckets", [(1, 4), (2, 8)])
def test_the_first_rung_that_fits_is_taken(count, buckets):
    rng = np.random.default_rng(1)
    planned = layout(count, buckets, prompt_length=4)
    ladder, taken = planned.ladder(T), set()

    share = jax.jit(share_rows, static_argnums=1)

    @jax.jit
    def chosen(rows):
        return planned.in_short_rows(rows, lambda at: jnp.int32(at.rung.width))

    for most in (1, 2, 3, 5, 8):
        prompt_lengths = jnp.asarray(rng.integers(1, min(most, 4) + 1, 8))
        lengths = prompt_lengths + jnp.asarray(rng.integers(1, most + 1, 8))
        rows = Rows(jnp.zeros((8, T), jnp.int32), prompt_lengths, lengths)
        groups = np.asarray(share(lengths, count))
        tokens = np.asarray(lengths)[groups].sum(axis=1).max()
        completions = np.asarray(lengths - prompt_lengths)[groups].sum(axis=1).max()
        width = next(r.width for r in ladder if tokens <= r.width and completions <= r.num_completion)
        assert int(chosen(rows)) == width
        taken.add(width)
    assert len(taken) > 1
