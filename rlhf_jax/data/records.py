"""What a stage learns from, as text or as messages: demonstrations, pairs, prompts, rankings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.config_types import Kind
from rlhf_jax.data.columns import Content

PROMPT = "{prompt}"
"""Where the prompt stands in data.prompt_template."""


class PromptCompletion(NamedTuple):
    """A demonstration: the completion is learned, of messages the assistant's; the prompt is given."""

    prompt: Content
    completion: Content
    columns: Mapping[str, object] = {}
    variables: Mapping[str, object] = {}  # of the chat template: tools, and those of chat_template_kwargs


class Preference(NamedTuple):
    """Two completions of one prompt, the first one preferred."""

    prompt: Content
    chosen: Content
    rejected: Content
    prompt_tokens: int = 0  # the prompt is the first so many tokens of `prompt`, then a blank; 0: all of it
    variables: Mapping[str, object] = {}
    margin: float = 0.0  # by how much it is preferred, where that is told and read


class PromptOnly(NamedTuple):
    """A prompt to complete; reward functions are given the other columns."""

    prompt: Content
    columns: Mapping[str, object] = {}
    prompt_tokens: int = 0  # the prompt is the first so many tokens of `prompt`; 0: all of it
    variables: Mapping[str, object] = {}


class Unpaired(NamedTuple):
    """A completion that is desirable or not."""

    prompt: Content
    completion: Content
    is_desirable: bool
    variables: Mapping[str, object] = {}
    mismatched: Content = ""  # the completion of another record, see with_mismatched


class Rated(NamedTuple):
    """A completion and how good it is."""

    prompt: Content
    completion: Content
    rating: float
    variables: Mapping[str, object] = {}


class Ranking(NamedTuple):
    """Several completions of one prompt, and which of them are better than which."""

    prompt: Content
    completions: tuple[Content, ...]
    pairs: tuple[tuple[int, int], ...]  # (better, worse), places in completions
    scores: tuple[
        float, ...
    ] = ()  # one for each completion, higher is better; minus the ranks; () if not told
    variables: Mapping[str, object] = {}


AnyRecord = PromptCompletion | Preference | PromptOnly | Unpaired | Rated | Ranking


def completions(record: AnyRecord) -> tuple[Content, ...]:
    """Returns the record's completions, of a preference the chosen one first, of unpaired ones its own."""
    match record:
        case PromptCompletion() | Rated():
            return (record.completion,)
        case Unpaired():
            return (record.completion, record.mismatched)
        case Preference(chosen=chosen, rejected=rejected):
            return (chosen, rejected)
        case Ranking():
            return record.completions
        case PromptOnly():
            return ()


def unpaired_of(pairs: Sequence[Preference]) -> list[Unpaired]:
    """Returns the completions of pairs one by one: the chosen ones are desirable, the rejected ones not."""
    return [
        Unpaired(pair.prompt, completion, is_desirable, pair.variables)
        for pair in pairs
        for completion, is_desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def with_mismatched(records: Sequence[Unpaired]) -> list[Unpaired]:
    """Returns the records, each with a completion of another prompt, that of the records that follow its own.

    Of a prompt's records, which stand one behind the other, the k-th has the k-th completion of the next
    prompt's, both counted round: all of them are used about equally, the desirable ones and the others. Where
    all have the same prompt it is that of the next record.
    """
    if not records:
        return []
    starts = [i for i, record in enumerate(records) if i == 0 or record.prompt != records[i - 1].prompt]
    runs = [records[a:b] for a, b in zip(starts, [*starts[1:], len(records)], strict=True)]
    if len(runs) == 1:
        return [
            record._replace(mismatched=following.completion)
            for record, following in zip(records, [*records[1:], records[0]], strict=True)
        ]
    found = []
    for number, run in enumerate(runs):
        others = runs[(number + 1) % len(runs)]
        if others[0].prompt == run[0].prompt:  # the last run and the first
            others = runs[(number + 2) % len(runs)]
        found += [
            record._replace(mismatched=others[k % len(others)].completion) for k, record in enumerate(run)
        ]
    return found


def informative(rankings: Iterable[Ranking], kind: Kind, left_out: Counter[str]) -> list[Ranking]:
    """Returns the rankings that tell a loss of this kind something, each of its judgements once.

    Pairs of equal completions tell nothing. Where a pair was judged both ways, both judgements count.

    Args:
        rankings: those of ranking_with_ties have scores only where equal ones are ties.
        kind: one of RANKINGS.
        left_out: counts rankings and judgements that are, by why.
    """
    found, lost = [], Counter[str]()
    for of in rankings:
        unlike = [(i, j) for i, j in of.pairs if of.completions[i] != of.completions[j]]
        pairs = tuple(dict.fromkeys(unlike))
        lost["pairs of equal completions in a ranking"] += len(of.pairs) - len(unlike)
        lost["judgements that a ranking repeats"] += len(unlike) - len(pairs)
        has_ties = kind == "ranking_with_ties" and len(set(of.scores)) < len(of.scores)
        if not pairs and not has_ties:
            lost["rankings in which none is better"] += 1
        elif kind == "ranking_with_best" and {i for i, _ in pairs} <= {j for _, j in pairs}:
            lost["rankings in which none is best: judged in a circle"] += 1
        else:
            found.append(of._replace(pairs=pairs))
    left_out += lost  # without what is 0
    return found


def judgements(records: Sequence[AnyRecord], num_completions: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how good the completions of records are, and which are better than which.

    Args:
        records: preferences, rankings or rated completions.
        num_completions: K, of the record that has most.
    Returns:
        ratings f32[N, K], of a preference its margin and 0, NaN of rankings that have no scores, so that none
        equals another; better bool[N, K, K], (i, j) where i is better.
    """
    ratings = np.zeros((len(records), num_completions), np.float32)
    better = np.zeros((len(records), num_completions, num_completions), bool)
    for number, record in enumerate(records):
        match record:
            case Preference(margin=margin):
                ratings[number, 0], better[number, 0, 1] = margin, True
            case Ranking(scores=scores, pairs=pairs):
                ratings[number, : len(completions(record))] = scores or np.nan
                for i, j in pairs:
                    better[number, i, j] = True
            case Rated(rating=rating):
                ratings[number, 0] = rating
            case _:
                raise AssertionError(f"nothing is known of a {type(record).__name__}")
    return ratings, better


def is_conversational(record: AnyRecord) -> bool:
    """Returns whether the record holds messages, which a chat template turns into text."""
    return not isinstance(record.prompt, str)


def texts(content: Content) -> Iterator[str]:
    """Yields the text of a content, or of each of its messages."""
    if isinstance(content, str):
        yield content
    else:
        yield from (text for message in content if isinstance(text := message.get("content"), str))


def in_template[R: AnyRecord](record: R, template: str) -> R:
    """Returns the record with its prompt in data.prompt_template; an empty template changes nothing.

    Raises:
        ValueError: the record is a conversation.
    """
    if not template:
        return record
    if not isinstance(record.prompt, str):
        raise ValueError(
            "data.prompt_template: stands around plain text, but the records are conversations, which have "
            "the tokenizer's chat template; leave it out, or set tokenizer.chat_template"
        )
    return record._replace(prompt=template.replace(PROMPT, record.prompt))


def reward_columns(records: Sequence[PromptOnly]) -> dict[str, list[object]]:
    """Returns the records' other columns as lists, an entry per record; None where a record has none."""
    names = dict.fromkeys(name for record in records for name in record.columns)
    return {name: [record.columns.get(name) for record in records] for name in names}
