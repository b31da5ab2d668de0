"""Loader: an order that is a function of (seed, position); tokenised records with their drops and cuts."""

import dataclasses
import gc
import json
import re
import threading

import jax
import numpy as np
import pytest

from rlhf_jax import progress
from rlhf_jax.batch import Prompts, Rows
from rlhf_jax.config import DataConfig, TokenizerConfig
from rlhf_jax.data.examples import load_examples, tokenize_records, training_texts
from rlhf_jax.data.loader import WINDOW, Loader, Prefetched, epoch_order
from rlhf_jax.data.records import Preference, PromptCompletion, PromptOnly
from rlhf_jax.data.tokenize import opening
from rlhf_jax.data.tokenizer import encode_completions, encode_prompts, load_tokenizer, train_tokenizer

PAD, BOS, EOS = 0, 1, 2


def encode_prompt(tokenizer, text):
    return encode_prompts(tokenizer, [text])[0]


def encode_completion(tokenizer, text):
    return encode_completions(tokenizer, [text])[0]


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer of single bytes: as many tokens as letters."""
    return train_tokenizer([], 260)


@pytest.fixture
def no_bos(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(TokenizerConfig(), str(tmp_path))


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
            ids = encode_prompt(tokenizer, record.prompt)
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


def test_demonstrations_end_with_eos_unless_cut(tokenizer):
    records = [
        PromptCompletion("p", "abc"),
        PromptCompletion("p", "abcdefgh"),
        PromptCompletion("too long", "x"),
    ]
    cfg = DataConfig(max_prompt_length=4, max_length=6)
    examples = tokenize_records(records, "prompt_completion", tokenizer, cfg)
    assert [row.ids[-1] == EOS for row in examples.rows] == [True, False]
    assert (len(examples), examples.num_dropped, examples.num_cut) == (2, 1, 1)
    assert (examples.length, examples.longest_row, examples.longest_prompt) == (6, 6, 2)
    assert examples.records == records[:2]


def test_loss_on_all_starts_after_the_first_token(tokenizer):
    records = [PromptCompletion("prompt", "ab")]
    for loss_on, prompt_length in (("completion", 7), ("all", 1)):
        examples = tokenize_records(records, "prompt_completion", tokenizer, DataConfig(), loss_on=loss_on)
        assert examples.rows[0].prompt_length == prompt_length
        assert len(examples.rows[0].ids) == 10


def test_prompt_must_leave_room_for_a_completion(tokenizer):
    cfg = DataConfig(max_prompt_length=8, max_length=4)
    records = [PromptCompletion("abc", "x"), PromptCompletion("ab", "xyz")]
    examples = tokenize_records(records, "prompt_completion", tokenizer, cfg)
    assert [row.ids for row in examples.rows] == [
        encode_prompt(tokenizer, "ab") + encode_completion(tokenizer, "x")
    ]


def test_prompts_that_are_all_too_long_are_an_error(tokenizer):
    records = [PromptOnly("abcdef"), PromptOnly("abcdefgh")]
    message = (
        "data.eval: all 2 prompts are too long: they have 7 to 9 tokens, data.max_prompt_length allows 6;"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize_records(
            records, "prompt_only", tokenizer, DataConfig(max_prompt_length=6), where="data.eval"
        )
    message = "all 1 prompts are too long: they have 7 to 7 tokens, data.max_length (less one) allows 5"
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize_records(
            [PromptCompletion("abcdef", "")], "prompt_completion", tokenizer, DataConfig(max_length=6)
        )


def test_text_without_bos_starts_after_eos(no_bos):
    examples = tokenize_records([PromptCompletion("", "ab")], "prompt_completion", no_bos, DataConfig())
    assert examples.rows[0].ids == [EOS, *encode_completion(no_bos, "ab"), EOS]
    assert examples.rows[0].prompt_length == 1
    with pytest.raises(
        ValueError, match=r"data.train: record 2 has an empty prompt and the tokenizer has no BOS"
    ):
        tokenize_records([PromptOnly("a"), PromptOnly("")], "prompt_only", no_bos, DataConfig())


def test_empty_prompt_is_bos(tokenizer):
    examples = tokenize_records([PromptOnly("")], "prompt_only", tokenizer, DataConfig())
    assert examples.rows[0].ids == [BOS]


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("abcde fg", "abcde"),
        ("ab. c def", "ab. c"),
        ("abc defg", "abc "),  # never within a word
        ("abcd. ef", "abcd"),  # nor with a sentence
        ("abc. efg", "abc"),  # nor with the blank after it
        ("ab, , efg", "ab, ,"),
        (",,,,é", ",,,,"),  # nor within a character
        ("abcde", ""),  # nothing is left to complete
        ("..... abc", ""),
        ("abcdefgh", ""),
    ],
)
def test_opening_ends_inside_a_sentence(text, prompt, tokenizer, no_bos):
    for some in (tokenizer, no_bos):
        ids, read = opening(some, encode_prompt(some, text), 5)
        assert read == prompt
        assert ids == (encode_prompt(some, prompt) if prompt else [])


def test_opening_becomes_the_prompt_of_plain_text(tokenizer):
    records = [PromptOnly("abc efgh", {"n": 1}, 3), PromptOnly("ab", {"n": 2}, 3)]
    examples = tokenize_records(records, "prompt_only", tokenizer, DataConfig(max_prompt_length=4))
    assert examples.records == [PromptOnly("abc", {"n": 1}, 3)]
    assert examples.rows[0].ids == encode_prompt(tokenizer, "abc")
    assert examples.num_dropped == 1
    with pytest.raises(ValueError, match=r"no text has more than data.prompt_tokens = 9 tokens; lower it"):
        records = [PromptOnly("ab", {}, 9)]
        tokenize_records(records, "prompt_only", tokenizer, DataConfig(prompt_tokens=9))


def test_blank_stands_between_opening_and_text(tokenizer):
    pairs = [Preference("abc defg", "Good", "Bad", 3), Preference("abc defg", "Good", "Bad", 4)]
    examples = tokenize_records(pairs, "preference", tokenizer, DataConfig())
    assert [record[:3] for record in examples.records] == [("abc", " Good", " Bad"), ("abc ", "Good", "Bad")]
    assert (
        tokenizer.decode(examples.rows[0].ids)
        == tokenizer.decode(examples.rows[2].ids)
        == "<|bos|>abc Good<|eos|>"
    )
    assert [row.prompt_length for row in examples.rows] == [4, 4, 5, 5]


def test_examples_from_files(tokenizer, tmp_path):
    for name, count in (("train", 5), ("eval", 9)):
        lines = [json.dumps({"prompt": f"{name} {i}", "completion": " x"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    train, held_out = str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")
    cfg = DataConfig(train=train, eval=held_out, max_eval_records=4)
    assert len(load_examples(cfg, "prompt_completion", "train", tokenizer, 0)) == 5
    held_out = load_examples(cfg, "prompt_completion", "eval", tokenizer, 0)
    records = held_out.records
    assert held_out.left_out == {"beyond data.max_eval_records = 4": 5}
    assert [record.prompt for record in records] == ["eval 0", "eval 1", "eval 2", "eval 3"]
    assert list(training_texts(cfg, "prompt_completion", 0))[:2] == ["train 0", " x"]
    with pytest.raises(ValueError, match=r"data.eval: is empty; name held-out records"):
        load_examples(DataConfig(train=train), "prompt_completion", "eval", tokenizer, 0)
    with pytest.raises(ValueError, match=r"data.eval: no such file"):
        load_examples(
            DataConfig(train=train, eval="nowhere.jsonl"), "prompt_completion", "eval", tokenizer, 0
        )


def test_what_takes_long_is_shown_by_split(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET", -1.0)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": " x"}) for i in range(3)))
    cfg = DataConfig(train=str(path), eval=str(path))
    for split in ("train", "eval"):
        load_examples(cfg, "prompt_completion", split, tokenizer, 0)
        told = re.findall(r"^\[(.*)\] 3 ", capsys.readouterr().err, re.MULTILINE)
        assert list(dict.fromkeys(told)) == [
            f"{what} data.{split}: {path}"
            for what in (
                "parsing",
                "reading",
                "looking for the tokens of",
                "tokenising prompts of",
                "tokenising",
            )
        ]


@pytest.mark.parametrize(
    "kind, batch_type", [("prompt_completion", Rows), ("preference", Rows), ("prompt_only", Prompts)]
)
def test_embedded_task_brings_its_own_held_out_records(kind, batch_type, tokenizer):
    cfg = DataConfig(max_eval_records=16, max_length=512)
    train = load_examples(cfg, kind, "train", tokenizer, 0)
    held_out = load_examples(cfg, kind, "eval", tokenizer, 0)
    assert len(held_out) == 16
    assert not {record.prompt for record in train.records} & {record.prompt for record in held_out.records}
    batch, _ = Loader(train, 4, seed=0).batch(0)
    assert isinstance(batch, batch_type)
    assert (train.num_dropped, train.num_cut) == (0, 0)


def test_real_stories_give_rows_and_openings(test_data):
    tokenizer = load_tokenizer(TokenizerConfig(), str(test_data / "tinystories656k"))
    path = str(test_data / "tinystories_text" / "stories_train.jsonl")
    cfg = DataConfig(train=f"{path}[:4000]", prompt_tokens=24, max_prompt_length=25)
    stories = load_examples(cfg, "prompt_completion", "train", tokenizer, 0)
    assert len(stories) == 4000 and stories.length == 256
    openings = load_examples(cfg, "prompt_only", "train", tokenizer, 0)
    assert len(openings) > 3990 and openings.length == 25
    for record, row in zip(openings.records[:200], openings.rows, strict=False):
        assert row.ids[0] == tokenizer.bos_token_id and len(row.ids) <= 25
        assert record.prompt.rstrip()[-1] not in ".!?"
    pairs = DataConfig(
        train=str(test_data / "sentiment" / "sst2_dev.jsonl.gz"),
        prompts=path,
        prompt_tokens=24,
        detokenize=True,
    )
    sentences = load_examples(pairs, "preference", "train", tokenizer, 0)
    assert len(sentences.rows) == 2 * len(sentences) > 800
    assert sentences.rows[0].ids[:20] == sentences.rows[1].ids[:20]


def test_a_template_stands_around_every_prompt(tokenizer, tmp_path):
    """Braces elsewhere are plain text, in the template and in the prompt; completions and columns stay."""
    path = tmp_path / "demos.jsonl"
    path.write_text(json.dumps({"question": "{prompt} {x}", "answer": "b"}))
    columns = {"prompt": "question", "completion": "answer"}
    cfg = DataConfig(train=str(path), eval=str(path), columns=columns, prompt_template="{Q} {prompt}\n")
    examples = load_examples(cfg, "prompt_completion", "train", tokenizer, 0)
    assert examples.records == [PromptCompletion("{Q} {prompt} {x}\n", "b")]
    (row,) = examples.rows
    assert list(row.ids[: row.prompt_length]) == list(encode_prompts(tokenizer, ["{Q} {prompt} {x}\n"])[0])
    only = load_examples(cfg, "prompt_only", "eval", tokenizer, 0)
    assert [record.prompt for record in only.records] == ["{Q} {prompt} {x}\n"]


def test_a_template_leaves_texts_alone(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "the lamp is broken"}))
    cfg = DataConfig(train=str(path), eval=str(path), prompt_template="Q: {prompt}\n", prompt_tokens=9)
    for kind in ("prompt_completion", "prompt_only"):
        examples = load_examples(cfg, kind, "train", tokenizer, 0)
        assert "Q" not in examples.records[0].prompt


def test_sources_of_conversations_and_of_plain_text_do_not_mix(tmp_path):
    chat = train_tokenizer([], 260)
    chat.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}]}))
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "a"}))
    cfg = DataConfig(train={str(tmp_path / f"{name}.jsonl"): 1.0 for name in ("chat", "text")})
    with pytest.raises(
        ValueError, match=r"data.train: some sources hold conversations and others plain text"
    ):
        load_examples(cfg, "prompt_only", "train", chat, 0)


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
