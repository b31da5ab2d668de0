"""The cache of tokens: the same rows again, nothing from other settings, nothing from damaged files."""

import os
import threading

import pytest

from rlhf_jax.config import DataConfig
from rlhf_jax.data import token_cache
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import tokenize_records
from rlhf_jax.data.records import PromptCompletion, PromptOnly
from rlhf_jax.data.token_cache import fingerprint, through_cache
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.data.tokenize import Encoded, Losses
from rlhf_jax.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer([], 260)
RECORDS = [PromptCompletion(f"p{i}", "x" * i, {"answer": i}) for i in range(5)]
ROWS = [Row([1, 2, 3], 1), Row([4], 1, was_cut=True), Row([5, 6, 7, 8], 1, excluded=((1, 2), (3, 4)))]


class Encode:
    """Counts how often it is asked; leaves out the first record."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return Encoded(RECORDS[1:4], token_rows(ROWS), 2, Losses(long_prompts=2, apart=1))


def through(directory, encode, settings=(), records=RECORDS):
    return through_cache(str(directory), encode, records, TOKENIZER, settings, least_tokens=1)


def test_what_was_tokenised_once_is_read_again(tmp_path):
    encode = Encode()
    first, again = through(tmp_path, encode), through(tmp_path, encode)
    assert encode.calls == 1
    assert list(again.rows) == ROWS == list(first.rows)
    assert (again.rows[-1], again.rows[:2]) == (ROWS[2], ROWS[:2])
    assert (again.records, again.longest_prompt) == (RECORDS[1:4], 2)
    assert all(a is b for a, b in zip(again.records, RECORDS[1:4], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [fingerprint(RECORDS, TOKENIZER, ())]


def test_whatever_decides_the_tokens_is_in_the_fingerprint(tmp_path):
    other = [RECORDS[0]._replace(completion="y"), *RECORDS[1:]]
    renamed = train_tokenizer([], 260)
    renamed.eos_token = renamed.pad_token
    trained = train_tokenizer(["some words of some text"] * 9, 270)
    found = {
        fingerprint(RECORDS, TOKENIZER, ()),
        fingerprint(other, TOKENIZER, ()),
        fingerprint(RECORDS[:-1], TOKENIZER, ()),
        fingerprint(RECORDS, TOKENIZER, ["completion"]),
        fingerprint(RECORDS, renamed, ()),
        fingerprint(RECORDS, trained, ()),
    }
    assert len(found) == 6
    assert fingerprint([RECORDS[0]._replace(columns={}), *RECORDS[1:]], TOKENIZER, ()) in found


@pytest.mark.parametrize("name", ["tokens.npy", "ends.npy", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_files_are_made_again(tmp_path, caplog, name, damage):
    encode = Encode()
    through(tmp_path, encode)
    (path,) = tmp_path.glob(f"*/{name}")
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "cut" else content[:-3] + b"\x07" + content[-2:])
    assert list(through(tmp_path, encode).rows) == ROWS
    assert "are damaged (" in caplog.text and "they are made again" in caplog.text
    assert list(through(tmp_path, encode).rows) == ROWS
    assert encode.calls == 2


def test_runs_that_tokenise_at_once_leave_one_whole_copy(tmp_path):
    together = threading.Barrier(4)

    def encode():
        together.wait()
        return Encode()()

    threads = [threading.Thread(target=through, args=(tmp_path, encode)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 1
    encode = Encode()
    assert list(through(tmp_path, encode).rows) == ROWS and encode.calls == 0


def test_a_race_that_is_lost_is_no_failure(tmp_path, caplog, monkeypatch):
    """The other run's copy appears after this one has looked for it, and stays."""
    rename, first = os.rename, []

    def slower(source, path):
        if not first:
            first.append(path)
            through(tmp_path, Encode())
        rename(source, path)

    monkeypatch.setattr(token_cache.os, "rename", slower)
    assert list(through(tmp_path, Encode()).rows) == ROWS
    assert first == list(tmp_path.iterdir()) and not caplog.text


def test_what_is_not_kept(tmp_path, caplog, monkeypatch):
    """Small sets, records that were changed, where it is switched off, and where nothing can be written."""
    encode = Encode()
    through_cache(str(tmp_path / "small"), encode, RECORDS, TOKENIZER, (), least_tokens=9)
    changed = Encoded([RECORDS[0]._replace(prompt="p")], token_rows(ROWS), 2, Losses())
    through(tmp_path / "changed", lambda: changed)
    monkeypatch.chdir(tmp_path)
    through("none", encode)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    assert list(through(tmp_path / "file", encode).rows) == ROWS
    assert "tokens are not kept in data.cache_dir" in caplog.text


def test_the_data_section_decides_where_and_what(tmp_path, monkeypatch):
    """By default in the user's cache; options that decide no token do not change the name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache.through_cache, "__kwdefaults__", {"least_tokens": 1})
    for settings in ({}, {"packing": True}, {"max_length": 6}, {"cache_dir": str(tmp_path / "own")}):
        for _ in range(2):
            examples = tokenize_records(RECORDS, "prompt_completion", TOKENIZER, DataConfig(**settings))
        assert len(examples) == 5 and examples.num_cut == (2 if "max_length" in settings else 0)
    assert len(list((tmp_path / "rlhf_jax" / "tokens").iterdir())) == 2
    assert len(os.listdir(tmp_path / "own")) == 1
    plain = DataConfig(cache_dir="none")
    again = tokenize_records(RECORDS, "prompt_completion", TOKENIZER, DataConfig())
    assert tokenize_records(RECORDS, "prompt_completion", TOKENIZER, plain).fingerprint == again.fingerprint
    opened = [PromptOnly("abc efgh", {}, 3)]  # its prompt is cut
    for _ in range(2):
        assert tokenize_records(opened, "prompt_only", TOKENIZER, DataConfig()).records[0].prompt == "abc"
