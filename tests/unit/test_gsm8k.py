"""The verifier of GSM8K: forms of answers, and 5,276 solutions of other models with their verdicts."""

from __future__ import annotations

import gzip
import json

import pytest

from rlhf_jax.rewards.gsm8k import exact_answer, final_number, no_answer


@pytest.mark.parametrize(
    "text, number",
    [
        ("48/2 = <<48/2=24>>24 clips\n#### 72", "72"),
        ("#### 1,234,567.50", "1234567.5"),
        ("####-5", "-5"),
        ("#### -$10", "-10"),
        ("#### $-10.", "-10"),
        ("#### .5 of it", "0.5"),
        ("so it is 3\nA: 12 apples", "12"),
        ("thus \\boxed{\\$18}", "18"),
        ("The answer is: 7.", "7"),
        ("#### 5\nQuestion: and then?\n#### 6", "6"),  # the last one counts
        ("#### 0", "0"),
        ("He has 72 clips.", None),
        ("#### seventy-two", None),
        ("UCLA: 12", None),  # `A:` begins a line
        ("", None),
    ],
)
def test_the_last_answer_is_found(text, number):
    found = final_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_equal_numbers_score_one_and_all_else_zero():
    completions = ["#### 3.0", "#### 4", "three", "#### 3,000"]
    assert exact_answer([""] * 4, completions, ["1 + 2\n#### 3"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_completions_without_an_answer_are_counted():
    assert no_answer([""] * 4, ["#### 3.0", "three", "", "A: 4"]) == [0.0, 1.0, 1.0, 0.0]


def test_no_float_stands_between_large_numbers():
    assert exact_answer([""], ["#### 9007199254740993"], ["#### 9007199254740992"]) == [0.0]


def test_a_reference_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="^row 1: the reference has no answer such as `#### 72`: 'many'$"):
        exact_answer(["", ""], ["#### 1", "#### 1"], ["#### 1", "many"])


def test_the_verdicts_of_the_data_are_met(test_data):
    with gzip.open(test_data / "gsm8k" / "example_model_solutions.jsonl.gz") as file:
        records = [json.loads(line) for line in file]
    solutions = [
        (value["solution"], record["ground_truth"], value["is_correct"])
        for record in records
        for value in record.values()
        if isinstance(value, dict)
    ]
    assert len(solutions) == 4 * 1319
    texts, references, verdicts = zip(*solutions, strict=True)
    assert exact_answer([""] * len(texts), texts, references) == [float(verdict) for verdict in verdicts]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_reference_of_the_data_has_its_answer(test_data, split):
    with gzip.open(test_data / "gsm8k" / f"{split}.jsonl.gz") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert exact_answer([""] * len(answers), answers, answers) == [1.0] * len(answers)
