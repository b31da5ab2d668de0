"""What a stage reports beside its metrics."""

from types import SimpleNamespace

import pytest

from rlhf_jax.data.records import Preference
from rlhf_jax.rewards.functions import RewardFunction
from rlhf_jax.stage import _first_start, _gold_accuracy


def test_ties_count_one_half_in_the_accuracy_ceiling():
    """The gold function counts letters: two wins, a tie, a defeat."""
    pairs = [("aa", "a"), ("aaa", "a"), ("aa", "bb"), ("a", "aa")]
    gold = RewardFunction("gold", lambda prompts, completions: [len(text) for text in completions])
    plan = SimpleNamespace(
        gold=gold, held_out=SimpleNamespace(records=[Preference("Say it.", *pair) for pair in pairs])
    )
    assert _gold_accuracy(plan) == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_a_stage_was_first_started_when_its_directory_or_its_checkpoint_says(tmp_path):
    """Else goodput would set the steps of all starts against the time of the last."""
    assert _first_start(tmp_path, {}, 100.0) == _first_start(tmp_path, {"begun": 50.0}, 200.0) == 100
    (tmp_path / "begun").unlink()
    assert _first_start(tmp_path, {"begun": 50.0}, 200.0) == _first_start(tmp_path, {}, 300.0) == 50
