"""Packing: a plan from lengths alone, an order that has every record once per epoch, the same loss."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax.batch import Rows
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import Examples, _joined
from rlhf_jax.data.loader import WINDOW, Loader
from rlhf_jax.data.packing import length_ladder, pack
from rlhf_jax.data.records import Preference, PromptCompletion
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.metrics import to_host
from rlhf_jax.sharding import place_rows
from tests import tiny

RECORDS = {"prompt_completion": PromptCompletion("a", "b"), "preference": Preference("a", "b", "c")}
FIELDS = dataclasses.fields(Examples)
NO_DEFAULT = dataclasses.MISSING
COUNTS = [  # no batch depends on them
    field.name for field in FIELDS if field.default is field.default_factory is NO_DEFAULT
]
LONGEST = 20


def examples(kind, num_records, seed=0, excluded=False):
    """Rows of 2 to 20 tokens, each row's first token its number."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_records * (2 if kind == "preference" else 1)):
        length = int(rng.integers(2, LONGEST + 1))
        prompt = int(rng.integers(1, length))
        ids = [number % 64, *rng.integers(2, 64, length - 1).tolist()]
        turns = ((length - 1, length),) if excluded and number % 3 == 0 and length - prompt > 1 else ()
        rows.append(Row(ids, prompt, excluded=turns))
    told = {
        "kind": kind,
        "records": [RECORDS[kind]] * num_records,
        "rows": token_rows(rows),
        "pad_id": tiny.PAD,
    }
    return Examples(**dict.fromkeys(COUNTS, 0) | told | {"length": LONGEST})


def sequences(batch):
    """Returns the tokens and the prompt's length of every sequence of a batch, in its order."""
    found = []
    shape = (len(batch.tokens), -1)
    rows = zip(batch.tokens, batch.lengths.reshape(shape), batch.prompt_lengths.reshape(shape), strict=True)
    for tokens, lengths, prompts in rows:
        ends = np.cumsum(lengths)
        found += [
            (tuple(tokens[end - length : end].tolist()), int(prompt))
            for end, length, prompt in zip(ends, lengths, prompts, strict=True)
            if length
        ]
    return found


def test_best_fit_by_hand():
    """Longest first, each into the least space: 7, then 6, 4 beside 6, 3 beside 7, 2 alone, 2 beside it."""
    plan = pack(np.array([2, 6, 3, 7, 2, 4]), 10)
    assert [plan.row(number).tolist() for number in range(plan.num_rows)] == [[0, 3], [1, 2], [4, 5]]
    assert (plan.most_records, plan.capacity) == (2, 10)
    in_own_order = plan.fill(np.array([2, 6, 3, 7, 2, 4]), np.arange(6))
    assert in_own_order.tolist() == [3, 1, 5, 2, 0, 4]
    other_ties = plan.fill(np.array([2, 6, 3, 7, 2, 4]), np.array([5, 4, 3, 2, 1, 0]))
    assert other_ties.tolist() == [3, 1, 5, 2, 4, 0]
    # Of the two records of length 2, either may come into a row: the greater count of both is told.
    assert plan.most(np.array([2, 6, 3, 7, 2, 4]), np.array([1, 3, 2, 2, 2, 2])) == 5


def test_rows_hold_what_they_can_and_everything_once():
    lengths = np.random.default_rng(0).integers(1, 65, 500)
    plan = pack(lengths, 64)
    assert sorted(plan.ranks) == list(range(500))
    filled = -np.sort(-lengths)[plan.ranks]
    totals = np.add.reduceat(filled, plan.starts[:-1])
    assert totals.max() <= 64
    assert plan.num_rows <= 11 / 9 * np.ceil(lengths.sum() / 64) + 1


@pytest.mark.parametrize("kind", ["prompt_completion", "preference"])
def test_every_epoch_of_packed_rows_has_every_record_once(kind):
    """Whatever the batch size; records of one length change places, and pairs stay together."""
    read = examples(kind, 60)
    packed = read.packed(40)
    once = sorted((tuple(row.ids), row.prompt_length) for row in read.rows)
    num_rows, epochs = sum(packed.num_units), []
    assert num_rows < 60
    for size in (1, 4, 7):
        loader, position, found = Loader(packed, size, seed=3), 0, []
        while position < 2 * num_rows:
            batch, position = loader.batch(position)
            assert batch.tokens.shape == (size, 40)
            found.append(batch)
        every = [unit for batch in found for unit in zip(*batch[:3], strict=True)]
        epochs.append(every)
        for epoch in (every[:num_rows], every[num_rows : 2 * num_rows]):
            rows = Rows(*(np.stack(part) for part in zip(*epoch, strict=True)))
            assert sorted(sequences(rows)) == once
    for row, other in zip(epochs[0], epochs[2], strict=False):
        np.testing.assert_array_equal(row[0], other[0])  # the order of rows does not depend on the batch size
    if kind == "preference":
        pairs = {tuple(read.rows[2 * i].ids): tuple(read.rows[2 * i + 1].ids) for i in range(60)}
        ids = [ids for ids, _ in sequences(found[0])]
        assert all(pairs[chosen] == rejected for chosen, rejected in zip(ids[::2], ids[1::2], strict=True))


