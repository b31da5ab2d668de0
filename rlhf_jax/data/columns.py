"""Columns of a source: which format they make up, and their cells as text or messages, checked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, cast

from rlhf_jax.config import DataConfig
from rlhf_jax.config_types import RANKINGS, Kind
from rlhf_jax.options import did_you_mean
from rlhf_jax.progress import watched

Format = Literal[
    "text",
    "messages",
    "prompt_completion",
    "preference",
    "ranking",
    "rating",
    "unpaired",
    "prompt_only",
    "labelled",
]
Message = Mapping[str, object]
Content = str | list[Message]
"""Text, or the messages of a conversation or of a part of it."""

COLUMNS: dict[Format, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "ranking": ("prompt", "completions"),
    "rating": ("prompt", "completion", "rating"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "labelled": ("text", "label"),
    "text": ("text",),
    "messages": ("messages",),
    "prompt_only": ("prompt",),
}
"""The columns that a format must have, in the order in which formats are tried."""

ORDERS = ("pairs", "ranks", "scores")
"""The columns that say how good the completions of a ranking are; one is needed, the first found is taken."""
FOR_TEMPLATES = ("tools", "chat_template_kwargs")
MAY_HAVE: dict[Format, tuple[str, ...]] = {"preference": ("prompt", "margin"), "ranking": ORDERS}

SERVES: dict[Kind, tuple[Format, ...]] = {
    "prompt_completion": ("text", "messages", "prompt_completion", "unpaired"),
    "preference": ("preference", "ranking", "labelled"),
    "preference_with_margin": ("preference", "ranking"),
    "prompt_only": (
        "prompt_only",
        "prompt_completion",
        "preference",
        "ranking",
        "rating",
        "unpaired",
        "messages",
        "text",
    ),
    "unpaired": ("unpaired", "preference"),
    "rating": ("rating", "ranking"),
    **dict.fromkeys(RANKINGS, ("ranking",)),
}
USUAL_COLUMNS = tuple(dict.fromkeys([*itertools.chain(*COLUMNS.values()), *ORDERS, "margin", *FOR_TEMPLATES]))


class Cells(NamedTuple):
    """A record as far as it is read."""

    contents: tuple[Content, ...]
    columns: dict[str, object]
    """The columns that are left."""
    variables: dict[str, object]
    """Of the chat template; none beside plain text."""


class Reader:
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
            if not self.has(usual):
                self.missing(name, f"data.columns maps {usual!r} to it")

    def name(self, usual: str) -> str:
        return self._names.get(usual, usual)

    def has(self, usual: str) -> bool:
        name = self.name(usual)
        return name in self.present or name.partition(".")[0] in self.present

    def missing(self, name: str, why: str) -> NoReturn:
        there = ", ".join(self.present)
        raise ValueError(
            f"{self.where}: no column {name!r} ({why}); columns present: {there}; map other names with "
            f"data.columns, such as {{prompt: question}}{did_you_mean(name, self.present)}"
        )

    def wrong(self, number: int, problem: str) -> NoReturn:
        raise ValueError(f"{self.where}: record {number}: {problem}")

    def read(
        self, source: Iterable[Mapping[str, object]], wanted: Sequence[str], *, allow_messages: bool = True
    ) -> list[Cells]:
        """Returns for each record the wanted contents, and the columns that are left, the same ones of all.

        A column that only some records have is None in the others. Where there is a prompt, the assistant has
        not yet answered in it, and does in what follows.
        """
        rows = [
            (self.contents(record, wanted, number, allow_messages), self.variables(record, number), record)
            for number, record in enumerate(watched(source, f"reading {self.where}"), start=1)
        ]
        names = [self.name(usual) for usual in wanted]
        left = [
            name for name in dict.fromkeys(itertools.chain(*(row for *_, row in rows))) if name not in names
        ]
        return [
            Cells(contents, {name: record.get(name) for name in left}, variables if is_chat(contents) else {})
            for contents, variables, record in rows
        ]

    def contents(
        self, record: Mapping[str, object], wanted: Sequence[str], number: int, allow_messages: bool = True
    ) -> tuple[Content, ...]:
        """Returns the cells of the wanted columns, which are text or messages, all of them alike."""
        found = tuple(
            self.content(self.cell(record, usual, number), self.name(usual), number) for usual in wanted
        )
        self.check_alike(dict(zip(map(self.name, wanted), found, strict=True)), number)
        if is_chat(found) and not allow_messages:
            self.wrong(number, f"column {self.name(wanted[0])!r} holds chat messages; map it to 'messages'")
        if is_chat(found) and wanted[0] == "prompt":
            self.check_turns(found, wanted, number)
        return found

    def content(self, cell: object, name: str, number: int) -> Content:
        if isinstance(cell, str):
            return cell
        if isinstance(cell, (list, tuple)):
            return self.messages(cell, name, number)
        return self.wrong(
            number, f"column {name!r} is {cell!r} ({type(cell).__name__}), must be text or messages"
        )

    def messages(self, cell: Sequence[object], name: str, number: int) -> list[Message]:
        """Returns a cell's messages without the fields that are null."""
        if not cell:
            self.wrong(
                number, f"column {name!r} is an empty conversation; give it messages, or drop the record"
            )
        found: list[Message] = []
        for place, item in enumerate(cell, start=1):
            which = f"message {place} of column {name!r}"
            if not isinstance(item, Mapping):
                self.wrong(number, f"{which} is {item!r}, must be an object with role and content")
            message = {str(key): value for key, value in item.items() if value is not None}
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or not role:
                has = ", ".join(map(str, item)) or "nothing"
                self.wrong(number, f"{which} has no role; it has {has}; a message is {{role, content}}")
            if isinstance(content, (list, tuple)):
                self.wrong(
                    number,
                    f"{which} has a list of parts as content; only text is read: join the text of its parts",
                )
            if not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
                was = "no content" if content is None else f"content {content!r}"
                self.wrong(number, f"{which} has {was}; content must be text")
            found.append(message)
        return found

    def check_alike(self, found: Mapping[str, Content], number: int) -> None:
        """Raises ValueError where some of a record's columns are text and others messages."""
        plain = [name for name, content in found.items() if isinstance(content, str)]
        if 0 < len(plain) < len(found):
            chat = [name for name in found if name not in plain]
            self.wrong(
                number,
                f"column {plain[0]!r} is text, but {chat[0]!r} holds messages; let them be alike",
            )

    def check_turns(self, found: Sequence[Content], wanted: Sequence[str], number: int) -> None:
        """Raises ValueError where a prompt ends with the assistant or a completion begins otherwise."""
        for usual, messages in zip(wanted, found, strict=True):
            is_prompt = usual == "prompt"
            message = cast("list[Message]", messages)[-1 if is_prompt else 0]
            if is_prompt == (message["role"] == "assistant"):
                does = "ends with an assistant" if is_prompt else f"begins with a {message['role']!r}"
                fix = "the assistant answers it" if is_prompt else "it must begin with the assistant's answer"
                self.wrong(number, f"column {self.name(usual)!r} {does} message; {fix}")

    def variables(self, record: Mapping[str, object], number: int) -> dict[str, object]:
        """Returns what the record gives its chat template beside messages; both columns may be JSON text."""
        found: dict[str, object] = {}
        for usual, shape in (("tools", list), ("chat_template_kwargs", dict)):
            cell = record.get(self.name(usual))
            if isinstance(cell, str) and cell:
                try:
                    cell = json.loads(cell)
                except json.JSONDecodeError as error:
                    self.wrong(number, f"column {self.name(usual)!r} is no JSON: {error}")
            if cell is None or cell == "":
                continue
            if not isinstance(cell, shape):
                kind = "a list of JSON schemas" if shape is list else "an object of template variables"
                self.wrong(number, f"column {self.name(usual)!r} is {cell!r}, must be {kind}")
            found |= {"tools": cell} if isinstance(cell, list) else cell
        return found

    def cell(self, record: Mapping[str, object], usual: str, number: int) -> object:
        """Returns a cell; a name `a.b` that is no column means field b of a, or of each of the list a."""
        name = self.name(usual)
        if name in record:
            return record[name]
        value: Any = record
        for field in name.split("."):
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, Mapping) and field in item for item in items):
                has = ", ".join(record) or "none"
                raise ValueError(f"{self.where}: record {number} has no column {name!r}; it has {has}")
            value = [item[field] for item in items] if isinstance(value, list) else value[field]
        return value


