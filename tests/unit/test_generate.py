"""The decode loop against the full forward, and what a completion must not depend on."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import Prompts
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.kv_cache import decode_step, unstack
from rlhf_jax.models.transformer import make_model
from rlhf_jax.ops.logprobs import (
    contiguous_columns,
    gather_columns,
    gather_predictors,
    gather_targets,
    put_columns,
    token_logprobs,
)
from rlhf_jax.rollout.generate import generate, make_queue
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.rollout.slots import Engine

V, P, C = 37, 6, 8
PAD, NEVER = 0, V  # no word has the number V, so that no completion ends
MODEL = make_model(
    Architecture(
        vocab_size=V,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        mlp_size=24,
        context_length=32,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
)


LOCAL = make_model(dataclasses.replace(MODEL.architecture, windows=(3, 0), attention_softcap=2.0))
"""The same with a layer that sees three tokens alone, and capped scores."""


@pytest.fixture(scope="module")
def policy():
    fresh = MODEL.init_policy(jax.random.key(0))  # scaled up: far enough from uniform to tell contexts apart
    return jax.tree.map(lambda leaf: 12 * leaf if leaf.ndim > 1 else leaf, fresh)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(1, V, (5, P)), jnp.int32)
    return Prompts(tokens, jnp.array([6, 1, 3, 5, 2]), jnp.array([10, 11, 12, 13, 14]))


@partial(
    jax.jit, static_argnames=("max_new_tokens", "greedy", "num_slots", "refill_size", "group_size", "local")
)  # the rest is traced: fewer programs to compile
def run(
    policy, prompts, key, *, max_new_tokens=C, temperature=1.0, greedy=False, eos_id=NEVER, local=False,
    **options,
):  # fmt: skip
    return generate(
        LOCAL if local else MODEL,
        policy,
        prompts,
        key,
        Sampling(temperature, stop_ids=jnp.asarray([NEVER, eos_id])),
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        pad_id=PAD,
        **options,
    )


@jax.jit
def training_logprobs(policy, rows, temperature):
    columns = contiguous_columns(rows.prompt_lengths, C, rows.tokens.shape[1])
    hidden = gather_predictors(MODEL.hidden(policy["trunk"], rows.tokens), columns)
    targets = gather_targets(rows.tokens, columns)
    logits = partial(MODEL.logits, policy)
    logprobs, _ = token_logprobs(
        logits, hidden, targets, temperature=temperature, chunk=0, with_entropy=False
    )
    logprobs = put_columns(logprobs, columns)
    return jnp.where(rows.completion_mask, logprobs, 0.0)


def all_alike(policy):
    """A policy whose logits are all equal, so that greedy decoding takes word 0, which is pad."""
    return {"trunk": policy["trunk"] | {"embed": {"embedding": jnp.zeros((V, 16))}}}


def completions(rollout):
    """The completions as lists of tokens."""
    rows = jax.device_get(rollout.rows)
    spans = zip(rows.tokens, rows.prompt_lengths, rows.lengths, strict=True)
    return [tokens[start:end].tolist() for tokens, start, end in spans]


def common_word(policy, prompts):
    """A word that some sampled completions have, though not all at the same place: it serves as EOS."""
    drawn = completions(run(policy, prompts, jax.random.key(7)))
    return next(word for word in range(1, V) if 1 < sum(word in row for row in drawn) < len(drawn))


@pytest.mark.parametrize("num_slots", [0, 2])
def test_greedy_equals_naive_decoding_with_the_full_forward(policy, prompts, num_slots):
    @jax.jit
    def next_words(tokens, lengths):
        hidden = gather_columns(MODEL.hidden(policy["trunk"], tokens), lengths[:, None] - 1)
        return jnp.argmax(MODEL.logits(policy, hidden)[:, 0], axis=-1)

    tokens = np.pad(np.asarray(prompts.tokens), ((0, 0), (0, C)))
    lengths = np.array(prompts.lengths)
    for _ in range(C):
        tokens[np.arange(5), lengths] = next_words(jnp.asarray(tokens), jnp.asarray(lengths))
        lengths += 1
    got = run(policy, prompts, jax.random.key(0), greedy=True, num_slots=num_slots)
    expected = [tokens[row, length - C : length].tolist() for row, length in enumerate(lengths)]
    assert completions(got) == expected
    assert len({tuple(row) for row in expected}) == 5  # they tell prompts apart


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_training_forward(policy, prompts, temperature, greedy):
    rollout = run(policy, prompts, jax.random.key(2), temperature=temperature, greedy=greedy)
    expected = training_logprobs(policy, rollout.rows, temperature)
    np.testing.assert_allclose(rollout.sampler_logprobs, expected, rtol=1e-5, atol=1e-5)
    assert (expected[rollout.rows.completion_mask] < -1e-3).any()


def test_rows_are_contiguous_and_padded(policy, prompts):
    eos = common_word(policy, prompts)
    rollout = run(policy, prompts, jax.random.key(7), eos_id=eos)
    rows = jax.device_get(rollout.rows)
    assert rows.tokens.shape == rollout.sampler_logprobs.shape == (5, P + C)
    np.testing.assert_array_equal(rows.prompt_lengths, prompts.lengths)
    for row, length in enumerate(prompts.lengths):
        np.testing.assert_array_equal(rows.tokens[row, :length], prompts.tokens[row, :length])
        assert (rows.tokens[row, rows.lengths[row] :] == PAD).all()
    assert not np.asarray(rollout.sampler_logprobs)[~np.asarray(rows.completion_mask)].any()


def test_eos_ends_a_row_and_the_rest_goes_on(policy, prompts):
    eos = common_word(policy, prompts)
    endless = completions(run(policy, prompts, jax.random.key(7)))
    rollout = run(policy, prompts, jax.random.key(7), eos_id=eos)
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in endless]
    assert completions(rollout) == expected
    np.testing.assert_array_equal(rollout.ended, [eos in row for row in endless])
    assert 0 < sum(rollout.ended) < 5
    np.testing.assert_array_equal(rollout.rows.lengths - prompts.lengths, [len(row) for row in expected])


def test_the_pad_token_may_be_drawn_and_may_be_eos(policy, prompts):
    goes_on = run(all_alike(policy), prompts, jax.random.key(0), greedy=True)
    np.testing.assert_array_equal(goes_on.rows.lengths - prompts.lengths, np.full(5, C))
    assert not goes_on.ended.any()
    ends = run(all_alike(policy), prompts, jax.random.key(0), greedy=True, eos_id=PAD)
    np.testing.assert_array_equal(ends.rows.lengths - prompts.lengths, np.ones(5))
    assert ends.ended.all()


def test_filling_rows_draw_nothing_and_hold_nothing_up(policy, prompts):
    filled = prompts._replace(lengths=prompts.lengths.at[1].set(0).at[4].set(0))
    eos = common_word(policy, prompts)
    rollout = run(policy, filled, jax.random.key(7), eos_id=eos)
    np.testing.assert_array_equal(np.asarray(rollout.rows.lengths)[[1, 4]], [0, 0])
    assert (np.asarray(rollout.rows.tokens)[[1, 4]] == PAD).all()
    assert not np.asarray(rollout.ended)[[1, 4]].any()
    assert not np.asarray(rollout.sampler_logprobs)[[1, 4]].any()
    expected = completions(run(policy, prompts, jax.random.key(7), eos_id=eos))
    assert [row for i, row in enumerate(completions(rollout)) if i not in (1, 4)] == [
        row for i, row in enumerate(expected) if i not in (1, 4)
    ]
    empty = run(policy, prompts._replace(lengths=jnp.zeros_like(prompts.lengths)), jax.random.key(7))
    assert not np.asarray(empty.rows.lengths).any()


def test_a_completion_depends_on_neither_row_nor_neighbours_nor_padding(policy, prompts):
    key = jax.random.key(7)
    everything = completions(run(policy, prompts, key))
    order = jnp.array([3, 0, 4, 2, 1])
    assert completions(run(policy, jax.tree.map(lambda x: x[order], prompts), key)) == [
        everything[i] for i in order
    ]
    assert completions(run(policy, jax.tree.map(lambda x: x[2:3], prompts), key)) == everything[2:3]
    wider = prompts._replace(tokens=jnp.pad(prompts.tokens, ((0, 0), (0, 3)), constant_values=5))
    assert completions(run(policy, wider, key)) == everything


def test_a_smaller_limit_gives_a_prefix(policy, prompts):
    everything = completions(run(policy, prompts, jax.random.key(7)))
    for limit in (1, 3):
        short = run(policy, prompts, jax.random.key(7), max_new_tokens=limit)
        assert completions(short) == [row[:limit] for row in everything]
        assert short.rows.tokens.shape == (5, P + limit)


def test_prompt_index_and_key_change_what_is_drawn(policy, prompts):
    alike = Prompts(jnp.repeat(prompts.tokens[:1], 5, 0), jnp.full(5, 6), jnp.array([0, 1, 2, 0, 1]))
    drawn = completions(run(policy, alike, jax.random.key(7)))
    assert drawn[0] == drawn[3] and drawn[1] == drawn[4]
    assert len({tuple(row) for row in drawn}) == 3
    assert drawn != completions(run(policy, alike, jax.random.key(8)))


def test_the_loop_stops_when_all_rows_have_ended(policy, prompts, monkeypatch):
    """With equal logits and EOS the first word, greedy ends at once: one token, no decode step."""
    steps = []

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    monkeypatch.setattr("rlhf_jax.rollout.slots.decode_step", counted)
    filled = prompts._replace(lengths=prompts.lengths.at[0].set(0))  # a filling row never ends
    settings = {"max_new_tokens": C, "greedy": True, "pad_id": PAD}

    @jax.jit
    def complete(eos):
        sampling = Sampling(1.0, stop_ids=jnp.asarray([eos]))
        return generate(MODEL, all_alike(policy), filled, jax.random.key(0), sampling, **settings)

    for eos, expected in ((PAD, 0), (NEVER, C - 1)):
        steps.clear()
        jax.block_until_ready(complete(eos))
        jax.effects_barrier()
        assert len(steps) == expected


def test_frequencies_of_the_first_token(policy, prompts):
    """Many draws from one prompt: the model's own probabilities."""
    count = 1000
    many = Prompts(jnp.repeat(prompts.tokens[2:3], count, 0), jnp.full(count, 3), jnp.arange(count))
    drawn = run(policy, many, jax.random.key(1), max_new_tokens=1, temperature=2.0)
    hidden = MODEL.hidden(policy["trunk"], prompts.tokens[2:3])[:, 2]
    expected = np.asarray(jax.nn.softmax(MODEL.logits(policy, hidden)[0] / 2.0))
    counts = np.bincount(np.asarray(drawn.rows.tokens)[:, 3], minlength=V)
    deviations = np.sqrt(count * expected * (1 - expected)) + 1
    assert (abs(counts - count * expected) < 5 * deviations).all()


