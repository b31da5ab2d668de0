"""Rankings, ratings and margins on their way from a file to a batch, and the options that read them."""

from __future__ import annotations

import json
from types import MappingProxyType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config_types
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import JudgedRows, Rows, TrainState
from rlhf_jax.command_line import read_config
from rlhf_jax.config import DataConfig
from rlhf_jax.data.examples import load_examples, tokenize_records
from rlhf_jax.data.formats import read_records
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.records import Preference, Ranking, Rated
from rlhf_jax.data.synthetic import synthetic_records
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.mesh_checks import check_mesh
from rlhf_jax.plan import plan_stages, with_rows_of
from rlhf_jax.plan_notes import losses
from rlhf_jax.sharding import axis_rules
from rlhf_jax.stage import _best, _normalized
from tests import tiny
from tests.configurations import CHAIN

REWARD_ONLY = "run: {dir: RUN}\nstages: [{name: reward, algorithm: reward_model}]\n"

RANKINGS = [
    {"prompt": "p", "completions": ["a", "bb", "c"], "scores": [1, 3, 1], "pairs": [[1, 0]]},
    {"prompt": "q", "completions": ["a", "a"], "scores": [0.5, 0], "pairs": [[0, 1]]},
]


def ranked(**order):
    return {"prompt": "p", "completions": ["a", "b", "c"], **order}


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


