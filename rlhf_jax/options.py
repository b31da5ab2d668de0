"""The options that the dataclasses of `config.py` define: types, ranges, defaults and texts, in words."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from collections import ChainMap
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf_jax import config, offline_config, online_config
from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.config import RUN_SECTIONS, STAGE_SECTIONS
from rlhf_jax.config_types import LARGEST_INT, FiniteFloat, PositiveFloat

SECTIONS = RUN_SECTIONS | STAGE_SECTIONS | ALGORITHM_SECTIONS
REQUIRED = dataclasses.MISSING
MIXTURE = str | dict[str, PositiveFloat]
"""One source, or several and their weights."""
FUNCTIONS = str | dict[str, FiniteFloat]
"""One function, or several and their weights."""
AXES = dict[str, str | list[str]]
"""Axes of the mesh by name: one, several, or `none`."""

_NOUNS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    MIXTURE: "a string, or a mapping of strings to weights",
    FUNCTIONS: "a string, or a mapping of strings to weights",
    AXES: "a mapping of names to a string or a list of strings",
    tuple[str, ...]: "a list of strings",
    tuple[int | str, ...]: "a list of integers and strings",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a section."""

    name: str
    hint: Any
    default: Any
    text: str

    @property
    def base(self) -> Any:
        """Returns the type without its range."""
        return (
            typing.get_args(self.hint)[0] if typing.get_origin(self.hint) is typing.Annotated else self.hint
        )

    @property
    def is_list(self) -> bool:
        """Returns whether the value is a list."""
        return typing.get_origin(self.base) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """Returns the values of a Literal, or of a list's Literal; empty for every other type."""
        of = typing.get_args(self.base)[0] if self.is_list else self.base
        return typing.get_args(of) if typing.get_origin(of) is typing.Literal else ()

    def is_text(self, given: str) -> bool:
        """Returns whether what is given on the command line is the value itself, not YAML that tells it."""
        is_one = self.base in (MIXTURE, FUNCTIONS) and not given.lstrip().startswith("{")
        return self.base is str or (bool(self.choices) and not self.is_list) or is_one

    @property
    def kind(self) -> str:
        """Returns what a value is, such as 'a number'."""
        if self.choices:
            return ("a list of " if self.is_list else "one of ") + ", ".join(map(repr, self.choices))
        return _NOUNS.get(self.base, "a mapping of names to strings")

    @property
    def range(self) -> str:
        """Returns the bounds, such as '>= 0 and <= 1', without that of all integers; may be empty."""
        constraints = [
            constraint for info in getattr(self.hint, "__metadata__", ()) for constraint in info.metadata
        ]
        return " and ".join(
            f"{sign} {getattr(constraint, bound)}"
            for constraint in constraints
            for bound, sign in _BOUNDS.items()
            if getattr(constraint, bound, LARGEST_INT) != LARGEST_INT
        )

    def read(self, value: Any) -> Any:
        """Returns the value as this option's type: an integer becomes a float where a number is expected.

        Raises:
            ValueError: it is of another type or out of range; the text says what is allowed and what came.
        """
        if self.base in (MIXTURE, FUNCTIONS) and isinstance(value, dict):
            return _weights(value, PositiveFloat if self.base == MIXTURE else FiniteFloat)
        if self.is_list:
            return self._read_list(value)
        try:
            return TypeAdapter(self.hint).validate_python(value, strict=True)
        except ValidationError as error:
            reason, limits = error.errors()[0]["type"], error.errors()[0].get("ctx", {})
        if self.choices:
            raise ValueError(f"must be {self.kind}, got {show(value)}{did_you_mean(value, self.choices)}")
        if limits.get("le") == LARGEST_INT:
            raise ValueError(f"must be <= {LARGEST_INT}, got {show(value)}")
        if reason in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
            raise ValueError(f"must be {self.range}, got {show(value)}")
        if reason == "finite_number":
            raise ValueError(f"must be a finite number, got {show(value)}")
        if reason == "string_too_short":
            raise ValueError("must not be empty")
        if reason == "string_pattern_mismatch":
            raise ValueError(f"must be made of letters, digits, '_' and '-', got {show(value)}")
        raise ValueError(f"expected {self.kind}, got {show(value)}")

    def _read_list(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected {self.kind}, got {show(value)}")
        if not self.choices:
            try:
                return TypeAdapter(self.hint).validate_python(tuple(value), strict=True)
            except ValidationError:
                raise ValueError(f"expected {self.kind}, got {show(value)}") from None
        for item in value:
            if item not in self.choices or list(value).count(item) > 1:
                twice = " twice" if item in self.choices else ""
                hint = "" if twice else did_you_mean(str(item).removesuffix("_proj"), self.choices)
                raise ValueError(f"must be {self.kind}, got {show(item)}{twice}{hint}")
        return tuple(value)


def _weights(value: dict[str, Any], hint: Any) -> dict[str, float]:
    """Returns the weights of sources or functions, of that type; ValueError with all that are none."""
    weight, read, problems = Option("weight", hint, REQUIRED, ""), {}, []
    for source, given in value.items():
        if not source:
            problems.append("a name must not be empty, got ''")
        try:
            read[source] = weight.read(given)
        except ValueError as error:
            problems.append(f"the weight of {source!r} {error}")
    if problems or not value:
        raise ValueError("; ".join(problems) or "must not be empty")
    return read


def _texts() -> dict[str, dict[str, str]]:
    """Returns {class: {field: the string that follows it}} of all files of options."""
    texts = {}
    sources = [inspect.getsource(module) for module in (config, offline_config, online_config)]
    for node in [node for source in sources for node in ast.parse(source).body]:
        if isinstance(node, ast.ClassDef):
            texts[node.name] = {
                field.target.id: " ".join(text.value.value.split())
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(text.value.value, str)
            }
    return texts


def _options_of(section: type) -> dict[str, Option]:
    hints = typing.get_type_hints(section, include_extras=True)
    texts = ChainMap(*(_TEXTS.get(cls.__name__, {}) for cls in section.__mro__))
    options = {}
    for f in dataclasses.fields(section):
        default = f.default if f.default_factory is REQUIRED else f.default_factory()
        options[f.name] = Option(f.name, hints[f.name], default, texts.get(f.name, ""))
    return options


_TEXTS = _texts()
OPTIONS = {name: _options_of(cls) for name, cls in SECTIONS.items()}
"""{section: {option name: Option}}"""
STAGE_FIELDS = _options_of(config.StageConfig)
"""The fields of a stage; `start_from` is written `from` in a file."""


def show(value: Any) -> str:
    """Returns a value as it would be written in YAML, cut at 60 characters."""
    value = list(value) if isinstance(value, tuple) else value
    text = (
        {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Returns '; did you mean ...?' with the nearest of the known names, or '' when none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
