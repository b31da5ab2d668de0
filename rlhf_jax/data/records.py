"""Records of any format become one of three kinds: what a stage learns from, as plain text.

| format            | columns                          | can serve                      |
|-------------------|----------------------------------|--------------------------------|
| text              | text                             | prompt_completion, prompt_only |
| prompt_completion | prompt, completion               | prompt_completion, prompt_only |
| preference        | [prompt,] chosen, rejected       | preference, prompt_only        |
| prompt_only       | prompt                           | prompt_only                    |
| labelled          | text, label (0 or 1)             | preference                     |

The prompt of a preference without a prompt column is what both texts begin with. Text as prompt_completion
has an empty prompt; text as prompt_only has its first data.prompt_tokens tokens as prompt, cut where tokens
are made.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, NoReturn

from rlhf_jax.config import DataConfig
from rlhf_jax.options import did_you_mean

Kind = Literal["prompt_completion", "preference", "prompt_only"]
Format = Literal["text", "prompt_completion", "preference", "prompt_only", "labelled"]

COLUMNS: dict[Format, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "labelled": ("text", "label"),
    "text": ("text",),
    "prompt_only": ("prompt",),
}
"""The columns that a format must have, in the order in which formats are tried."""

SERVES: dict[Kind, tuple[Format, ...]] = {
    "prompt_completion": ("text", "prompt_completion"),
    "preference": ("preference", "labelled"),
    "prompt_only": ("prompt_only", "prompt_completion", "preference", "text"),
}
PROMPT = "{prompt}"
"""Where the prompt stands in data.prompt_template."""
USUAL_COLUMNS = ("prompt", "completion", "chosen", "rejected", "text", "label")
ASSISTANT_TURN = "\n\nAssistant:"


class PromptCompletion(NamedTuple):
    """A demonstration: the completion is learned, the prompt is given."""

    prompt: str
    completion: str
    columns: Mapping[str, object] = {}


class Preference(NamedTuple):
    """Two completions of one prompt, the first one preferred."""

    prompt: str
    chosen: str
    rejected: str
    prompt_tokens: int = 0  # the prompt is the first so many tokens of `prompt`, then a blank; 0: all of it


class PromptOnly(NamedTuple):
    """A prompt to complete; reward functions are given the other columns."""

    prompt: str
    columns: Mapping[str, object] = {}
    prompt_tokens: int = 0  # the prompt is the first so many tokens of `prompt`; 0: all of it


AnyRecord = PromptCompletion | Preference | PromptOnly


def completions(record: AnyRecord) -> tuple[str, ...]:
    """Returns the record's completions, of a preference the chosen one first."""
    match record:
        case PromptCompletion(completion=completion):
            return (completion,)
        case Preference(chosen=chosen, rejected=rejected):
            return (chosen, rejected)
        case PromptOnly():
            return ()


def read_records(
    source: Sequence[Mapping[str, object]],
    kind: Kind,
    cfg: DataConfig,
    where: str,
    *,
    prompts: Sequence[Mapping[str, object]] = (),
    seed: int = 0,
) -> list[AnyRecord]:
    """Returns the source's records as what a stage learns from.

    Args:
        source: records as read, at least one.
        kind: what the stage needs.
        cfg: reads format, columns, detokenize, prompt_tokens.
        where: key and name of the source, for messages.
        prompts: records of cfg.prompts, which stand before the pairs of a labelled source.
        seed: decides which texts of a labelled source meet in a pair.

    Raises:
        ValueError: a missing column, a cell of another type, or a format that cannot serve the kind.
    """
    reader = _Reader(source[0], cfg.columns, where)
    match _resolve_format(reader, kind, cfg):
        case "text" if kind == "prompt_only":
            if cfg.prompt_tokens == 0:
                raise ValueError(
                    f"{where}: holds plain text and data.prompt_tokens is 0: a stage that samples needs "
                    "prompts; set data.prompt_tokens to the number of a text's tokens that are its prompt"
                )
            rows = reader.read(source, ("text",))
            return [PromptOnly(text, columns, cfg.prompt_tokens) for (text,), columns in rows]
        case "text":
            return [
                PromptCompletion("", text, columns) for (text,), columns in reader.read(source, ("text",))
            ]
        case "prompt_completion" if kind == "prompt_completion":
            rows = reader.read(source, ("prompt", "completion"))
            return [PromptCompletion(prompt, completion, columns) for (prompt, completion), columns in rows]
        case "preference" if kind == "preference":
            return [Preference(*texts) for texts, _ in _read_pairs(reader, source)]
        case "preference" if not reader.has("prompt"):
            pairs = _read_pairs(reader, source)
            return [
                PromptOnly(prompt, {**columns, "chosen": a, "rejected": b})
                for (prompt, a, b), columns in pairs
            ]
        case "labelled":
            return _pair_labelled(reader, source, cfg, prompts, seed)
        case _:
            return [PromptOnly(prompt, columns) for (prompt,), columns in reader.read(source, ("prompt",))]


