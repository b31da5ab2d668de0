"""Reward functions of the user: how they are found, called, checked and combined."""

import functools
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import RewardsConfig
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.rewards.combine import Judge, combine, function_names
from rlhf_jax.rewards.functions import RewardError, RewardFunction, call, load_function

PROMPTS, COMPLETIONS = ["a", "b", "c"], ["x", "yy", "a long completion " * 20]


def lengths(prompts, completions):
    return [len(completion) for completion in completions]


@pytest.fixture
def in_directory(tmp_path, monkeypatch):
    """An empty current directory that is on the path only while the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_module_of_the_current_directory_is_found(in_directory):
    (in_directory / "found_rewards.py").write_text(
        "def score(prompts, completions):\n    return [1] * len(completions)\nclass Box:\n    score = score\n"
    )
    for spec in ("found_rewards:score", "found_rewards:Box.score"):
        function = load_function(spec)
        assert function.name == spec
        np.testing.assert_array_equal(function([PromptOnly("a")], ["x"]), [1.0])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("my_rewards", "'my_rewards' is not of the form package.module:name"),
        ("my_rewards.py:score:x", "not of the form"),
        ("../my_rewards:score", "not of the form"),
        (":score", "not of the form"),
        (
            "no_such_module_here:score",
            "cannot import no_such_module_here: ModuleNotFoundError.*current directory",
        ),
        ("math:sqr", "math has no sqr; did you mean 'sqrt'?"),
        ("math:pi", "is a float, not a function"),
        ("builtins:max", "its parameters cannot be told"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(spec, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_function(spec)


@pytest.mark.parametrize(
    "source, message",
    [
        ("import absent_dependency", "absent_dependency"),
        ("def score(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_does_not_import_says_why(in_directory, source, message):
    (in_directory / "broken_rewards.py").write_text(source)
    with pytest.raises(ValueError, match=f"cannot import broken_rewards.*{message}"):
        load_function("broken_rewards:score")


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        np.array([1, 2.5, 1]),
        jnp.array([1, 2.5, 1]),
        [np.float64(1), jnp.array(2.5), 1],
    ],
)
def test_any_numbers_are_taken(answer):
    scores = call(lambda prompts, completions: answer, "f", PROMPTS, COMPLETIONS, {})
    np.testing.assert_array_equal(scores, [1.0, 2.5, 1.0])
    assert scores.dtype == np.float32


@pytest.mark.parametrize(
    "answer, message",
    [
        (None, "f returned None; it must return a list of 3 numbers"),
        (2.0, "f returned a float"),
        ("abc", "f returned a str"),
        ((x for x in (1, 2, 3)), "f returned a generator"),
        ({"a": 1, "b": 2, "c": 3}, "f returned a dict"),
        ({1, 2, 3}, "f returned a set"),
        (np.ones((3, 1)), "f returned an array of 2 dimensions"),
        (np.float32(1), "f returned an array of 0 dimensions"),
        ([1.0, 2.0], "f returned 2 scores; it must return a list of 3 numbers"),
        ([1.0, None, 2.0], "f returned None for row 1.*completion is 'yy'"),
        ([1.0, "2", 2.0], "f returned '2' for row 1"),
        ([1.0, [2.0], 2.0], r"f returned \[2.0\] for row 1"),
        ([1.0, float("nan"), 2.0], "f returned nan for row 1"),
        ([float("-inf"), 1.0, 2.0], "f returned -inf for row 0.*completion is 'x'"),
        ([1.0, 1.0, 1e39], "f returned 1e.39 for row 2"),  # too large for float32
        ([1.0, 1.0, 10**400], "f returned 1000.* for row 2"),
    ],
)
def test_wrong_answers_name_function_row_and_completion(answer, message):
    with pytest.raises(RewardError, match=message) as caught:
        call(lambda prompts, completions: answer, "f", PROMPTS, COMPLETIONS, {})
    assert len(str(caught.value)) < 400  # a long completion is shown in part


def test_an_exception_of_the_function_is_named_and_chained():
    def fails(prompts, completions):
        return {}[prompts[0]]

    with pytest.raises(RewardError, match="pkg:fails raised KeyError: 'a'") as caught:
        call(fails, "pkg:fails", PROMPTS, COMPLETIONS, {})
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_would_end_the_program_is_named():
    with pytest.raises(RewardError, match="f raised SystemExit: 7"):
        call(lambda prompts, completions: sys.exit(7), "f", PROMPTS, COMPLETIONS, {})


def test_columns_go_to_those_who_take_them():
    columns = {"answer": [1, 2, 3], "source": ["s", "s", "s"]}
    seen = {}

    def everything(completions, **rest):
        seen.update(rest)
        return [0.0] * 3

    def by_name(prompts, completions, answer, bonus=1):
        return [a + bonus for a in answer]

    call(everything, "f", PROMPTS, COMPLETIONS, columns)
    assert seen == columns | {"prompts": PROMPTS}
    np.testing.assert_array_equal(call(by_name, "f", PROMPTS, COMPLETIONS, columns), [2, 3, 4])
    np.testing.assert_array_equal(
        call(functools.partial(by_name, bonus=5), "f", PROMPTS, COMPLETIONS, columns), [6, 7, 8]
    )
    np.testing.assert_array_equal(call(lengths, "f", PROMPTS, ["", "b", "cc"], columns), [0, 1, 2])


def test_conversations_reach_functions_as_messages():
    """As in TRL; a completion that is messages already, such as one of a pair, stays as it is."""
    seen = {}

    def keep(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    RewardFunction("keep", keep)(
        [PromptOnly(prompt), PromptOnly(prompt), PromptOnly("c")], ["b", answer, "d"]
    )
    assert seen == {"prompts": [prompt, prompt, "c"], "completions": [answer, answer, "d"]}


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(
        RewardError, match="f needs solution, which the records do not have; it is given source, prompts"
    ):
        call(lambda completions, solution: [0], "f", ["a"], ["x"], {"source": ["s"]})


def test_a_function_gets_prompts_and_columns_of_its_records():
    def score(prompts, completions, weight):
        return [len(p) + len(c) * (w or 0) for p, c, w in zip(prompts, completions, weight, strict=True)]

    records = [PromptOnly("pp", {"weight": 10}), PromptOnly("p", {})]
    np.testing.assert_array_equal(RewardFunction("f", score)(records, ["cc", "c"]), [22, 1])


def test_combination_is_weighted_and_each_part_is_logged_alone():
    parts = {"model": jnp.array([1.0, 2.0]), "function": np.array([10.0, -10.0], np.float32)}
    weights, both = {"model": 2.0, "function": 0.5}, np.array([True, True])
    scores, metrics = combine(parts, weights, both)
    np.testing.assert_array_equal(scores, [7.0, -1.0])
    assert scores.dtype == np.float32
    assert metrics["reward/model"] == (3.0, 2.0)
    assert metrics["reward/function"].value == 0.0
    scores, metrics = combine(parts, weights, np.array([False, True]))
    np.testing.assert_array_equal(scores, [7.0, -1.0])
    assert metrics["reward/model"] == (2.0, 1.0)


def test_judge():
    records, learned = [PromptOnly("p")] * 2, np.array([1.0, 2.0], np.float32)
    settings = RewardsConfig(model_weight=3.0, function="f:lengths", function_weight=-1.0)
    functions = {"f:lengths": RewardFunction("f", lengths)}
    counted = np.ones(2, bool)
    both = Judge(settings, functions, has_model=True)(records, ["a", "bb"], learned, counted)
    np.testing.assert_array_equal(both.scores, [2.0, 4.0])
    assert set(both.metrics) == {"reward/model", "reward/function"}
    alone = Judge(settings, functions, has_model=False)(records, ["a", "bb"], np.full(2, np.nan), counted)
    np.testing.assert_array_equal(alone.scores, [-1.0, -2.0])
    learned_only = Judge(settings, {}, has_model=True)(records, ["a", "bb"], learned, counted)
    np.testing.assert_array_equal(learned_only.scores, [3.0, 6.0])
    with pytest.raises(ValueError, match=r"no reward.*reward_from.*rewards\.function"):
        Judge(settings, {}, has_model=False)


def test_several_functions_are_weighted_and_told_one_by_one():
    def twos(records, completions):
        return np.full(len(completions), 2.0, np.float32)

    weights = {"a:lengths": 0.5, "b:twos": -1.0}
    functions = {"a:lengths": RewardFunction("lengths", lengths), "b:twos": twos}
    judge = Judge(RewardsConfig(function=weights, model_weight=3.0), functions, has_model=True)
    verdict = judge([PromptOnly("p")] * 2, ["aaa", "b"], np.array([1.0, 0.0], np.float32), np.ones(2, bool))
    np.testing.assert_array_equal(verdict.scores, [0.5 * 3 - 2 + 3, 0.5 * 1 - 2])
    assert {name: mean.value for name, mean in verdict.metrics.items()} == {
        "reward/function/lengths": 2.0,
        "reward/function/twos": 2.0,
        "reward/model": 0.5,
    }
    assert function_names(["a:f", "b:f", "c:total"]) == {
        "a:f": "function/a:f",
        "b:f": "function/b:f",
        "c:total": "function/total",  # no metric of an algorithm is called so
    }


def test_needed_columns_are_known_before_anything_is_called():
    def judge(prompts, completions, label, style="plain"):
        raise AssertionError

    function = RewardFunction("judge", judge)
    function.check_columns(["label", "other"])
    with pytest.raises(RewardError, match="judge needs label, which the records do not have"):
        function.check_columns(["other"])
    with pytest.raises(RewardError, match="math:sqrt takes x by position alone"):
        load_function("math:sqrt").check_columns([])