def is_chat(contents: Sequence[Content]) -> bool:
    return not isinstance(contents[0], str)


def record_format(source: Sequence[Mapping[str, object]], kind: Kind, cfg: DataConfig, where: str) -> Format:
    """Returns what the columns of a source mean; arguments and errors are those of read_records."""
    return resolve_format(Reader(source[0], cfg.columns, where), kind, cfg)


def is_read(usual: str, format: Format, kind: Kind) -> bool:
    """Returns whether a stage reads a column of this usual name where records of a format have it."""
    if usual == "margin" and kind != "preference_with_margin":
        return False
    is_template = usual in FOR_TEMPLATES and format not in ("text", "labelled")
    return is_template or usual in (*COLUMNS[format], *MAY_HAVE.get(format, ()))


def resolve_format(reader: Reader, kind: Kind, cfg: DataConfig) -> Format:
    """Returns the format, told from the columns where it is `auto`; raises where it cannot serve the kind."""
    allowed = SERVES[kind]
    wanted = [set(COLUMNS[format]) for format in allowed]
    needs = " or ".join(
        " + ".join(COLUMNS[format])
        for format in allowed
        if not any(of < set(COLUMNS[format]) for of in wanted)
    )
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


def _nearest_column(reader: Reader, allowed: Sequence[Format]) -> str:
    """Returns the missing column to name: one of the format that most columns speak for."""
    share = {format: sum(map(reader.has, COLUMNS[format])) / len(COLUMNS[format]) for format in allowed}
    best = max(allowed, key=lambda format: share[format])
    return next(usual for usual in COLUMNS[best] if not reader.has(usual))