def in_template[R: AnyRecord](record: R, template: str) -> R:
    """Returns the record with its prompt in data.prompt_template; an empty template changes nothing."""
    return record._replace(prompt=template.replace(PROMPT, record.prompt)) if template else record


def reward_columns(records: Sequence[PromptOnly]) -> dict[str, list[object]]:
    """Returns the records' other columns as lists, an entry per record; None where a record has none."""
    names = dict.fromkeys(name for record in records for name in record.columns)
    return {name: [record.columns.get(name) for record in records] for name in names}


def implicit_prompt(chosen: str, rejected: str) -> str:
    """Returns what two whole texts share: a dialogue up to its last shared reply, or else whole words."""
    shared = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    common = chosen[: sum(1 for _ in shared)]
    turn = common.rfind(ASSISTANT_TURN)
    if turn >= 0:
        return common[: turn + len(ASSISTANT_TURN)]
    end = len(common)
    while end > 0 and not (
        end < min(len(chosen), len(rejected)) and chosen[end].isspace() and rejected[end].isspace()
    ):
        end -= 1
    return common[:end]


def detokenize(text: str) -> str:
    """Returns the text of an old, lower-cased corpus as prose.

    `it 's good , is n't it ?` becomes `It's good, isn't it?`: undoes the Penn Treebank's spacing
    (contractions, punctuation, brackets, quotation marks), and capitalises `i` and the beginning of
    sentences; names stay as they are.
    """
    prose = ""
    glue_next, sentence_starts, quote_open = True, True, False
    for token in text.split():
        opens = token in OPENING or (token == '"' and not quote_open)
        closes = token in CLOSING or (token == '"' and quote_open)
        if token == '"':
            quote_open = not quote_open
        word = REWRITTEN.get(token, token)
        if sentence_starts and word[0].isalpha():
            word, sentence_starts = word[0].upper() + word[1:], False
        elif word[0].isdigit():
            sentence_starts = False
        prose += word if glue_next or closes else " " + word
        glue_next = opens
        sentence_starts = sentence_starts or token in SENTENCE_ENDS
    return prose


REWRITTEN = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "``": '"', "''": '"', "`": "'", "i": "I"}
OPENING = {"-lrb-", "-lsb-", "(", "[", "``", "`", "$"}
CLOSING = {"-rrb-", "-rsb-", ")", "]", "''", "'", ",", ".", ";", ":", "!", "?", "...", "%"}
CLOSING |= {"n't", "'s", "'re", "'ve", "'ll", "'d", "'m"}  # contractions
SENTENCE_ENDS = {".", "!", "?"}


class _Reader:
    """Reads cells by the usual names of columns; knows how the source calls them."""

    def __init__(self, first: Mapping[str, object], names: Mapping[str, str], where: str):
        self.where = where
        self.present = tuple(first)
        for usual in names:
            if usual not in USUAL_COLUMNS:
                known = ", ".join(USUAL_COLUMNS) + did_you_mean(usual, USUAL_COLUMNS)
                raise ValueError(f"data.columns: no usual column {usual!r}; known: {known}")
        self._names = names
        for usual, name in names.items():
            if name not in first:
                self.missing(name, f"data.columns maps {usual!r} to it")

    def name(self, usual: str) -> str:
        return self._names.get(usual, usual)

    def has(self, usual: str) -> bool:
        return self.name(usual) in self.present

    def missing(self, name: str, why: str) -> NoReturn:
        there = ", ".join(self.present)
        raise ValueError(
            f"{self.where}: no column {name!r} ({why}); columns present: {there}; map other names with "
            f"data.columns, such as {{prompt: question}}{did_you_mean(name, self.present)}"
        )

    def read(
        self, source: Iterable[Mapping[str, object]], wanted: Sequence[str]
    ) -> list[tuple[tuple[str, ...], dict[str, object]]]:
        """Returns for each record the wanted texts, and the columns that are left, the same ones of all.

        A column that only some records have is None in the others.
        """
        names = [self.name(usual) for usual in wanted]
        rows = [
            (tuple(self.text(record, name, number) for name in names), record)
            for number, record in enumerate(source, start=1)
        ]
        left = [name for name in dict.fromkeys(name for _, row in rows for name in row) if name not in names]
        return [(texts, {name: record.get(name) for name in left}) for texts, record in rows]

    def text(self, record: Mapping[str, object], name: str, number: int) -> str:
        cell = self.cell(record, name, number)
        if isinstance(cell, str):
            return cell
        if isinstance(cell, (list, dict)):
            raise ValueError(
                f"{self.where}: record {number}: column {name!r} holds chat messages or other nested data; "
                "only plain text is read: render it to text beforehand"
            )
        raise ValueError(
            f"{self.where}: record {number}: column {name!r} is {cell!r} ({type(cell).__name__}), "
            "must be text"
        )

    def cell(self, record: Mapping[str, object], name: str, number: int) -> object:
        if name not in record:
            raise ValueError(
                f"{self.where}: record {number} has no column {name!r}; it has {', '.join(record) or 'none'}"
            )
        return record[name]