# Slots


@pytest.fixture(scope="module")
def queue():
    """Twelve prompts, of one token and of the full width among them, and one that only fills up."""
    rng = np.random.default_rng(2)
    lengths = jnp.asarray([6, 1, 3, 0, 6, 2, 1, 4, 5, 6, 1, 3])
    return Prompts(jnp.asarray(rng.integers(1, V, (12, P)), jnp.int32), lengths, jnp.arange(12) + 5)


@pytest.mark.parametrize(("num_slots", "refill_size"), [(1, 1), (3, 2), (5, 5), (11, 0), (40, 3)])
def test_any_number_of_slots_gives_the_same(policy, queue, num_slots, refill_size):
    """Random limits, early ends, a last refill that the queue does not fill, more slots than prompts."""
    slots = {"num_slots": num_slots, "refill_size": refill_size}
    ended = 0
    for seed, word in [(7, NEVER), (8, 3), (9, 20)]:
        key, limits = jax.random.key(seed), jax.random.randint(jax.random.key(seed), (12,), 1, C + 4)
        expected = run(policy, queue, key, eos_id=word, limits=limits)
        found = run(policy, queue, key, eos_id=word, limits=limits, **slots)
        assert completions(found) == completions(expected)
        np.testing.assert_array_equal(found.ended, expected.ended)
        np.testing.assert_array_equal(found.rows.tokens, expected.rows.tokens)
        np.testing.assert_allclose(found.sampler_logprobs, expected.sampler_logprobs, rtol=1e-5, atol=1e-5)
        lengths = found.rows.lengths - queue.lengths
        most = np.where(queue.lengths > 0, np.minimum(limits, C), 0)
        assert (found.ended | (lengths == most)).all() and (lengths <= most).all()
        ended += np.asarray(found.ended).sum()
    assert ended > 3