@pytest.mark.parametrize("kind", ["preference_with_margin", "ranking_with_margin"])
def test_a_margin_is_not_negative(kind):
    fine = ranked(scores=[3, 1, 1], pairs=[[0, 1], [1, 2]])
    assert read([fine], kind)  # compared and found alike: 0
    against = r"record 2: column 'pairs' has \[1, 0\], but by column 'scores' .* worse one, 1 against 3: the"
    with pytest.raises(ValueError, match=against):
        read([fine, ranked(scores=[3, 1, 1], pairs=[[0, 2], [1, 0]])], kind)
    with pytest.raises(ValueError, match=r"record 1: .* \[0, 2\], but by column 'ranks' .* one, 3 against 1"):
        read([ranked(ranks=[3, 1, 1], pairs=[[0, 2]])], kind)


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
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -0.5},
            "preference_with_margin",
            "record 1: column 'margin' is -0.5, must be >= 0",
        ),
        (
            ranked(pairs=[[0, 1]]),
            "ranking_with_margin",
            "no column 'scores'.*how good each completion is",
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


EQUALS = "pairs of equal completions in a ranking"
REPEATED = "judgements that a ranking repeats"
NONE_BETTER = "rankings in which none is better"
NONE_BEST = "rankings in which none is best: judged in a circle"


def test_rankings_lose_pairs_of_equal_completions_and_what_then_tells_nothing():
    for kind, scores in {"ranking_with_margin": (1.0, 3.0, 1.0), "ranking_with_ties": ()}.items():
        found = read_records(RANKINGS, kind, DataConfig(), "w")
        assert [of.pairs for of in found.records] == [((1, 0),)]
        assert found.records[0].scores == scores  # what is not compared is no tie
        assert found.left_out == {EQUALS: 1, NONE_BETTER: 1}


@pytest.mark.parametrize(
    "kind, num_read, left_out",
    [
        ("ranking", 1, {NONE_BETTER: 1}),
        ("ranking_with_margin", 1, {NONE_BETTER: 1}),
        ("ranking_with_best", 1, {NONE_BETTER: 1}),
        ("ranking_with_ties", 2, {}),  # which draw scores together
    ],
)
def test_a_ranking_of_ties_is_read_where_ties_tell_something(kind, num_read, left_out):
    source = [ranked(scores=[2, 1, 1]), ranked(ranks=[1, 1, 1]) | {"scores": [3, 3, 3]}]
    found = read_records(source, kind, DataConfig(), "w")
    assert len(found.records) == num_read and found.left_out == left_out


def test_rankings_of_which_none_tells_anything_are_told(tokenizer):
    with pytest.raises(ValueError, match=f"w: no completion is better .* 1 rankings .1 {NONE_BETTER}"):
        read([ranked(scores=[1, 1, 1])], "ranking")
    with pytest.raises(ValueError, match=f"w: no completion is best .*1 {NONE_BEST}"):
        read([ranked(pairs=[[0, 1], [1, 2], [2, 0]])], "ranking_with_best")


def test_repeated_judgements_count_once_in_a_ranking_and_contradictory_ones_both(tokenizer):
    source = [ranked(pairs=[[0, 1], [0, 1], [1, 0], [0, 2]])]
    found = read_records(source, "ranking", DataConfig(), "w")
    assert found.records[0].pairs == ((0, 1), (1, 0), (0, 2)) and found.left_out == {REPEATED: 1}
    better = tokenize_records(found.records, "ranking", tokenizer, DataConfig()).judgements[1]
    assert np.argwhere(better[0]).tolist() == [[0, 1], [0, 2], [1, 0]]
    assert len(read(source, "preference")) == 4  # one by one each of them is a record


def test_a_ranking_without_a_best_one_is_counted_where_one_is_needed():
    source = [ranked(pairs=[[0, 1], [1, 2], [2, 0]]), ranked(pairs=[[0, 1], [1, 0], [2, 1]])]
    found = read_records(source, "ranking_with_best", DataConfig(), "w")
    assert [of.pairs for of in found.records] == [((0, 1), (1, 0), (2, 1))]
    assert found.left_out == {NONE_BEST: 1}
    assert len(read(source, "ranking")) == 2


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


def test_scores_are_normalised_on_the_best_completions(tokenizer):
    """Each head by itself; filling rows, here of the last batch and of the shorter ranking, have no say."""
    records = [
        Ranking("p", ("a" * 4, "b"), ((0, 1),)),
        Ranking("p", ("c", "d" * 7, "e"), ((1, 0), (1, 2))),
        Ranking("p", ("f", "g", "h"), ((0, 1),)),  # the third was not compared: none is better
    ]
    examples = tokenize_records(records, "ranking", tokenizer, DataConfig())
    settings = {"all_pairs": True, "normalizer": "mean_std", "num_heads": 2, "batch_size": 2}
    algorithm = with_rows_of(ALGORITHMS["reward_model"], examples)
    plan = SimpleNamespace(
        stage=tiny.stage("reward_model", settings=settings), algorithm=algorithm, demonstrations=examples
    )

    def head_scores(params, frozen, rows):
        return jnp.stack([rows.lengths, 10 * rows.lengths]).astype(jnp.float32)

    aux = {name: jnp.zeros(2) for name in ("normalizer_mean", "normalizer_std")}
    state = TrainState(jnp.int32(1), jnp.int32(0), {}, {}, aux)
    found = _normalized(plan, SimpleNamespace(head_scores=head_scores), state, {}, tiny.mesh())
    lengths = np.array([7, 10, 4, 4])  # EOS, and a prompt of two tokens
    np.testing.assert_allclose(found.aux["normalizer_mean"], [lengths.mean(), 10 * lengths.mean()])
    np.testing.assert_allclose(found.aux["normalizer_std"], [lengths.std(), 10 * lengths.std()], rtol=1e-6)


def test_other_judgements_are_other_data(tokenizer):
    def fingerprint(rating):
        return tokenize_records([Rated("p", "a", rating)], "rating", tokenizer, DataConfig()).fingerprint

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(1.5)


def test_sources_of_rankings_of_other_lengths_are_one(tokenizer, tmp_path):
    for number, record in enumerate([RANKINGS[0], RANKINGS[1] | {"completions": ["a", "b"]}]):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
    train = {str(tmp_path / f"{number}.jsonl"): 1.0 for number in range(2)}
    cfg = DataConfig(train=train, eval=str(tmp_path / "0.jsonl"))
    examples = load_examples(cfg, "ranking_with_ties", "train", tokenizer, 0)
    assert examples.rows.lengths.reshape(-1, 3).tolist() == [[4, 5, 4], [4, 4, 0]]


def test_a_ranking_that_is_dropped_makes_the_others_no_longer(tokenizer):
    records = [
        Ranking("p", ("a", "b"), ((0, 1),)),
        Ranking("p", ("a", "b", "c" * 50), ((0, 1),)),
    ]
    cfg = DataConfig(max_length=16, truncation="drop")
    examples = tokenize_records(records, "ranking", tokenizer, cfg)
    assert (len(examples), examples.rows_per_record, examples.num_dropped) == (1, 2, 1)
    assert np.isnan(examples.judgements[0]).all()  # no scores: none equals another


REWARD_FILES = """
run: {dir: HERE/run}
stages: [{name: reward, algorithm: reward_model}]
model: {hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 64}
data: {train: HERE/train.jsonl, eval: HERE/eval.jsonl, max_prompt_length: 8, max_length: 32}
reward_model: {all_pairs: true, batch_size: 2, normalizer: none}
"""


@pytest.fixture
def planned(tmp_path, tokenizer):
    """Returns a function that plans a reward model on rankings; records of both splits are given."""

    def planned(train, held_out, changes=MappingProxyType({})):
        for name, records in {"train": train, "eval": held_out}.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        text = REWARD_FILES
        for old, new in changes.items():
            text = text.replace(old, new)
        (tmp_path / "file.yaml").write_text(text.replace("HERE", str(tmp_path)))
        (plan,) = plan_stages(read_config(["--config", str(tmp_path / "file.yaml")]), tokenizer)
        return plan

    return planned


TWO = {"prompt": "p", "completions": ["a", "b"], "scores": [2, 1]}
FIVE = {"prompt": "p", "completions": list("abcde"), "scores": [5, 4, 3, 2, 1]}


def test_each_split_has_as_many_rows_as_its_own_rankings(planned):
    plan = planned([TWO, TWO], [TWO, FIVE])
    assert (plan.train.rows_per_record, plan.held_out.rows_per_record) == (2, 5)
    assert plan.train.fingerprint == planned([TWO, TWO], [TWO]).train.fingerprint
    assert losses(plan) == [
        "[reward] data.train: 2 rows a record, as the longest has, 100.0% filled",
        "[reward] data.eval: 5 rows a record, as the longest has, 70.0% filled",
    ]
    check_mesh([plan], tiny.mesh(data=2))
    with pytest.raises(ValueError, match="reward_model.batch_size of data.eval, .* has 5, is 10; .* of 4"):
        check_mesh([plan], tiny.mesh(data=4))


def test_rows_that_only_fill_up_are_not_counted_among_those_that_are_cut(planned):
    long = TWO | {"completions": ["a" * 60, "b"]}
    assert "1 of 7 rows cut at 32 tokens" in losses(planned([long, FIVE], [TWO]))[0]


def test_heads_that_the_mesh_does_not_divide_are_told_beforehand(planned):
    plan = planned([TWO], [TWO], {"batch_size: 2": "batch_size: 2, num_heads: 3"})
    whole = {"kv_heads": "none", "vocab": "none"}
    with axis_rules(whole):
        check_mesh([plan], tiny.mesh(tensor=2))
    with (
        axis_rules(whole | {"score_heads": "tensor"}),
        pytest.raises(ValueError, match="'score_heads' of size 3 is not a multiple of 2"),
    ):
        check_mesh([plan], tiny.mesh(tensor=2))


def test_a_column_of_margins_that_no_loss_reads_is_told(planned):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "gap": 1}
    changes = {"max_length: 32": "max_length: 32, columns: {margin: gap}"}
    plan = planned([pair], [pair], changes | {"all_pairs": "margin_from_data"})
    assert plan.train.records == [Preference("p", "a", "b", margin=1.0)]
    with pytest.raises(ValueError, match="data.columns.margin: gap would be ignored: .* reads preference"):
        planned([pair], [pair], changes | {"all_pairs: true, ": ""})


@pytest.mark.parametrize("kind", ["preference_with_margin", "rating", *config_types.RANKINGS])
def test_the_embedded_task_has_judgements(kind, tokenizer):
    records = synthetic_records(kind, "eval", 0)
    assert records == synthetic_records(kind, "eval", 0)
    examples = tokenize_records(records[:40], kind, tokenizer, DataConfig())
    ratings, better = examples.judgements
    assert np.isfinite(ratings).all() and len(np.unique(ratings)) > 3
    if kind in config_types.RANKINGS:
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
    assert problems(text.replace("-1", "0")) == []  # it is logged
    of_none = text.replace("reward_from: reward", "").replace("-1", "0").replace("0.5", "0")
    assert "rewards.function: gives no score: all weights are 0" in problems(of_none)
    (line,) = problems(text.replace("math:cos", "math:coss"))
    assert line == "rewards.function: reward function 'math:coss': math has no coss; did you mean 'cos'?"
    (line,) = problems(text.replace("}}", "}, function_weight: 2}"))
    assert line.startswith("rewards.function_weight: would be ignored: ")
    assert line.endswith("rewards.function tells the weight of each")
