"""Unpaired completions in batches, and log-probabilities of a reference that were computed beforehand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import reference
from rlhf_jax.config import DataConfig
from rlhf_jax.data.examples import load_examples
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.reference import with_reference
from tests import tiny

ANSWERS = "abcdefg"


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer of single bytes: as many tokens as letters."""
    return train_tokenizer([], 260)


def examples_of(tmp_path, tokenizer, kind, **options):
    """Returns seven completions of different lengths, of questions that differ, or as many pairs."""
    path = tmp_path / "records.jsonl"
    lines = []
    for number, answer in enumerate(ANSWERS):
        good, bad = answer * (number + 1), answer.upper() * (7 - number)
        line = {"prompt": f"q{number}", "chosen": good, "rejected": bad}
        if kind == "unpaired":
            line = {"prompt": f"q{number}", "completion": good, "label": number % 3 == 0}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    cfg = DataConfig(train=str(path), eval=str(path), cache_dir="none", max_length=24, **options)
    return load_examples(cfg, kind, "train", tokenizer, seed=0)


def sequences(rows, of_sequences, tokenizer):
    """Returns {text of a sequence: its number} of rows."""
    shape = (len(rows.tokens), -1)
    found = {}
    of_rows = (rows.tokens, rows.lengths.reshape(shape), np.reshape(of_sequences, shape))
    for tokens, lengths, numbers in zip(*of_rows, strict=True):
        ends = np.cumsum(lengths)
        for length, end, number in zip(lengths, ends, numbers, strict=True):
            if length:
                text = tokenizer.decode(tokens[end - length : end], skip_special_tokens=True)
                found[text] = number.item()
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_unpaired_completions_lie_beside_mismatched_ones(packing, tmp_path, tokenizer):
    examples = examples_of(tmp_path, tokenizer, "unpaired", packing=packing)
    found, mismatched = {}, {}
    for batch, _ in Loader(examples, 2, seed=0).eval_batches():
        assert batch.rows.tokens.shape == batch.mismatched.tokens.shape == (2, examples.length)
        assert batch.is_desirable.shape == batch.rows.lengths.shape
        found |= sequences(batch.rows, batch.is_desirable, tokenizer)
        mismatched |= sequences(batch.mismatched, batch.is_desirable, tokenizer)
    assert found == {f"q{i}{answer * (i + 1)}": i % 3 == 0 for i, answer in enumerate(ANSWERS)}
    nexts = [(i, (i + 1) % 7) for i in range(7)]
    assert mismatched == {f"q{i}{ANSWERS[j] * (j + 1)}": i % 3 == 0 for i, j in nexts}


def test_fingerprint_of_unpaired_completions_has_their_labels(tmp_path, tokenizer):
    examples = examples_of(tmp_path, tokenizer, "unpaired")
    flipped = [record._replace(is_desirable=not record.is_desirable) for record in examples.records]
    assert dataclasses.replace(examples, records=flipped).fingerprint != examples.fingerprint


def test_pairs_serve_unpaired_as_their_completions(tmp_path, tokenizer):
    examples_of(tmp_path, tokenizer, "preference")
    path = str(tmp_path / "records.jsonl")
    cfg = DataConfig(train=path, eval=path, cache_dir="none", max_length=24)
    examples = load_examples(cfg, "unpaired", "train", tokenizer, seed=0)
    assert examples.is_desirable.tolist() == [True, False] * 7
    assert examples.formats == ("preference",)
    assert all(record.mismatched[0].lower() != record.completion[0].lower() for record in examples.records)


def summed(frozen, rows):
    """Stands for a reference: what it says of a completion is the number of its tokens and their sum."""
    mask = np.asarray(rows.completion_mask)
    tokens = np.where(mask, rows.tokens, 0) * frozen["scale"]
    if not rows.is_packed:
        return jnp.asarray(tokens.sum(1), jnp.float32)
    segments = np.asarray(rows.segments)
    of_rows = [
        [tokens[b][segments[b] == s].sum() for s in range(rows.lengths.shape[1])] for b in range(len(tokens))
    ]
    return jnp.asarray(of_rows, jnp.float32).reshape(-1)


def computed(examples, path, program=summed, scale=1.0, of="a model"):
    return with_reference(
        examples, program, {"scale": scale}, path, of, batch_size=2, seed=0, mesh=tiny.mesh()
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_log_probabilities_stand_beside_their_completions(kind, packing, tmp_path, tokenizer):
    examples = examples_of(tmp_path, tokenizer, kind, packing=packing)
    known = computed(examples, tmp_path / "train.npz")
    assert known.ref_logprobs.shape == (7, 2)
    assert known.fingerprint == examples.fingerprint
    for batch, _ in (Loader(known, 2, seed=0).batch(0), next(Loader(known, 2, seed=0).eval_batches())):
        for rows in (batch,) if kind == "preference" else batch[:2]:
            assert rows.ref_logprobs.shape == rows.lengths.shape
            expected = summed({"scale": 1.0}, jax.tree.map(jnp.asarray, rows))
            np.testing.assert_array_equal(np.ravel(rows.ref_logprobs), expected)


def test_what_is_known_is_not_computed_again(tmp_path, tokenizer, monkeypatch):
    """A run that is killed goes on from what it wrote; another model, or other records, are computed anew."""
    monkeypatch.setattr(reference, "SECONDS_BETWEEN_WRITES", 0.0)
    examples, path, calls = examples_of(tmp_path, tokenizer, "preference"), tmp_path / "train.npz", []

    def killed_at(number):
        def program(frozen, rows):
            calls.append(rows)
            if len(calls) == number:
                raise KeyboardInterrupt
            return summed(frozen, rows)

        return program

    with pytest.raises(KeyboardInterrupt):
        computed(examples, path, killed_at(3))
    whole = computed(examples, path, killed_at(0)).ref_logprobs
    assert len(calls) == 3 + 2  # four batches: two were written
    np.testing.assert_array_equal(whole, computed(examples, tmp_path / "other.npz").ref_logprobs)
    np.testing.assert_array_equal(whole, computed(examples, path, killed_at(0)).ref_logprobs)
    assert len(calls) == 5
    np.testing.assert_array_equal(2 * whole, computed(examples, path, scale=2.0, of="b").ref_logprobs)
    moved = dataclasses.replace(examples, rows=token_rows(examples.rows[2:] + examples.rows[:2]))
    np.testing.assert_array_equal(np.roll(whole, -1, axis=0), computed(moved, path).ref_logprobs)
