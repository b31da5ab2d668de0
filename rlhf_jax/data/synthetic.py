"""The embedded task: a shop answers its customers, in the readable text of a small grammar.

    Customer: the lamp I ordered arrived broken.
    Reply: I am sorry that your lamp arrived broken. We will send a new one today. Thank you for your letter.

Replies of the grammar are anything between rude and kind, curt and rambling, helpful and beside the point, so
that demonstrations leave room for improvement. What a good reply is, `gold_reward` alone knows: it labels the
preference pairs, with noise, and otherwise only judges. Held-out prompts are combinations of item and problem
that no training record has.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlhf_jax.config_types import Kind
from rlhf_jax.data.records import (
    AnyRecord,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Rated,
    informative,
    unpaired_of,
)

Split = Literal["train", "eval"]

# fmt: off
ITEMS = (
    "bag", "bed", "bell", "belt", "bike", "boat", "book", "bowl", "box", "clock", "coat", "cup",
    "desk", "doll", "drum", "fan", "hat", "lamp", "pan", "pen", "rug", "shirt", "toy", "watch",
)
# fmt: on
PROBLEMS = {  # problem: the remedy that fits it
    "arrived broken": "send a new one",
    "stopped working": "send a new one",
    "never arrived": "look for the parcel",
    "was lost in the post": "look for the parcel",
    "was charged twice": "return your money",
    "came too late": "return your money",
    "is the wrong colour": "change it for the right one",
    "is the wrong size": "change it for the right one",
}
REMEDIES = tuple(dict.fromkeys(PROBLEMS.values()))
REQUESTS = (
    "Customer: the {item} I ordered {problem}.\nReply:",
    "Customer: my new {item} {problem}.\nReply:",
    "Customer: hello, my {item} {problem}.\nReply:",
    "Customer: I bought a {item} and it {problem}.\nReply:",
)
APOLOGIES = (
    " I am sorry that your {item} {problem}.",
    " I am very sorry that your {item} {problem}.",
    " We are sorry about your {item}.",
)
ACKNOWLEDGEMENTS = (" So your {item} {problem}.", " You wrote about a {item}.", " We got your letter.")
PROMISES = (" We will {remedy} today.", " We will {remedy} this week.", " I will {remedy}.")
EVASION = " We will think about it."
THANKS = (" Thank you for your patience.", " Thank you for your letter.")
INSULTS = (" That is your own fault.", " You were careless.", " What a silly letter.")
RAMBLINGS = (
    " We are very busy this week.",
    " I like the weather today.",
    " We have many good things.",
    " I wrote a new list.",
)
RUDE_WORDS = ("fault", "careless", "silly")
MOST_SENTENCES = 6

NUM_DEMONSTRATIONS = {"train": 4096, "eval": 256}
NUM_PREFERENCES = {"train": 32768, "eval": 1024}
NUM_RANKINGS = {"train": 2048, "eval": 256}
LABEL_TEMPERATURE = 0.6  # pairs are labelled by sigmoid((gold_a - gold_b) / LABEL_TEMPERATURE)
ENOUGH_WORDS = 26  # further words cost


class Case(NamedTuple):
    """What a customer writes about."""

    item: str
    problem: str


class Tone(NamedTuple):
    """How likely a clerk's reply has each part."""

    weight: float
    apology: float
    remedy: float  # the fitting one
    other_remedy: float
    thanks: float
    insult: float
    rambling: float


TONES = (
    Tone(weight=0.30, apology=0.85, remedy=0.60, other_remedy=0.25, thanks=0.60, insult=0.00, rambling=0.25),
    Tone(weight=0.35, apology=0.40, remedy=0.50, other_remedy=0.30, thanks=0.25, insult=0.10, rambling=0.35),
    Tone(weight=0.20, apology=0.10, remedy=0.40, other_remedy=0.30, thanks=0.10, insult=0.30, rambling=0.20),
    Tone(weight=0.15, apology=0.10, remedy=0.15, other_remedy=0.25, thanks=0.10, insult=0.90, rambling=0.40),
)
WRONG_ITEM = 0.15  # how often a clerk has another item in mind


