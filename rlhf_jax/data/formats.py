"""Records of any format become what a stage learns from: text, or conversations as lists of messages.

| format            | columns                                     | can serve                                |
|-------------------|---------------------------------------------|------------------------------------------|
| text              | text                                        | prompt_completion, prompt_only           |
| messages          | messages                                    | prompt_completion, prompt_only           |
| prompt_completion | prompt, completion                          | prompt_completion, prompt_only           |
| preference        | [prompt,] chosen, rejected[, margin]        | preference, unpaired, prompt_only        |
| ranking           | prompt, completions; ranks, scores or pairs | ranking, rating, preference, prompt_only |
| rating            | prompt, completion, rating (a number)       | rating, prompt_only                      |
| unpaired          | prompt, completion, label (true or false)   | unpaired, prompt_completion, prompt_only |
| prompt_only       | prompt                                      | prompt_only                              |
| labelled          | text, label (0 or 1)                        | preference                               |

Prompts and completions are text, or lists of messages, all of a record alike. A message is {role, content}
and whatever else the chat template reads; it is given the columns `tools` and `chat_template_kwargs` too.

The prompt of a preference without a prompt column is what both begin with. Text as prompt_completion has an
empty prompt; text as prompt_only has its first data.prompt_tokens tokens as prompt, cut where tokens are
made. Messages as prompt_completion are all completion: each assistant turn is learned; as prompt_only they
are a prompt up to the last assistant turn. Of unpaired records the desirable ones serve prompt_completion. A
ranking serves preference as its pairs: those judged (`pairs`), or all that ranks or scores tell apart. Pairs
serve unpaired as their completions, the chosen ones desirable. The margin of a pair, where it is read, is its
column, or the difference of the two scores (minus the ranks); it is not negative. A judgement that a ranking
has twice is two records as pairs, and one judgement where the ranking is read as a whole; of two that
contradict each other both count.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from rlhf_jax.config import DataConfig
from rlhf_jax.config_types import RANKINGS, Kind
from rlhf_jax.data.columns import ORDERS, Cells, Content, Message, Reader, resolve_format
from rlhf_jax.data.prose import detokenize
from rlhf_jax.data.records import (
    AnyRecord,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Rated,
    Unpaired,
    informative,
    texts,
    unpaired_of,
)
from rlhf_jax.progress import watched

ASSISTANT_TURN = "\n\nAssistant:"


class ReadRecords(NamedTuple):
    """What a source's records become."""

    records: list[AnyRecord]
    left_out: Counter[str]
    """How many of its records, texts or pairs are not among them, by why."""


def read_records(
    source: Sequence[Mapping[str, object]],
    kind: Kind,
    cfg: DataConfig,
    where: str,
    *,
    prompts: Sequence[Mapping[str, object]] = (),
    seed: int = 0,
) -> ReadRecords:
    """Returns the source's records as what a stage learns from, and how many are left out.

    Pairs of equal completions are: they tell nothing, and in accuracies they would count as half right.

    Args:
        source: records as read, at least one.
        kind: what the stage needs.
        cfg: reads format, columns, detokenize, prompt_tokens.
        where: key and name of the source, for messages.
        prompts: records of cfg.prompts, which stand before the pairs of a labelled source.
        seed: decides which texts of a labelled source meet in a pair.

    Raises:
        ValueError: a missing column, a cell of another type, messages without role or content, a format
            that cannot serve the kind, or no record left.
    """
    left_out = Counter[str]()
    reader = Reader(source[0], cfg.columns, where)
    return ReadRecords(_read(reader, source, kind, cfg, prompts, seed, left_out), left_out)