def test_a_window_reaches_over_the_end_of_the_ring(policy, queue):
    """Slots that begin in any column, with a layer of three tokens and capped scores."""
    limits = jnp.asarray([5, 8, 3, 1, 8, 7, 2, 8, 6, 8, 4, 8])
    expected = run(policy, queue, jax.random.key(7), limits=limits, local=True)
    found = run(policy, queue, jax.random.key(7), limits=limits, local=True, num_slots=3, refill_size=1)
    assert completions(found) == completions(expected)
    assert completions(found) != completions(run(policy, queue, jax.random.key(7), limits=limits))
    np.testing.assert_allclose(found.sampler_logprobs, expected.sampler_logprobs, rtol=1e-5, atol=1e-5)


def test_completions_that_do_not_fit_the_context_are_refused(policy, prompts):
    with pytest.raises(
        ValueError, match="up to 6 tokens and completions of up to 27 .* context length of 32"
    ):
        run(policy, prompts, jax.random.key(0), max_new_tokens=27)


def test_slots_are_filled_again_before_the_longest_has_ended(policy, queue):
    """Steps are counted: batches of four would take three times the longest of each."""
    limits = jnp.asarray([8, 1, 1, 8, 1, 1, 8, 1, 1, 8, 1, 1])
    engine = Engine(C, PAD, num_slots=4, refill_size=1)
    weights = unstack(policy, MODEL.architecture, "float32")
    sampling = Sampling(1.0, stop_ids=jnp.asarray([NEVER]))

    @jax.jit
    def steps(slots, at_once):
        todo = make_queue(queue, C, limits)
        return engine.run(weights, todo, sampling, jax.random.key(0), slots, at_once)

    whole = steps(engine.start(weights, queue), 1000)
    assert whole.steps == sum(limits) / 4  # no slot is ever idle
    assert not whole.going and whole.taken[0] == 12
    slots, calls = engine.start(weights, queue), 0
    while slots.going:  # the same in calls of two steps
        slots, calls = steps(slots, 2), calls + 1
    assert calls == -(-(whole.steps + whole.refills) // 2) and slots.steps == whole.steps
    for a, b in zip(slots.done, whole.done, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_slots", [0, 2])
def test_a_group_shares_its_prompt(policy, queue, num_slots):
    key = jax.random.key(7)
    expected = run(policy, queue, key, eos_id=11)
    found = run(policy, queue, key, eos_id=11, group_size=3, num_slots=num_slots)
    assert completions(found)[::3] == completions(expected)  # the first of a group is what it is alone
    assert len({tuple(row) for row in completions(found)}) > 30
    logprobs = training_logprobs(policy, found.rows, 1.0)
    np.testing.assert_allclose(found.sampler_logprobs, logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_slots", [0, 2])
def test_completions_of_a_group_have_their_own_limits(policy, queue, num_slots):
    """A slot waits for the longest of its group; all draw the beginning of what they draw without limits."""
    key, limits = jax.random.key(7), jax.random.randint(jax.random.key(1), (36,), 1, C + 1)
    whole = completions(run(policy, queue, key, group_size=3))
    found = completions(run(policy, queue, key, group_size=3, num_slots=num_slots, limits=limits))
    assert [len(row) for row in found] == np.where(np.repeat(queue.lengths, 3) > 0, limits, 0).tolist()
    assert found == [row[: len(cut)] for row, cut in zip(whole, found, strict=True)]
