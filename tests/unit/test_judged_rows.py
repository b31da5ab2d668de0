"""Rankings, ratings and margins on their way from a file to a batch, and the options that read them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax.batch import JudgedRows, Rows
from rlhf_jax.config import DataConfig
from rlhf_jax.data.examples import load_examples, tokenize_records
from rlhf_jax.data.formats import read_records
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.records import Preference, Ranking, Rated
from rlhf_jax.data.synthetic import synthetic_records
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.stage import _best
from tests.configurations import CHAIN

REWARD_ONLY = "run: {dir: RUN}\nstages: [{name: reward, algorithm: reward_model}]\n"

RANKINGS = [
    {"prompt": "p", "completions": ["a", "bb", "c"], "scores": [1, 3, 1], "pairs": [[1, 0]]},
    {"prompt": "q", "completions": ["a", "a"], "scores": [0.5, 0], "pairs": [[0, 1]]},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a tokenizer of single bytes: as many tokens as letters."""
    return train_tokenizer([], 260)


def read(source, kind):
    return read_records(source, kind, DataConfig(), "w").records


def test_margins_are_a_column_or_the_difference_of_scores():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}
    assert read([pair], "preference_with_margin") == [Preference("p", "a", "b", margin=2.0)]
    assert read([pair], "preference") == [Preference("p", "a", "b")]
    assert read(RANKINGS[:1], "preference_with_margin") == [Preference("p", "bb", "a", margin=2.0)]
    by_rank = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 3, 3]}
    assert [of.margin for of in read([by_rank], "preference_with_margin")] == [2.0, 2.0]


def test_ratings_are_a_column_or_the_scores_of_a_ranking():
    one = {"prompt": "p", "completion": "a", "rating": 4.5}
    assert read([one], "rating") == [Rated("p", "a", 4.5)]
    assert read(RANKINGS[:1], "rating") == [Rated("p", "a", 1.0), Rated("p", "bb", 3.0), Rated("p", "c", 1.0)]


@pytest.mark.parametrize(
    "record, kind, message",
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference_with_margin", "no column 'margin'"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "large"},
            "preference_with_margin",
            "record 1: column 'margin' is 'large', must be a finite number",
        ),
        (
            {"prompt": "p", "completion": "a", "rating": None},
            "rating",
            "record 1: column 'rating' is None, must be a finite number",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "pairs": [[0, 1]]},
            "rating",
            "no column 'scores'.*how good each completion is",
        ),
    ],
)
def test_what_is_not_told_is_one_clear_line(record, kind, message):
    with pytest.raises(ValueError, match=message):
        read([record], kind)


def test_rankings_keep_ties_and_lose_pairs_of_equal_completions():
    found = read_records(RANKINGS, "ranking", DataConfig(), "w")
    assert [of.pairs for of in found.records] == [((1, 0),), ()]
    assert found.records[0].scores == (1.0, 3.0, 1.0)
    assert found.left_out == {"pairs of equal completions in a ranking": 1}


