"""What a stage reports beside its metrics."""

from types import SimpleNamespace

import pytest

from rlhf_jax.data.records import Preference
from rlhf_jax.rewards.functions import RewardFunction
from rlhf_jax.stage import _gold_accuracy


def test_ties_count_one_half_in_the_accuracy_ceiling():
    """The gold function counts letters: two wins, a tie, a defeat."""
    pairs = [("aa", "a"), ("aaa", "a"), ("aa", "bb"), ("a", "aa")]
    gold = RewardFunction("gold", lambda prompts, completions: [len(text) for text in completions])
    plan = SimpleNamespace(
        gold=gold, held_out=SimpleNamespace(records=[Preference("Say it.", *pair) for pair in pairs])
    )
    assert _gold_accuracy(plan) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
