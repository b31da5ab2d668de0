"""The embedded task: judged by hand-worked replies, mixed in quality, noisy in labels, split by case."""

import numpy as np
import pytest

from rlhf_jax.data.records import PromptOnly
from rlhf_jax.data.synthetic import (
    ITEMS,
    LABEL_TEMPERATURE,
    PROBLEMS,
    REQUESTS,
    gold_reward,
    preferences,
    synthetic_records,
)
from rlhf_jax.data.tokenizer import encode_completions, encode_prompts, train_tokenizer
from rlhf_jax.rewards.functions import RewardFunction

PROMPT = "Customer: the lamp I ordered arrived broken.\nReply:"
GOLD = RewardFunction("gold", gold_reward)
BEST = " I am sorry that your lamp arrived broken. We will send a new one today. Thank you for your patience."


@pytest.fixture(scope="module")
def demonstrations():
    return synthetic_records("prompt_completion", "train", 0)


@pytest.mark.parametrize(
    "reply, score",
    [
        (BEST, 4.0),
        (" I am sorry that your lamp arrived broken. We will send a new one today.", 3.5),
        (" We are sorry about your lamp.", 2.0),
        (" You wrote about a lamp. I will send a new one.", 2.5),
        (" We got your letter. We will return your money today.", -0.75),  # a promise that does not fit
        (" We are sorry about your chair.", 1.0),  # no chair was ordered, but the word is no item of the shop
        (" We are sorry about your boat.", 0.25),  # another item
        (" You were careless. What a silly letter. That is your own fault.", -2.0),
        (" We got your letter. You were careless.", -1.0),
        (BEST * 2, 4 - 0.25 * 17 - 1.4),  # the second copy brings nothing; 40 words; 17 fours of words twice
        (" We are sorry. We will send a new one. We will return your money.", 2.5 - 0.75),
        (" We are sorry about your lamp", 1.5),  # not ended
        ("", -1.5),
        (" sorry lamp new one thank you", 1.0 - 0.5),  # words alone, without their sentences
        (" " + " ".join(ITEMS) + ".", -3.0),
        (" We" + " are" * 60 + ".", -3.0),
    ],
)
def test_gold_reward_by_hand(reply, score):
    assert gold_reward([PROMPT], [reply]) == [pytest.approx(score)]


def test_gold_reward_takes_a_batch_with_columns():
    assert gold_reward([PROMPT, "Hello."], [BEST, BEST], answer=[1, 2]) == [
        4.0,
        pytest.approx(4.0 - 1 - 1.5 - 0.75 - 0.75),
    ]


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_case_has_a_best_reply_that_needs_no_luck(item, problem):
    promise = PROBLEMS[problem]
    reply = (
        f" I am very sorry that your {item} {problem}. We will {promise} today. Thank you for your letter."
    )
    prompts = [request.format(item=item, problem=problem) for request in REQUESTS]
    assert gold_reward(prompts, [reply] * len(prompts)) == [4.0] * len(prompts)


def test_demonstrations_leave_room_for_improvement(demonstrations):
    gold = np.array(gold_reward([r.prompt for r in demonstrations], [r.completion for r in demonstrations]))
    assert 1.0 < gold.mean() < 1.8
    assert 1.2 < gold.std() < 2.0
    assert 0.02 < (gold == 4.0).mean() < 0.15  # the best is there to be found, but rare
    assert (gold < 0).mean() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_are_noisy_to_a_known_degree(seed):
    for split in ("train", "eval"):
        pairs = synthetic_records("preference", split, seed)
        prompts = [PromptOnly(pair.prompt) for pair in pairs]
        margins = GOLD(prompts, [p.chosen for p in pairs]) - GOLD(prompts, [p.rejected for p in pairs])
        assert 0.84 < np.mean(np.where(margins == 0, 0.5, margins > 0)) < 0.90


def test_labels_follow_bradley_terry():
    pairs = preferences(0, 10_000, "train")
    prompts = [pair.prompt for pair in pairs]
    chosen = np.array(gold_reward(prompts, [pair.chosen for pair in pairs]))
    rejected = np.array(gold_reward(prompts, [pair.rejected for pair in pairs]))
    for margin in (0.25, 0.5, 1.0):
        won, lost = (np.isclose(chosen - rejected, sign * margin).sum() for sign in (1, -1))
        expected = 1 / (1 + np.exp(-margin / LABEL_TEMPERATURE))
        error = np.sqrt(expected * (1 - expected) / (won + lost))
        assert won / (won + lost) == pytest.approx(expected, abs=4 * error)


def test_held_out_prompts_are_unseen_combinations_of_seen_parts():
    def cases(split: str, seed: int) -> set[tuple[str, str]]:
        records = [
            r
            for kind in ("prompt_completion", "preference", "prompt_only")
            for r in synthetic_records(kind, split, seed)
        ]
        texts = {record.prompt for record in records}
        return {
            (item, problem)
            for text in texts
            for item in ITEMS
            for problem in PROBLEMS
            if f" {item} " in text and problem in text
        }

    train, held_out = cases("train", 0), cases("eval", 1)
    assert not train & held_out
    assert len(train | held_out) == len(ITEMS) * len(PROBLEMS)
    for part in (0, 1):
        assert {case[part] for case in train} == {case[part] for case in held_out}


def test_records_are_a_function_of_the_seed():
    for kind in ("prompt_completion", "preference", "prompt_only"):
        assert synthetic_records(kind, "eval", 0) == synthetic_records(kind, "eval", 0)
        assert synthetic_records(kind, "eval", 0) != synthetic_records(kind, "eval", 1)


def test_prompts_are_all_there_once():
    prompts = [
        record.prompt for split in ("train", "eval") for record in synthetic_records("prompt_only", split, 0)
    ]
    assert len(prompts) == len(set(prompts)) == len(ITEMS) * len(PROBLEMS) * len(REQUESTS)


def test_task_is_small_enough_for_a_tiny_model(demonstrations):
    words = {word for r in demonstrations for word in (r.prompt + r.completion).split()}
    assert len(words) < 200
    tokenizer = train_tokenizer((text for r in demonstrations for text in (r.prompt, r.completion)), 512)
    prompts = [len(ids) for ids in encode_prompts(tokenizer, [r.prompt for r in demonstrations])]
    replies = [len(ids) for ids in encode_completions(tokenizer, [r.completion for r in demonstrations])]
    assert min(prompts) >= 12 and max(prompts) <= 24
    assert max(replies) < 48
    assert 15 < np.mean(replies) < 40
    assert all(r.completion.startswith(" ") for r in demonstrations)