def test_rankings_are_records_of_as_many_rows_as_the_longest(tokenizer):
    records = [
        Ranking("p", ("aaa", "b"), ((0, 1),), (2.0, 1.0)),
        Ranking("q", ("c", "dd", "e"), ((1, 0), (1, 2)), (0.0, 1.0, 0.0)),
    ]
    examples = tokenize_records(records, "ranking", tokenizer, DataConfig())
    assert examples.rows_per_record == 3
    wider = examples.with_rows_per_record(4)
    batch = wider.collate([[0], [1]], [0, 1], 3)
    assert isinstance(batch, JudgedRows)
    assert batch.rows.lengths.tolist() == [6, 4, 0, 0, 4, 5, 4, 0, 0, 0, 0, 0]
    assert batch.rows.prompt_lengths.tolist() == [2, 2, 0, 0, 2, 2, 2, 0, 0, 0, 0, 0]
    assert batch.ratings.tolist() == [2, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    places = np.argwhere(batch.better).tolist()
    assert places == [[0, 1], [5, 0], [5, 2]]  # row, and the place in its record of what it is better than
    assert _best(batch, 4).nonzero()[0].tolist() == [0, 5]


def test_packed_rankings_stay_whole(tokenizer):
    records = [Ranking("p", ("a",) * n, ((0, 1),), tuple(map(float, range(n, 0, -1)))) for n in (2, 3, 2)]
    examples = tokenize_records(records, "ranking", tokenizer, DataConfig(max_length=8, packing=True))
    (batch, taken), *rest = Loader(examples, 4, 0).eval_batches()
    assert isinstance(batch, JudgedRows) and not rest and len(taken) == 3
    shape = np.shape(batch.rows.lengths)
    assert np.shape(batch.ratings) == shape and np.shape(batch.better) == (*shape, 3)
    of_records = np.reshape(batch.ratings, (-1, 3))
    assert sorted(of_records.tolist()) == sorted(
        [[2, 1, 0], [3, 2, 1], [2, 1, 0], *[[0, 0, 0]] * (len(of_records) - 3)]
    )
    assert ((np.reshape(batch.rows.lengths, (-1, 3)) > 0) == (of_records > 0)).all()


def test_other_judgements_are_other_data(tokenizer):
    def fingerprint(rating):
        return tokenize_records([Rated("p", "a", rating)], "rating", tokenizer, DataConfig()).fingerprint

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(1.5)


def test_sources_of_rankings_of_other_lengths_are_one(tokenizer, tmp_path):
    for number, record in enumerate(RANKINGS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
    train = {str(tmp_path / f"{number}.jsonl"): 1.0 for number in range(2)}
    cfg = DataConfig(train=train, eval=str(tmp_path / "0.jsonl"))
    examples = load_examples(cfg, "ranking", "train", tokenizer, 0)
    assert examples.rows.lengths.reshape(-1, 3).tolist() == [[4, 5, 4], [4, 4, 0]]


@pytest.mark.parametrize("kind", ["preference_with_margin", "ranking", "rating"])
def test_the_embedded_task_has_judgements(kind, tokenizer):
    records = synthetic_records(kind, "eval", 0)
    assert records == synthetic_records(kind, "eval", 0)
    examples = tokenize_records(records[:40], kind, tokenizer, DataConfig())
    ratings, better = examples.judgements
    assert np.isfinite(ratings).all() and len(np.unique(ratings)) > 3
    if kind == "ranking":
        assert (better == (ratings[:, :, None] > ratings[:, None, :]) & better).all()
        marks = [record.scores for record in records]
        assert any(len(set(of)) < len(of) for of in marks)  # ties


def test_pairs_alone_need_no_judgements(tokenizer):
    examples = tokenize_records([Preference("p", "a", "b")], "preference", tokenizer, DataConfig())
    batch = examples.collate([[0]], [0], 1)
    assert isinstance(batch, Rows) and _best(batch, 2).tolist() == [True, False]


@pytest.mark.parametrize(
    "options, line",
    [
        ("loss: hinge", "reward_model.margin: must be > 0 where reward_model.loss is 'hinge'"),
        ("loss: regression", "reward_model.normalizer: must be none where reward_model.loss is 'regression'"),
        ("label_smoothing: 0.5", "reward_model.label_smoothing: must be >= 0 and < 0.5, got 0.5"),
        ("margin: -1", "reward_model.margin: must be >= 0, got -1"),
        (
            "{loss: hinge, margin: 1, label_smoothing: 0.1}",
            "reward_model.label_smoothing: would be ignored: reward_model.loss is 'hinge'",
        ),
        (
            "{loss: plackett_luce, margin: 1}",
            "reward_model.margin: would be ignored: reward_model.loss is 'plackett_luce'",
        ),
        (
            "{loss: info_nce, all_pairs: true}",
            "reward_model.all_pairs: would be ignored: reward_model.loss is 'info_nce'",
        ),
        (
            "{loss: regression, normalizer: none, center_coef: 0.1}",
            "reward_model.center_coef: would be ignored: reward_model.loss is 'regression'",
        ),
    ],
)
def test_options_that_do_not_fit_the_loss(problems, options, line):
    (found,) = problems(
        CHAIN + "reward_model: " + (options if options[0] == "{" else f"{{{options}}}") + "\n"
    )
    assert found.startswith(line)


def test_a_trunk_is_fresh_where_there_is_another(problems):
    assert problems(CHAIN + "reward_model: {fresh_trunk: true}\n") == []
    alone = REWARD_ONLY + "reward_model: {normalizer: none, fresh_trunk: true}\n"
    assert problems(alone) == [
        "reward_model.fresh_trunk: would be ignored: the stage starts from no model: its trunk is fresh"
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_rows_of_a_ranking_are_not_known_yet(problems, batch_size):
    options = f"{{loss: plackett_luce, batch_size: {batch_size}}}"
    assert (
        problems(
            CHAIN + f"reward_model: {options}\nsft: {{batch_size: 8}}\nppo: {{batch_size: 8, "
            "num_minibatches: 1}\nmesh: {data: 8}\n"
        )
        == []
    )


def test_several_functions_have_weights(problems):
    text = CHAIN + "rewards: {function: {'math:sin': 0.5, 'math:cos': -1}}\n"
    assert problems(text) == []
    assert problems(text.replace("-1", "0")) == [
        "rewards.function: 'math:cos' would be ignored: its weight is 0"
    ]
    (line,) = problems(text.replace("math:cos", "math:coss"))
    assert line == "rewards.function: reward function 'math:coss': math has no coss; did you mean 'cos'?"
    (line,) = problems(text.replace("}}", "}, function_weight: 2}"))
    assert line.startswith("rewards.function_weight: would be ignored: ")
    assert line.endswith("rewards.function tells the weight of each")