def test_a_batch_of_packed_rows_is_a_function_of_the_position():
    packed = examples("prompt_completion", 60).packed(40)
    loader = Loader(packed, 4, seed=0)
    batches = {position: loader.batch(position)[0] for position in range(0, 80, 4)}
    for position in (0, 36, 76):
        fresh, after = Loader(packed, 4, seed=0).batch(position)
        assert after == position + 4
        jax.tree.map(np.testing.assert_array_equal, fresh, batches[position])


def test_epochs_put_other_records_together():
    packed = examples("prompt_completion", 60).packed(40)
    loader, rows = Loader(packed, sum(packed.num_units), seed=0), []
    for epoch in (0, 1):
        batch, _ = loader.batch(epoch * sum(packed.num_units))
        rows.append({tuple(tokens.tolist()) for tokens in batch.tokens})
    assert len(rows[0] - rows[1]) > 10
    lengths = [sorted(batch.lengths.sum(axis=1).tolist()) for batch in (loader.batch(0)[0], batch)]
    assert lengths[0] == lengths[1]


def test_rows_of_a_mixture_are_of_one_source_each():
    """Rows are drawn by weight; each source has its own epochs."""
    few, many = (examples("prompt_completion", count, seed=count) for count in (20, 50))
    parts = [dataclasses.replace(of.packed(40), weights=(w,)) for of, w in ((few, 1.0), (many, 3.0))]
    both = _joined(*parts)
    rows_few, rows_many = both.num_units
    assert both.num_units == (parts[0].num_units[0], parts[1].num_units[0])
    loader, found = Loader(both, 4, seed=0), ([], [])
    ids = [{tuple(row.ids) for row in of.rows} for of in (few, many)]
    for position in range(0, 4 * rows_many, 4):
        batch, _ = loader.batch(position)
        for row in zip(*batch[:3], strict=True):
            taken = [ids_ for ids_, _ in sequences(Rows(*(part[None] for part in row)))]
            source = int(taken[0] in ids[1])
            assert set(taken) <= ids[source]
            found[source].append(taken)
    assert len(found[1]) == 3 * len(found[0]) == 3 * rows_many
    for of, rows, count in ((few, found[0], rows_few), (many, found[1], rows_many)):
        once = sorted(tuple(row.ids) for row in of.rows)
        for start in range(0, len(rows) - count + 1, count):
            assert sorted(taken for row in rows[start : start + count] for taken in row) == once


def test_every_epoch_of_a_source_is_filled_once(monkeypatch):
    filled, fill = [], Loader._fill
    monkeypatch.setattr(Loader, "_fill", lambda self, *of: (filled.append(of), fill(self, *of))[1])
    four = functools.reduce(
        _joined, [examples("prompt_completion", 30, seed).packed(40) for seed in range(4)]
    )
    loader = Loader(four, 8, seed=0)
    for position in range(0, 4 * sum(four.num_units), 8):
        loader.batch(position)
    assert len(filled) == len(set(filled)) >= 4 * 4


def test_evaluation_of_packed_rows_fills_the_last_batch():
    packed = examples("preference", 30, excluded=True).packed(40)
    batches = [batch for batch, _ in Loader(packed, 8, seed=0).eval_batches()]
    assert {batch.tokens.shape for batch in batches} == {(8, 40)}
    assert {batch.excluded.shape for batch in batches} == {(8, 40)}
    found = [sequence for batch in batches for sequence in sequences(batch)]
    assert sorted(found) == sorted((tuple(row.ids), row.prompt_length) for row in packed.rows)
    told = sum(int(batch.completion_mask.sum()) for batch in batches)
    assert told == sum(row.num_loss_tokens for row in packed.rows)
    assert max(int(batch.completion_mask.sum(axis=1).max()) for batch in batches) <= packed.most_loss_tokens
    assert any(row.excluded for row in packed.rows)


