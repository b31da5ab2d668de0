"""Tokenizer: what is loaded can end and pad; text is encoded in one way; training is deterministic."""

import json
import re
from pathlib import Path

import pytest

from rlhf_jax.config import TokenizerConfig
from rlhf_jax.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    encode_completions,
    encode_prompts,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = ["the lamp is broken", "the lamp is here", "a lamp is a lamp"] * 3


def encode_prompt(tokenizer, text):
    return encode_prompts(tokenizer, [text])[0]


def encode_completion(tokenizer, text):
    return encode_completions(tokenizer, [text])[0]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 290)


@pytest.fixture
def edit_saved(tokenizer, tmp_path):
    """Returns a function that saves the tokenizer with some special tokens changed or taken away."""

    def save(**changes: str | None):
        tokenizer.save_pretrained(tmp_path)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if not (tmp_path / file).exists():
                continue
            config = json.loads((tmp_path / file).read_text()) | changes
            (tmp_path / file).write_text(json.dumps({key: value for key, value in config.items() if value}))
        return str(tmp_path)

    return save


def test_trained_tokenizer_has_distinct_control_tokens_and_encodes_anything(tokenizer):
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert 259 < len(tokenizer) <= 290
    for text in ("the lamp", " lamp", "naïve 雪 \n\n\t x", "  two  spaces "):
        assert tokenizer.decode(encode_completion(tokenizer, text)) == text
    assert len(encode_completion(tokenizer, " lamp")) == 1


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(TEXTS), 290)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_saved_tokenizer_loads_the_same_and_puts_bos_first(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for cfg, model_path in (
        (TokenizerConfig(path=str(tmp_path)), "elsewhere"),
        (TokenizerConfig(), str(tmp_path)),
    ):
        loaded = load_tokenizer(cfg, model_path)
        assert encode_prompt(loaded, "the lamp") == encode_prompt(tokenizer, "the lamp")
        assert loaded("the lamp")["input_ids"] == encode_prompt(tokenizer, "the lamp")
        assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == (PAD, BOS, EOS)


def test_prompts_begin_with_bos_once_and_completions_have_no_control_token(tokenizer):
    assert encode_prompt(tokenizer, "a") == [1, *encode_completion(tokenizer, "a")]
    assert encode_prompt(tokenizer, "") == [1]
    assert encode_completion(tokenizer, "") == []
    assert encode_prompts(tokenizer, []) == encode_completions(tokenizer, []) == []
    assert encode_prompts(tokenizer, ["a", "the lamp"]) == [
        encode_prompt(tokenizer, "a"),
        encode_prompt(tokenizer, "the lamp"),
    ]


def test_control_tokens_written_in_text_stay_text(tokenizer):
    text = f"{BOS}a {EOS} lamp{PAD}"
    for ids in (encode_completion(tokenizer, text), encode_prompt(tokenizer, text)[1:]):
        assert min(ids) > 2
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["tinystories656k", "stories260k", "tokenizers/gpt2", "tokenizers/mistral"])
def test_real_tokenizers_are_encoded_in_the_same_way(name, test_data):
    pad = "</s>" if name == "tokenizers/mistral" else ""
    tokenizer = load_tokenizer(TokenizerConfig(pad_token=pad), str(test_data / name))
    prompt = encode_prompt(tokenizer, f"Once upon {tokenizer.eos_token} a time")
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    completion = encode_completion(tokenizer, f" there{tokenizer.eos_token} {tokenizer.pad_token}")
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} & set(completion)


def test_padding_token_may_be_eos_by_option(edit_saved):
    path = edit_saved(pad_token=None)
    with pytest.raises(
        ValueError, match=re.escape(f"tokenizer.pad_token: the tokenizer of {path} names no padding")
    ) as caught:
        load_tokenizer(TokenizerConfig(), path)
    assert f"{EOS!r}, its EOS token, is allowed" in str(caught.value)
    loaded = load_tokenizer(TokenizerConfig(pad_token=EOS), path)
    assert loaded.pad_token_id == loaded.eos_token_id == 2


