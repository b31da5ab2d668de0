"""The judge of the stories: none of its sentences was seen in training, and it tells good words from bad."""

import gzip
import json
import re

import numpy as np
import pytest

from rlhf_jax.bench.stories import BagOfWords, cross_validated, judge_rows, letters


def write(directory, name, rows):
    with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


def test_sentences_with_the_same_letters_are_left_out(tmp_path):
    write(tmp_path, "sst2_train", [("A fine , fine film .", 1), ("it 's dull", 0)])
    write(tmp_path, "sst2_dev", [("never again", 0)])
    write(
        tmp_path,
        "rt_polarity",
        [("a fine, fine film", 1), ("It's dull!", 0), ("NEVER AGAIN", 0), ("a fine film", 1), ("so bad", 0)],
    )
    texts, labels = judge_rows(tmp_path)
    assert texts == ["a fine film", "so bad"]
    assert labels.tolist() == [1, 0]


def test_no_sentence_of_the_judge_is_in_the_training_sets(test_data):
    """Told apart here by other means than the judge's own function."""

    def bare(text):
        return "".join(re.findall(r"[a-z]", text.lower()))

    def read(name):
        with gzip.open(test_data / "sentiment" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]

    seen = {bare(text) for name in ("sst2_train", "sst2_dev") for text in read(name)}
    texts, labels = judge_rows(test_data / "sentiment")
    assert not seen.intersection(map(bare, texts))
    everything = read("rt_polarity")
    assert 1000 < len(texts) < len(everything)  # they do overlap
    assert len(texts) == len(labels) == sum(bare(text) not in seen for text in everything)
    assert set(labels) == {0.0, 1.0}


@pytest.mark.parametrize("text", ["A b-c 'D'!", "abcd", "ab 1 cd"])
def test_letters(text):
    assert letters(text) == "abcd"


def test_the_judge_knows_good_words_from_bad():
    good, bad = ["good fun", "good joy", "fun joy"], ["bad pain", "bad woe", "pain woe"]
    judge = BagOfWords(4 * (good + bad), np.array(4 * ([1.0] * 3 + [0.0] * 3)))
    odds = judge.log_odds(["good fun joy", "bad pain woe", "good bad", "unknown"])
    assert odds[0] > 1 and odds[1] < -1
    assert odds[0] == pytest.approx(-odds[1], rel=1e-3)  # the data are symmetric
    assert odds[2:] == pytest.approx([0, 0], abs=1e-3)


def test_the_weights_minimise_the_penalised_loss():
    """One word and a bias, on a grid."""
    texts, labels = ["yes", "yes", "yes", "no"], np.array([1.0, 1.0, 0.0, 0.0])
    judge = BagOfWords(texts, labels)  # "no" is too rare to count
    with_word, without = judge.log_odds(["yes", "no"])
    w, b = np.meshgrid(np.linspace(-2, 2, 801), np.linspace(-2, 2, 801))
    loss = 2 * np.logaddexp(0, -w - b) + np.logaddexp(0, w + b) + np.logaddexp(0, b) + 0.5 * w**2
    best = np.unravel_index(loss.argmin(), loss.shape)
    assert with_word - without == pytest.approx(w[best], abs=0.01)
    assert without == pytest.approx(b[best], abs=0.01)


def test_accuracy_is_of_sentences_left_out():
    """Labels at random cannot be told from words that no two sentences share."""
    rng = np.random.default_rng(0)
    letters_of = "abcdefghij"
    unique = ["".join(letters_of[int(d)] for d in f"{i:04d}") for i in range(200)]
    texts = [f"{word} {word}x {word}" for word in unique]
    found = cross_validated(texts, rng.integers(0, 2, 200).astype(float))
    assert 0.3 < found < 0.7
    clear = [("good " if i % 3 else "bad ") + word for i, word in enumerate(unique)]
    assert cross_validated(clear, np.array([text.startswith("good") for text in clear], float)) == 1.0