@pytest.mark.parametrize("mesh", [{}, pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, kind", [("sft", "prompt_completion"), ("reward_model", "preference")])
def test_the_loss_of_the_same_records_is_the_same_packed_or_not(name, kind, mesh):
    """NUMERICS 3: through loader and update, several turns among them, also with microbatches."""
    read = examples(kind, 16, excluded=True)
    packed = read.packed(2 * LONGEST)
    on = tiny.mesh(**mesh)
    num_rows = -(-sum(packed.num_units) // 8) * 8

    def updated(of, batch_size, **settings):
        stage = tiny.stage(
            name,
            settings={"batch_size": batch_size} | settings,
            data={"packing": bool(of.packings)},
        )
        programs = tiny.programs(stage, on, of.most_loss_tokens)
        trained, frozen = tiny.roles(name, on)
        ((batch, _),) = Loader(of, batch_size, 0).eval_batches()
        state, metrics = programs.update(
            programs.init_state(trained), frozen, place_rows(on, batch), jax.random.key(0)
        )
        evaluated = programs.evaluate(state.params, frozen, place_rows(on, batch))
        moments = {role: state.opt_state[role][1][0].mu for role in trained}
        return jax.device_get(moments), to_host(metrics | evaluated)

    expected, expected_metrics = updated(read, 16)
    for settings in ({}, {"microbatch_size": num_rows // 2}) if not mesh else ({},):
        found, metrics = updated(packed, num_rows, **settings)
        assert tiny.relative_difference(found, expected) < 1e-5
        for metric, value in expected_metrics.items():
            assert metrics[metric] == pytest.approx(value, abs=1e-5 * max(1, abs(value))), metric


@pytest.mark.parametrize(
    "lengths, num_buckets, ladder",
    [
        ([5, 9, 17, 30], 1, (32,)),
        ([5, 9, 17, 30], 2, (16, 32)),
        ([5, 9, 17, 30], 4, (8, 16, 24, 32)),
        ([30] * 9, 4, (32,)),
        ([1] * 9 + [64], 2, (8, 64)),
    ],
)
def test_ladder_by_hand(lengths, num_buckets, ladder):
    assert length_ladder(lengths, num_buckets, 8) == ladder


@pytest.mark.parametrize("kind", ["prompt_completion", "preference"])
def test_buckets_take_every_record_once_and_pad_less(kind):
    plain = examples(kind, 100)
    bucketed = dataclasses.replace(plain, shorter=(8, 16))
    size, once = 4, sorted((tuple(row.ids), row.prompt_length) for row in plain.rows)
    loader, position, found, padded, shapes = Loader(bucketed, size, seed=1), 0, [], 0, []
    while position < 100 * WINDOW:  # a hundred windows are the sequence of 32 * 4 epochs
        batch, position = loader.batch(position)
        found += sequences(batch)
        padded += batch.tokens.size
        shapes.append(batch.tokens.shape[1])
        if position == WINDOW * size:  # a window has what the order without buckets has, more likely together
            first = Loader(plain, WINDOW * size, seed=1).batch(0)[0]
            assert sorted(found) == sorted(sequences(first))
    assert sorted(found) == sorted(once * (100 * WINDOW // 100))
    assert set(shapes) == {8, 16, 20} and shapes[:8] != sorted(shapes[:8])
    tokens = sum(len(ids) for ids, _ in found)
    assert tokens / padded > 0.65 > tokens / (len(found) * LONGEST)
    fresh, _ = Loader(bucketed, size, seed=1).batch(position - size)
    jax.tree.map(np.testing.assert_array_equal, fresh, batch)


def test_buckets_of_a_mixture_hold_its_shares_in_every_window():
    """Batches are of both sources; each source still has its epochs."""
    few, many = (examples("prompt_completion", count, seed=count) for count in (20, 50))
    both = _joined(*(dataclasses.replace(of, weights=(w,)) for of, w in ((few, 1.0), (many, 3.0))))
    bucketed, size = dataclasses.replace(both, shorter=(8, 16)), 4
    loader, plain = Loader(bucketed, size, seed=1), Loader(both, size * WINDOW, seed=1)
    ids = [{tuple(row.ids) for row in of.rows} for of in (few, many)]
    assert not ids[0] & ids[1]
    for start in range(0, 5 * size * WINDOW, size * WINDOW):
        batches = [loader.batch(start + size * number)[0] for number in range(WINDOW)]
        found = [sequence for batch in batches for sequence in sequences(batch)]
        assert sorted(found) == sorted(sequences(plain.batch(start)[0]))
        assert sum(taken in ids[0] for taken, _ in found) == size * WINDOW // 4
        assert {batch.tokens.shape[1] for batch in batches} == {8, 16, LONGEST}