def _read(
    reader: Reader,
    source: Sequence[Mapping[str, object]],
    kind: Kind,
    cfg: DataConfig,
    prompts: Sequence[Mapping[str, object]],
    seed: int,
    left_out: Counter[str],
) -> list[AnyRecord]:
    """Returns the records and counts those that are left out; see read_records."""
    where = reader.where
    format = resolve_format(reader, kind, cfg)
    if kind == "unpaired" and format != "unpaired":
        pairs = _read(reader, source, "preference", cfg, prompts, seed, left_out)
        return list(unpaired_of(cast("list[Preference]", pairs)))
    match format:
        case "text" if kind == "prompt_only":
            if cfg.prompt_tokens == 0:
                raise ValueError(
                    f"{where}: holds plain text and data.prompt_tokens is 0: a stage that samples needs "
                    "prompts; set data.prompt_tokens to the number of a text's tokens that are its prompt"
                )
            rows = reader.read(source, ("text",), allow_messages=False)
            return [PromptOnly(text, columns, cfg.prompt_tokens) for (text,), columns, _ in rows]
        case "text":
            rows = reader.read(source, ("text",), allow_messages=False)
            return [PromptCompletion("", text, columns) for (text,), columns, _ in rows]
        case "messages":
            return _read_conversations(reader, source, kind)
        case "prompt_completion" if kind == "prompt_completion":
            rows = reader.read(source, ("prompt", "completion"))
            return [PromptCompletion(prompt, answer, *rest) for (prompt, answer), *rest in rows]
        case "unpaired" if kind != "prompt_only":
            return _read_unpaired(reader, source, kind, left_out)
        case "ranking" if kind != "prompt_only":
            rankings = [
                _ranking(reader, record, number)
                for number, record in enumerate(watched(source, f"reading {where}"), start=1)
            ]
            with_margin = kind in ("preference_with_margin", "ranking_with_margin")
            if (with_margin or kind == "rating") and not rankings[0].scores:
                reader.missing(
                    "scores", "the stage reads how good each completion is: a column scores or ranks"
                )
            if with_margin:
                _check_margins(rankings, reader)
            if kind in RANKINGS:
                return _rankings(rankings, kind, reader, left_out)
            if kind == "rating":
                return [
                    Rated(of.prompt, completion, score, of.variables)
                    for of in rankings
                    for completion, score in zip(of.completions, of.scores, strict=True)
                ]
            return _pairs_of(rankings, where, left_out, with_margin=with_margin)
        case "preference" if kind in ("preference", "preference_with_margin"):
            margins = None
            if kind == "preference_with_margin":
                margins = _numbers(reader, source, "margin", least=0)
            pairs = [
                Preference(prompt, a, b, variables=variables, margin=margins[place] if margins else 0.0)
                for place, ((prompt, a, b), _, variables) in enumerate(_read_pairs(reader, source))
            ]
            return _unlike(pairs, where, left_out)
        case "rating" if kind == "rating":
            ratings = _numbers(reader, source, "rating")
            cells = reader.read(source, ("prompt", "completion"))
            return [
                Rated(prompt, completion, rating, variables)
                for ((prompt, completion), _, variables), rating in zip(cells, ratings, strict=True)
            ]
        case "preference" if not _has_own_prompt(reader, source):
            return [
                PromptOnly(prompt, {**columns, "chosen": a, "rejected": b}, variables=variables)
                for (prompt, a, b), columns, variables in _read_pairs(reader, source)
            ]
        case "labelled":
            return _pair_labelled(reader, source, cfg, prompts, seed, left_out)
        case _:
            rows = reader.read(source, ("prompt",))
            return [PromptOnly(prompt, columns, 0, variables) for (prompt,), columns, variables in rows]


def implicit_prompt(chosen: str, rejected: str) -> str:
    """Returns what two whole texts share: a dialogue up to its last shared reply, or else whole words."""
    common = chosen[: _num_shared(chosen, rejected)]
    turn = common.rfind(ASSISTANT_TURN)
    if turn >= 0:
        return common[: turn + len(ASSISTANT_TURN)]
    end = len(common)
    while end > 0 and not (
        end < min(len(chosen), len(rejected)) and chosen[end].isspace() and rejected[end].isspace()
    ):
        end -= 1
    return common[:end]