def gold_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Returns how good each reply is, in [-3, 4].

    Each credit counts once: 1 for an apology (sorry), 1 for naming the customer's item, 1.5 for the promise
    that fits the problem, 0.5 for thanks. Each fault costs: 1 a rude word (2 at most), 0.75 another item's
    name, 0.75 another promise, 0.25 every four words in a row that were there before, 0.1 every word beyond
    ENOUGH_WORDS (1.5 at most), 1 a reply of fewer than four words, 0.5 one that does not end its last
    sentence. The sum is clipped.

    Args:
        prompts: the customers' messages; a prompt that is none has neither item nor fitting promise.
        completions: the replies.
        columns: ignored.
    """
    return [_judge(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _judge(prompt: str, reply: str) -> float:
    case = _read_case(prompt)
    text = " ".join(_words(reply))
    words = text.split()
    fitting = PROBLEMS.get(case.problem, "")
    promised = {remedy for remedy in REMEDIES if f"will {remedy}" in text}
    named = set(words) & set(ITEMS)
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    credit = (
        1.0 * bool(re.search(r"\b(am|are)( very)? sorry\b", text))
        + 1.0 * (case.item in named)
        + 1.5 * (fitting in promised)
        + 0.5 * ("thank you for" in text)
    )
    cost = (
        min(2.0, 1.0 * len(set(words) & set(RUDE_WORDS)))
        + 0.75 * len(named - {case.item})
        + 0.75 * len(promised - {fitting})
        + 0.25 * (len(fours) - len(set(fours)))
        + min(1.5, 0.1 * max(0, len(words) - ENOUGH_WORDS))
        + 1.0 * (len(words) < 4)
        + 0.5 * (not reply.rstrip().endswith("."))
    )
    return min(4.0, max(-3.0, credit - cost))


def _read_case(prompt: str) -> Case:
    text = " ".join(_words(prompt))
    item = next((word for word in text.split() if word in ITEMS), "")
    return Case(item, next((problem for problem in PROBLEMS if problem in text), ""))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def synthetic_records(kind: Kind, split: Split, seed: int) -> list[AnyRecord]:
    """Returns the embedded task's records of a kind: a function of its arguments alone.

    Training and held-out records have no combination of item and problem in common, whatever the seeds.
    """
    match kind:
        case "prompt_completion":
            return list(demonstrations(seed, NUM_DEMONSTRATIONS[split], split))
        case "preference":
            return list(preferences(seed, NUM_PREFERENCES[split], split))
        case "preference_with_margin":
            pairs = preferences(seed, NUM_PREFERENCES[split], split)
            return [pair._replace(margin=_grade(pair)) for pair in pairs]
        case "unpaired":
            return unpaired(seed, NUM_PREFERENCES[split], split)
        case "ranking" | "ranking_with_margin" | "ranking_with_best" | "ranking_with_ties":
            return list(informative(rankings(seed, NUM_RANKINGS[split], split), kind, Counter()))
        case "rating":
            return [
                Rated(of.prompt, of.completions[0], of.scores[0])
                for of in rankings(seed, NUM_RANKINGS[split], split)
            ]
        case "prompt_only":
            return list(prompts(seed, split))
        case _:
            raise ValueError(f"the embedded task (synthetic) has no {kind} records")


def demonstrations(seed: int, count: int, split: Split) -> list[PromptCompletion]:
    """Returns prompts with a reply of mixed quality."""
    rng, cases = _rng(seed, "demonstrations", split), _cases(split)
    records = []
    for _ in range(count):
        case = rng.choice(cases)
        records.append(PromptCompletion(_request(rng, case), _reply(rng, case)))
    return records


def preferences(seed: int, count: int, split: Split) -> list[Preference]:
    """Returns prompts with two replies; the gold reward tells the preferred one, with Bradley-Terry noise."""
    rng, cases = _rng(seed, "preferences", split), _cases(split)
    records = []
    for _ in range(count):
        case = rng.choice(cases)
        prompt, first, second = _request(rng, case), _reply(rng, case), _reply(rng, case)
        margin = _judge(prompt, first) - _judge(prompt, second)
        first_wins = rng.random() < 1 / (1 + math.exp(-margin / LABEL_TEMPERATURE))
        records.append(Preference(prompt, first, second) if first_wins else Preference(prompt, second, first))
    return records


def unpaired(seed: int, count: int, split: Split) -> list[AnyRecord]:
    """Returns one completion of each pair, the chosen and the rejected one in turn."""
    both = unpaired_of(preferences(seed, count, split))
    return [both[2 * number + number % 2] for number in range(count)]


def _grade(pair: Preference) -> float:
    """Returns how much the replies of a pair differ by the gold reward: 0, 1/3, 2/3 or 1."""
    prompt, chosen, rejected = str(pair.prompt), str(pair.chosen), str(pair.rejected)
    return round(min(abs(_judge(prompt, chosen) - _judge(prompt, rejected)), 3.0)) / 3


def rankings(seed: int, count: int, split: Split) -> list[Ranking]:
    """Returns prompts with three or four replies and their marks: the gold reward, with noise, in halves."""
    rng, cases = _rng(seed, "rankings", split), _cases(split)
    records = []
    for _ in range(count):
        case = rng.choice(cases)
        prompt = _request(rng, case)
        replies = tuple(_reply(rng, case) for _ in range(rng.choice((3, 4))))
        marks = tuple(
            round(2 * (_judge(prompt, reply) + rng.gauss(0.0, LABEL_TEMPERATURE))) / 2 for reply in replies
        )
        orders = itertools.permutations(range(len(replies)), 2)
        pairs = tuple((i, j) for i, j in orders if marks[i] > marks[j] and replies[i] != replies[j])
        records.append(Ranking(prompt, replies, pairs, marks))
    return records


def prompts(seed: int, split: Split) -> list[PromptOnly]:
    """Returns every prompt of the split once, shuffled."""
    texts = [request.format(**case._asdict()) for case in _cases(split) for request in REQUESTS]
    _rng(seed, "prompts", split).shuffle(texts)
    return [PromptOnly(text) for text in texts]


def _cases(split: Split) -> list[Case]:
    """Returns the split's combinations: one in four is held out, of each item and of each problem alike."""
    return [
        Case(item, problem)
        for i, item in enumerate(ITEMS)
        for j, problem in enumerate(PROBLEMS)
        if ((i + j) % 4 == 0) == (split == "eval")
    ]