def test_eos_token_must_be_there(edit_saved):
    path = edit_saved(eos_token=None)
    with pytest.raises(
        ValueError, match=r"tokenizer.eos_token: the tokenizer of .* names no EOS token.* set tokenizer.eos"
    ):
        load_tokenizer(TokenizerConfig(), path)
    assert load_tokenizer(TokenizerConfig(eos_token=EOS), path).eos_token_id == 2


def test_tokenizer_without_bos_starts_with_the_text(edit_saved):
    loaded = load_tokenizer(TokenizerConfig(), edit_saved(bos_token=None))
    assert encode_prompt(loaded, " lamp") == encode_completion(loaded, " lamp")
    assert encode_prompt(loaded, "") == []


def test_named_token_must_be_in_the_vocabulary(edit_saved):
    path = edit_saved()
    with pytest.raises(
        ValueError, match=re.escape("tokenizer.eos_token: '<|eoss|>' is not in the vocabulary")
    ) as caught:
        load_tokenizer(TokenizerConfig(eos_token="<|eoss|>"), path)
    assert str(caught.value).endswith("; did you mean '<|eos|>'?")
    with pytest.raises(ValueError, match=re.escape("tokenizer.pad_token: 'no' is not in the vocabulary")):
        load_tokenizer(TokenizerConfig(pad_token="no"), path)


def test_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.path: is empty and so is model.path"):
        load_tokenizer(TokenizerConfig(), "")
    (tmp_path / "model").mkdir()
    with pytest.raises(
        ValueError, match=r"tokenizer.path: no such directory: .*/modle; did you mean 'model'\?"
    ):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "modle")), "")
    with pytest.raises(
        ValueError, match=r"^model.path: .*/model holds no tokenizer that transformers can load: .+"
    ) as caught:
        load_tokenizer(TokenizerConfig(), str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("tokenizer.json", [], "TypeError: "),
        ("tokenizer.json", {}, "KeyError: 'added_tokens'"),
        ("tokenizer_config.json", [], "AttributeError: 'list' object has no attribute 'get'"),
        (
            "tokenizer_config.json",
            {"eos_token": 5},
            "TypeError: Special token eos_token has to be either str",
        ),
    ],
)
def test_damaged_tokenizer_is_one_line(file, content, reason, edit_saved):
    path = edit_saved()
    Path(path, file).write_text(json.dumps(content))
    fails_to_load(path, reason)


def test_tokenizer_with_a_merge_of_unknown_tokens_is_one_line(edit_saved):
    path = edit_saved()
    content = json.loads(Path(path, "tokenizer.json").read_text())
    content["model"]["merges"].append(["zz", "a"])
    Path(path, "tokenizer.json").write_text(json.dumps(content))
    fails_to_load(path, "Token `zz` out of vocabulary")


def test_what_only_shows_when_text_is_encoded_is_one_line(edit_saved):
    path = edit_saved(model_max_length="long")
    message = f"tokenizer.path: the tokenizer of {path} cannot encode the text: TypeError: '>' not supported"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        encode_prompts(load_tokenizer(TokenizerConfig(path=path)), ["a"])


def test_reason_of_several_lines_is_told_whole(edit_saved):
    path = edit_saved()
    Path(path, "tokenizer.json").unlink()
    fails_to_load(path, "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library")


def fails_to_load(path, reason):
    message = f"tokenizer.path: {path} holds no tokenizer that transformers can load: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        load_tokenizer(TokenizerConfig(path=path))
    assert "\n" not in str(caught.value)


def test_many_texts_have_the_tokens_that_each_has_alone(monkeypatch):
    tokenizer = train_tokenizer(["some words of some text"] * 9, 270)
    texts = ["some", " words", "", " of some", "text"]
    alone = [encode_completions(tokenizer, [text])[0] for text in texts]
    monkeypatch.setattr("rlhf_jax.data.tokenizer.TEXTS_AT_ONCE", 2)
    assert encode_completions(tokenizer, texts) == alone
    assert encode_completions(tokenizer, []) == []