def implicit_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Returns the messages that two conversations share, up to where the assistant answers in both."""
    end = min(_num_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while end > 0 and not (chosen[end]["role"] == rejected[end]["role"] == "assistant"):
        end -= 1
    return list(chosen[:end])


def _num_shared(a: Sequence[object], b: Sequence[object]) -> int:
    shared = itertools.takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False))
    return sum(1 for _ in shared)


def _read_conversations(
    reader: Reader, source: Sequence[Mapping[str, object]], kind: Kind
) -> list[AnyRecord]:
    """Returns whole conversations: all turns of the assistant are learned, or the last one is sampled."""
    found: list[AnyRecord] = []
    for number, ((messages,), columns, variables) in enumerate(reader.read(source, ("messages",)), start=1):
        if isinstance(messages, str):
            reader.wrong(number, f"column {reader.name('messages')!r} is text; map it to 'text'")
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if kind != "prompt_only":
            if not answers:
                reader.wrong(number, "no message is the assistant's: there is nothing to learn")
            found.append(PromptCompletion([], messages, columns, variables))
            continue
        end = answers[-1] if answers else len(messages)
        if end == 0:
            reader.wrong(
                number, "the conversation begins with its only assistant message: there is no prompt"
            )
        left = {"completion": messages[end:]} if answers else {}
        found.append(PromptOnly(messages[:end], {**columns, **left}, variables=variables))
    return found


def _read_unpaired(
    reader: Reader, source: Sequence[Mapping[str, object]], kind: Kind, left_out: Counter[str]
) -> list[AnyRecord]:
    """Returns completions with their labels, or the desirable ones as demonstrations."""
    found: list[AnyRecord] = []
    cells = reader.read(source, ("prompt", "completion"))
    label = reader.name("label")
    for number, ((prompt, completion), columns, variables) in enumerate(cells, start=1):
        is_desirable = columns.pop(label, None)
        if not isinstance(is_desirable, bool):
            reader.wrong(
                number,
                f"column {label!r} is {is_desirable!r}, must be true or false: whether the completion is "
                "desirable; if it means something else, set data.format: prompt_completion",
            )
        if kind == "unpaired":
            found.append(Unpaired(prompt, completion, is_desirable, variables))
        elif is_desirable:
            found.append(PromptCompletion(prompt, completion, columns, variables))
        else:
            left_out["not desirable"] += 1
    if not found:
        raise ValueError(
            f"{reader.where}: no completion is desirable (column {label!r} is false in all records)"
        )
    return found


def _ranking(reader: Reader, record: Mapping[str, object], number: int) -> Ranking:
    """Returns a record with several completions."""
    (prompt,) = reader.contents(record, ("prompt",), number)
    name = reader.name("completions")
    cell = reader.cell(record, "completions", number)
    if not isinstance(cell, list) or len(cell) < 2:
        reader.wrong(number, f"column {name!r} must be a list of at least 2 completions, is {_shown(cell)}")
    answers = tuple(reader.content(item, name, number) for item in cell)
    for answer in answers:
        reader.check_alike({reader.name("prompt"): prompt, name: answer}, number)
        if not isinstance(answer, str):
            reader.check_turns((answer,), ("completions",), number)
    orders = [usual for usual in ORDERS if reader.has(usual)]
    if not orders:
        reader.missing("ranks", "completions are ranked by a column ranks, scores or pairs")
    scores: tuple[float, ...] = ()
    if numbers := [usual for usual in orders if usual != "pairs"]:
        scores = _scores(reader, record, numbers[0], len(answers), number)
    if "pairs" in orders:
        pairs = _judged(reader, record, len(answers), number)
    else:
        pairs = tuple(
            (i, j) for i, j in itertools.permutations(range(len(answers)), 2) if scores[i] > scores[j]
        )
    variables = {} if isinstance(prompt, str) else reader.variables(record, number)
    return Ranking(prompt, answers, pairs, scores, variables)


def _scores(
    reader: Reader, record: Mapping[str, object], usual: str, count: int, number: int
) -> tuple[float, ...]:
    """Returns the scores of completions, higher ones better; ranks, of which 1 is best, are negated."""
    cell, name = reader.cell(record, usual, number), reader.name(usual)
    if not isinstance(cell, list) or len(cell) != count:
        what = f"{len(cell)} entries" if isinstance(cell, list) else _shown(cell)
        reader.wrong(number, f"column {name!r} has {what} for {count} completions; give each one")
    for value in cell:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            reader.wrong(number, f"column {name!r} has the entry {value!r}, must be a finite number")
        if usual == "ranks" and value < 1:
            reader.wrong(number, f"column {name!r} has the rank {value!r}; ranks count from 1, the best")
    sign = -1.0 if usual == "ranks" else 1.0
    return tuple(sign * value for value in cell)


def _numbers(
    reader: Reader, source: Sequence[Mapping[str, object]], usual: str, least: float = -math.inf
) -> list[float]:
    """Returns a column of finite numbers, none of them below `least`."""
    name, found = reader.name(usual), []
    if not reader.has(usual):
        reader.missing(name, "the stage reads it")
    for number, record in enumerate(source, start=1):
        value = reader.cell(record, usual, number)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            reader.wrong(number, f"column {name!r} is {value!r}, must be a finite number")
        if value < least:
            reader.wrong(number, f"column {name!r} is {value!r}, must be >= {least}")
        found.append(float(value))
    return found


def _check_margins(rankings: Sequence[Ranking], reader: Reader) -> None:
    """Raises ValueError where a pair was judged against the scores, so that its margin would be negative."""
    pairs = reader.name("pairs")
    name = reader.name(next(usual for usual in ORDERS if usual != "pairs" and reader.has(usual)))
    for number, of in enumerate(rankings, start=1):
        for better, worse in of.pairs:
            if of.scores[better] < of.scores[worse]:
                of_both = (abs(of.scores[place]) for place in (better, worse))
                reader.wrong(
                    number,
                    f"column {pairs!r} has [{better}, {worse}], but by column {name!r} the first of these is "
                    f"the worse one, {' against '.join(f'{score:g}' for score in of_both)}: the margin of a "
                    "pair is the difference and must be >= 0; mend the record, or leave out "
                    "reward_model.margin_from_data",
                )


def _rankings(
    rankings: Sequence[Ranking], kind: Kind, reader: Reader, left_out: Counter[str]
) -> list[AnyRecord]:
    """Returns the rankings that tell something; ValueError where none does."""
    if kind == "ranking_with_ties" and reader.has("pairs"):  # what these do not compare is no tie
        rankings = [of._replace(scores=()) for of in rankings]
    found = informative(rankings, kind, left_out)
    if not found:
        what = "best" if kind == "ranking_with_best" else "better than another"
        raise ValueError(
            f"{reader.where}: no completion is {what} in any of {len(rankings)} rankings "
            f"({', '.join(f'{count} {why}' for why, count in left_out.items())})"
        )
    return list(found)


def _judged(
    reader: Reader, record: Mapping[str, object], count: int, number: int
) -> tuple[tuple[int, int], ...]:
    """Returns the pairs of a ranking that were judged, (better, worse)."""
    cell, name = reader.cell(record, "pairs", number), reader.name("pairs")
    pairs: list[tuple[int, int]] = []
    for pair in cell if isinstance(cell, list) else [cell]:
        match pair:
            case [int(better), int(worse)] if better != worse and {better, worse} <= set(range(count)):
                pairs.append((better, worse))
            case _:
                reader.wrong(
                    number,
                    f"column {name!r} has the entry {pair!r}, must be [better, worse]: two different places "
                    f"from 0 to {count - 1} among the completions",
                )
    return tuple(pairs)


def _shown(cell: object) -> str:
    return f"a list of {len(cell)}" if isinstance(cell, list) else f"{cell!r} ({type(cell).__name__})"


def _pairs_of(
    rankings: Sequence[Ranking], where: str, left_out: Counter[str], *, with_margin: bool
) -> list[AnyRecord]:
    """Returns the pairs of rankings in their order, and by how much one is better where that is wanted."""
    found = [
        Preference(
            of.prompt,
            of.completions[better],
            of.completions[worse],
            variables=of.variables,
            margin=of.scores[better] - of.scores[worse] if with_margin else 0.0,
        )
        for of in rankings
        for better, worse in of.pairs
    ]
    if not found:
        raise ValueError(f"{where}: no completion is better than another in any of {len(rankings)} rankings")
    if num_ties := sum(not of.pairs for of in rankings):
        left_out["rankings in which none is better"] = num_ties
    return _unlike(found, where, left_out)


def _unlike(pairs: Sequence[Preference], where: str, left_out: Counter[str]) -> list[AnyRecord]:
    """Returns the pairs whose completions are not equal."""
    found: list[AnyRecord] = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not found:
        raise ValueError(f"{where}: chosen and rejected are equal in all of {len(pairs)} pairs")
    if num_equal := len(pairs) - len(found):
        left_out["chosen equals rejected"] = num_equal
    return found


def _read_pairs(reader: Reader, source: Sequence[Mapping[str, object]]) -> list[Cells]:
    """Returns (prompt, chosen, rejected) of each record, and the columns that are left."""
    if _has_own_prompt(reader, source):
        return reader.read(source, ("prompt", "chosen", "rejected"))
    pairs, name = [], reader.name("prompt")
    for number, cells in enumerate(reader.read(source, ("chosen", "rejected")), start=1):
        chosen, rejected = cells.contents
        told = cells.columns.pop(name, None)
        if told is not None and (isinstance(chosen, str) or not isinstance(told, str)):
            reader.wrong(
                number,
                f"column {name!r} holds its prompt, but in record 1 the prompt is what chosen and rejected "
                "begin with; let all be alike",
            )
        if isinstance(chosen, str) and isinstance(rejected, str):
            prompt: Content = implicit_prompt(chosen, rejected)
        else:
            prompt = implicit_messages(cast("list[Message]", chosen), cast("list[Message]", rejected))
            if not prompt:
                reader.wrong(number, "chosen and rejected share no message before the assistant's: no prompt")
            if told is not None and told not in list(texts(prompt)):
                reader.wrong(
                    number, f"column {name!r} is text that is not in the messages before the answers"
                )
        pairs.append(cells._replace(contents=(prompt, chosen[len(prompt) :], rejected[len(prompt) :])))
    return pairs


def _has_own_prompt(reader: Reader, source: Sequence[Mapping[str, object]]) -> bool:
    """Returns whether the prompt stands apart; as text beside whole conversations it only repeats theirs."""
    if not reader.has("prompt"):
        return False
    prompt, chosen = (reader.cell(source[0], usual, 1) for usual in ("prompt", "chosen"))
    return not (isinstance(prompt, str) and isinstance(chosen, list))


def _pair_labelled(
    reader: Reader,
    source: Sequence[Mapping[str, object]],
    cfg: DataConfig,
    prompts: Sequence[Mapping[str, object]],
    seed: int,
    left_out: Counter[str],
) -> list[AnyRecord]:
    """Returns pairs of a text with label 1 against one with label 0; each text is used at most once.

    Pair i follows the beginning of prompt text i (counted round); it is cut, and a blank put between, where
    tokens are made.
    """
    texts: dict[int, list[str]] = {0: [], 1: []}
    for number, record in enumerate(watched(source, f"reading {reader.where}"), start=1):
        (text,) = cast("tuple[str]", reader.contents(record, ("text",), number, allow_messages=False))
        label = reader.cell(record, "label", number)
        if not isinstance(label, int) or label not in (0, 1):
            raise ValueError(f"{reader.where}: record {number}: label is {label!r}, must be 0 or 1")
        texts[int(label)].append(detokenize(text) if cfg.detokenize else text)
    if not texts[0] or not texts[1]:
        raise ValueError(
            f"{reader.where}: {len(texts[1])} texts have label 1 and {len(texts[0])} label 0; pairs need both"
        )
    random.Random(f"{seed} label 0").shuffle(texts[0])
    random.Random(f"{seed} label 1").shuffle(texts[1])
    pairs = zip(texts[1], texts[0], strict=False)
    if surplus := abs(len(texts[1]) - len(texts[0])):
        left_out["texts for which none of the other label is left"] = surplus
    if not prompts:
        return [Preference("", chosen, rejected) for chosen, rejected in pairs]
    if cfg.prompt_tokens == 0:
        raise ValueError(
            "data.prompts: is set, but data.prompt_tokens is 0; set it to the tokens that a prompt has"
        )
    prompt_reader = Reader(prompts[0], {}, f"data.prompts: {cfg.prompts}")
    if not prompt_reader.has("text"):
        prompt_reader.missing("text", "prompts are the beginnings of texts")
    openings = [cells.contents[0] for cells in prompt_reader.read(prompts, ("text",), allow_messages=False)]
    return [
        Preference(openings[i % len(openings)], chosen, rejected, cfg.prompt_tokens)
        for i, (chosen, rejected) in enumerate(pairs)
    ]
