"""Tokenised records: where they begin and end, what is dropped and cut, openings, templates."""

import json
import re

import pytest

from rlhf_jax import progress
from rlhf_jax.batch import Prompts, Rows
from rlhf_jax.config import DataConfig, TokenizerConfig
from rlhf_jax.data.examples import load_examples, tokenize_records, training_texts
from rlhf_jax.data.loader import Loader
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
