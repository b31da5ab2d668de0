"""Loader: an order that is a function of (seed, position)."""

import dataclasses
import gc
import json
import threading

import jax
import numpy as np
import pytest

from rlhf_jax.batch import Rows
from rlhf_jax.config import DataConfig
from rlhf_jax.data.examples import load_examples, tokenize_records, training_texts
from rlhf_jax.data.loader import WINDOW, Loader, Prefetched, epoch_order
from rlhf_jax.data.records import Preference, PromptOnly
from rlhf_jax.data.tokenizer import encode_prompts, train_tokenizer

PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer of single bytes: as many tokens as letters."""
    return train_tokenizer([], 260)


def examples_of(tokenizer, count: int):
    records = [PromptOnly(f"{i}", {"answer": i}) for i in range(count)]
    return tokenize_records(records, "prompt_only", tokenizer, DataConfig())


def answers(loader: Loader, position: int) -> list[int]:
    return [record.columns["answer"] for record in loader.records(position)]


def sequence(loader: Loader, count: int, position: int = 0) -> list[int]:
    found = []
    while len(found) < count:
        found += answers(loader, position)
        _, position = loader.batch(position)
    return found[:count]


def test_order_does_not_depend_on_the_batch_size(tokenizer):
    examples = examples_of(tokenizer, 10)
    orders = [sequence(Loader(examples, size, seed=3), 60) for size in (1, 3, 4, 10, 25)]
    assert all(order == orders[0] for order in orders)
    assert sequence(Loader(examples, 4, seed=4), 60) != orders[0]


def test_every_epoch_has_every_record_once_in_another_order(tokenizer):
    order = sequence(Loader(examples_of(tokenizer, 10), 4, seed=0), 30)
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_fingerprint_is_of_tokens_and_of_what_reward_functions_are_given(tokenizer):
    """A run whose answers were corrected is not the one that was begun."""
    records = [PromptOnly("q", {"answer": 1}), PromptOnly("r", {"answer": 2})]

    def of(records):
        return tokenize_records(records, "prompt_only", tokenizer, DataConfig()).fingerprint

    corrected = [records[0], records[1]._replace(columns={"answer": 3})]
    other = [records[0], records[1]._replace(prompt="s")]
    assert len({of(records), of(corrected), of(other), of(records[::-1]), of(records[:1])}) == 5
    assert of(list(records)) == of(records)


def test_batch_is_a_function_of_the_position(tokenizer):
    examples = examples_of(tokenizer, 10)
    whole = sequence(Loader(examples, 4, seed=0), 40)
    for position in (0, 3, 8, 17):
        fresh = Loader(examples, 4, seed=0)
        batch, after = fresh.batch(position)
        assert after == position + 4
        assert answers(fresh, position) == whole[position : position + 4]
        np.testing.assert_array_equal(batch.index, range(position, position + 4))
        for i, record in enumerate(fresh.records(position)):
            ids = encode_prompts(tokenizer, [record.prompt])[0]
            assert list(batch.tokens[i, : batch.lengths[i]]) == ids


def test_prompts_in_buckets_keep_the_place_by_which_their_completions_are_drawn(tokenizer):
    """A window has the prompts of the order without buckets, each with its own index, in shorter batches."""
    records = [PromptOnly("x" * (i % 20), {"answer": i}) for i in range(60)]
    plain = tokenize_records(records, "prompt_only", tokenizer, DataConfig())
    bucketed = dataclasses.replace(plain, shorter=(8, 16))
    size, window, shapes = 4, 4 * WINDOW, set()
    for start in (0, window):
        order = answers(Loader(plain, window, seed=2), start)
        loader, indices = Loader(bucketed, size, seed=2), []
        for position in range(start, start + window, size):
            batch, _ = loader.batch(position)
            taken = loader.records(position)
            assert answers(loader, position) == [order[i - start] for i in batch.index]
            assert batch.lengths.tolist() == [1 + len(record.prompt) for record in taken]
            indices += batch.index.tolist()
            shapes.add(batch.tokens.shape[1])
        assert sorted(indices) == list(range(start, start + window)) != indices
    assert shapes == {8, 16, 24}


def test_mixture_has_its_shares_and_every_source_its_own_epochs(tokenizer, tmp_path):
    for name, count in (("a", 6), ("b", 4)):
        texts = [{"prompt": f"{name}{i}", "source": name} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    sources = {str(tmp_path / "a.jsonl"): 3.0, str(tmp_path / "b.jsonl"): 1.0}
    examples = load_examples(DataConfig(train=sources), "prompt_only", "train", tokenizer, 0)
    loader = Loader(examples, 5, seed=1)
    taken = [record.prompt for position in range(0, 40, 5) for record in loader.records(position)]
    of = {name: [prompt for prompt in taken if prompt[0] == name] for name in "ab"}
    assert (len(of["a"]), len(of["b"])) == (30, 10)
    for start in range(0, 30, 6):
        assert sorted(of["a"][start : start + 6]) == [f"a{i}" for i in range(6)]
    for start in (0, 4):
        assert sorted(of["b"][start : start + 4]) == [f"b{i}" for i in range(4)]
    assert of["a"][:6] != of["a"][6:12]
    alone = load_examples(DataConfig(train=str(tmp_path / "a.jsonl")), "prompt_only", "train", tokenizer, 0)
    assert [record.prompt for record in Loader(alone, 30, seed=1).records(0)] == of["a"]


def test_members_of_a_mixture_may_have_formats_of_their_own(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n{"text": "another one, long"}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "completion": "a"}')
    sources = {str(tmp_path / "a.jsonl"): 1.0, str(tmp_path / "b.jsonl"): 1.0}
    examples = load_examples(DataConfig(train=sources), "prompt_completion", "train", tokenizer, 0)
    assert examples.formats == ("text", "prompt_completion")
    assert examples.counts == (2, 1) and len(examples) == 3
    assert examples.longest_row == len("another one, long") + 2  # BOS and EOS
    assert list(training_texts(DataConfig(train=sources), "prompt_completion", 0))[-2:] == ["q", "a"]
    (tmp_path / "b.jsonl").write_text('{"question": "q"}')
    with pytest.raises(ValueError, match=f"data.train: {tmp_path}/b.jsonl: no column"):
        load_examples(DataConfig(train=sources), "prompt_completion", "train", tokenizer, 0)


def test_order_is_kept_and_cannot_be_written(tokenizer):
    order = epoch_order(0, 0, 5)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1
    assert list(order) == list(
        np.random.Generator(np.random.Philox(np.random.SeedSequence([0, 0]))).permutation(5)
    )


def test_evaluation_sees_every_record_once_and_fills_the_last_batch(tokenizer):
    batches = list(Loader(examples_of(tokenizer, 10), 4, seed=0).eval_batches())
    assert [record.columns["answer"] for _, records in batches for record in records] == list(range(10))
    assert [batch.lengths.shape for batch, _ in batches] == [(4,)] * 3
    np.testing.assert_array_equal(batches[2][0].lengths, [2, 2, 0, 0])
    np.testing.assert_array_equal(batches[1][0].index, [4, 5, 6, 7])


def test_preference_rows_are_interleaved(tokenizer):
    pairs = [Preference("p", "good", "bad"), Preference("q", "ab", "c")]
    examples = tokenize_records(pairs, "preference", tokenizer, DataConfig())
    ((batch, records),) = Loader(examples, 3, seed=0).eval_batches()
    assert isinstance(batch, Rows) and records == pairs
    texts = [tokenizer.decode(batch.tokens[i, : batch.lengths[i]]) for i in range(6)]
    assert texts == [
        "<|bos|>pgood<|eos|>",
        "<|bos|>pbad<|eos|>",
        "<|bos|>qab<|eos|>",
        "<|bos|>qc<|eos|>",
        "",
        "",
    ]
    np.testing.assert_array_equal(batch.prompt_lengths, [2, 2, 2, 2, 0, 0])
    train, after = Loader(examples, 3, seed=0).batch(0)
    assert (train.tokens.shape, after) == ((6, 8), 3)


def test_batches_made_ahead_are_the_loaders(tokenizer):
    loader = Loader(examples_of(tokenizer, 10), 4, seed=0)
    prefetched = Prefetched(loader)
    for position in (0, 4, 8, 12, 0, 40, 44):  # also going back, and further than was made
        found, after = prefetched.batch(position)
        expected, _ = loader.batch(position)
        assert after == position + 4
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_making_a_batch_raises_comes_when_it_is_asked_for():
    class Damaged:
        batch_size = 4

        def batch(self, position):
            if position == 8:
                raise ValueError("record 8 cannot be read")
            return position, position + 4

    prefetched = Prefetched(Damaged())
    assert [prefetched.batch(position) for position in (0, 4)] == [(0, 4), (4, 8)]
    with pytest.raises(ValueError, match="record 8 cannot be read"):
        prefetched.batch(8)


def test_threads_end_with_their_batches(tokenizer):
    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("batches")}

    before = threads()
    prefetched = Prefetched(Loader(examples_of(tokenizer, 10), 4, seed=0))
    prefetched.batch(0)
    made = threads() - before
    assert 1 <= len(made) <= 2
    del prefetched
    gc.collect()
    for thread in made:
        thread.join(timeout=5)
        assert not thread.is_alive()