def record_format(source: Sequence[Mapping[str, object]], kind: Kind, cfg: DataConfig, where: str) -> Format:
    """Returns what the columns of a source mean; arguments and errors are those of read_records."""
    return _resolve_format(_Reader(source[0], cfg.columns, where), kind, cfg)


def is_read(usual: str, format: Format) -> bool:
    """Returns whether records of a format may have a column of this usual name."""
    return usual in COLUMNS[format] or (format == "preference" and usual == "prompt")


def _resolve_format(reader: _Reader, kind: Kind, cfg: DataConfig) -> Format:
    """Returns the format, told from the columns where it is `auto`; raises where it cannot serve the kind."""
    allowed = SERVES[kind]
    needs = " or ".join(" + ".join(COLUMNS[format]) for format in allowed)
    if cfg.format != "auto":
        if cfg.format not in allowed:
            raise ValueError(
                f"data.format: {cfg.format} cannot serve a stage that reads {kind}; "
                f"allowed here: {', '.join(allowed)}"
            )
        for usual in COLUMNS[cfg.format]:
            if not reader.has(usual):
                reader.missing(reader.name(usual), f"data.format {cfg.format} needs it")
        return cfg.format
    if "messages" in reader.present and not reader.has("text"):
        raise ValueError(
            f"{reader.where}: holds chat messages (column 'messages'); only plain text is read: "
            "render it to text beforehand"
        )
    found = [format for format, usual in COLUMNS.items() if all(map(reader.has, usual))]
    for format in found:
        if format in allowed:
            return format
    if found:
        raise ValueError(
            f"{reader.where}: holds {found[0]} records (columns {', '.join(reader.present)}), but this stage "
            f"reads {kind}: it needs columns {needs}"
        )
    return reader.missing(_nearest_column(reader, allowed), f"this stage reads {kind}: columns {needs}")


def _nearest_column(reader: _Reader, allowed: Sequence[Format]) -> str:
    """Returns the missing column to name: one of the format that most columns speak for."""
    share = {format: sum(map(reader.has, COLUMNS[format])) / len(COLUMNS[format]) for format in allowed}
    best = max(allowed, key=lambda format: share[format])
    return next(usual for usual in COLUMNS[best] if not reader.has(usual))


def _read_pairs(
    reader: _Reader, source: Sequence[Mapping[str, object]]
) -> list[tuple[tuple[str, str, str], dict[str, object]]]:
    """Returns (prompt, chosen, rejected) of each record, and the columns that are left."""
    if reader.has("prompt"):
        rows = reader.read(source, ("prompt", "chosen", "rejected"))
        return [((prompt, chosen, rejected), columns) for (prompt, chosen, rejected), columns in rows]
    pairs = []
    for (chosen, rejected), columns in reader.read(source, ("chosen", "rejected")):
        prompt = implicit_prompt(chosen, rejected)
        pairs.append(((prompt, chosen[len(prompt) :], rejected[len(prompt) :]), columns))
    return pairs


def _pair_labelled(
    reader: _Reader,
    source: Sequence[Mapping[str, object]],
    cfg: DataConfig,
    prompts: Sequence[Mapping[str, object]],
    seed: int,
) -> list[AnyRecord]:
    """Returns pairs of a text with label 1 against one with label 0; each text is used at most once.

    Pair i follows the beginning of prompt text i (counted round); it is cut, and a blank put between, where
    tokens are made.
    """
    texts: dict[int, list[str]] = {0: [], 1: []}
    for number, record in enumerate(source, start=1):
        text = reader.text(record, reader.name("text"), number)
        label = reader.cell(record, reader.name("label"), number)
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
    if not prompts:
        return [Preference("", chosen, rejected) for chosen, rejected in pairs]
    if cfg.prompt_tokens == 0:
        raise ValueError(
            "data.prompts: is set, but data.prompt_tokens is 0; set it to the tokens that a prompt has"
        )
    prompt_reader = _Reader(prompts[0], {}, f"data.prompts: {cfg.prompts}")
    if not prompt_reader.has("text"):
        prompt_reader.missing("text", "prompts are the beginnings of texts")
    openings = [text for (text,), _ in prompt_reader.read(prompts, ("text",))]
    return [
        Preference(openings[i % len(openings)], chosen, rejected, cfg.prompt_tokens)
        for i, (chosen, rejected) in enumerate(pairs)
    ]