def _rng(seed: int, use: str, split: Split) -> random.Random:
    return random.Random(f"{seed} {use} {split}")


def _request(rng: random.Random, case: Case) -> str:
    return rng.choice(REQUESTS).format(**case._asdict())


def _reply(rng: random.Random, case: Case) -> str:
    (tone,) = rng.choices(TONES, [tone.weight for tone in TONES])
    item = rng.choice(ITEMS) if rng.random() < WRONG_ITEM else case.item
    sentences = []
    if rng.random() < tone.apology:
        sentences.append(rng.choice(APOLOGIES))
    else:
        sentences.append(rng.choice(ACKNOWLEDGEMENTS))
    if rng.random() < tone.insult:
        sentences.append(rng.choice(INSULTS))
    remedy_draw = rng.random()
    if remedy_draw < tone.remedy + tone.other_remedy:
        sentences.append(rng.choice(PROMISES))
    elif rng.random() < 0.5:
        sentences.append(EVASION)
    fits = remedy_draw < tone.remedy
    remedy = (
        PROBLEMS[case.problem] if fits else rng.choice([r for r in REMEDIES if r != PROBLEMS[case.problem]])
    )
    while len(sentences) < MOST_SENTENCES - 1 and rng.random() < tone.rambling:
        sentences.append(rng.choice(RAMBLINGS))
    if rng.random() < tone.thanks:
        sentences.append(rng.choice(THANKS))
    return "".join(sentences).format(item=item, problem=case.problem, remedy=remedy)
