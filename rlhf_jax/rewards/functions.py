"""Reward functions of the user: found by name, called on the host with text, their answers checked.

A function is called as `fn(prompts=[...], completions=[...], **columns) -> list[float]`, one number per
completion. It is given the other columns of the records that it names as parameters, or all of them when it
takes **kwargs. As in TRL, prompts and completions of conversational records are lists of messages; a sampled
completion is [{"role": "assistant", "content": text}].
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_jax.data.records import Content, PromptOnly, is_conversational, reward_columns
from rlhf_jax.options import did_you_mean

SHOWN_CHARACTERS = 80


class RewardError(ValueError):
    """A reward function failed, or returned something that is no list of finite numbers."""


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user under the name that the configuration gives it."""

    name: str
    function: Callable[..., Any]

    def __call__(self, records: Sequence[PromptOnly], completions: Sequence[Content]) -> np.ndarray:
        """Returns f32[B], the score of each record's completion; RewardError where one has none."""
        prompts = [record.prompt for record in records]
        answers: list[Content] = [
            [{"role": "assistant", "content": completion}]
            if is_conversational(record) and isinstance(completion, str)
            else completion
            for record, completion in zip(records, completions, strict=True)
        ]
        return call(self.function, self.name, prompts, answers, reward_columns(records))

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises RewardError where the function needs an argument that no record with these columns gives."""
        _accepted(self.function, self.name, dict.fromkeys([*columns, "prompts", "completions"]))


def load_function(spec: str) -> RewardFunction:
    """Returns the function that `package.module:name` names; the current directory is importable.

    Raises:
        ValueError: the name has another form, the module cannot be imported (whatever it raises), it has no
            such function, or one whose parameters cannot be told.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")])):
        raise ValueError(
            f"reward function {spec!r} is not of the form package.module:name; for `def score(...)` in "
            "my_rewards.py in the current directory write my_rewards:score"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # code of the user
        raise ValueError(
            f"reward function {spec!r}: cannot import {module_name}: {type(error).__name__}: {error}; "
            f"it is looked for in the current directory ({os.getcwd()}) and among the installed packages"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, dir(found))
            raise ValueError(f"reward function {spec!r}: {module_name} has no {part}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"reward function {spec!r} is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward function {spec!r}: its parameters cannot be told ({error}); wrap it in a function "
            "such as def score(prompts, completions): ..."
        ) from error
    return RewardFunction(spec, found)


def call(
    function: Callable[..., Any],
    name: str,
    prompts: Sequence[Content],
    completions: Sequence[Content],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """Returns what a reward function says of each completion, f32[B].

    Args:
        function: of the user.
        name: how messages call it.
        prompts: B texts, or lists of messages.
        completions: B texts, or lists of messages.
        columns: B values each, by name; passed as far as the function takes them.

    Raises:
        RewardError: the function raised (the original is the cause), needs a column that the records do not
            have, or did not return B finite numbers; the message names the row and shows its completion.
    """
    offered = {**columns, "prompts": prompts, "completions": completions}
    arguments = {key: list(offered[key]) for key in _accepted(function, name, offered)}
    try:
        scores = function(**arguments)
    except (Exception, SystemExit) as error:  # code of the user
        raise RewardError(f"reward function {name} raised {type(error).__name__}: {error}") from error
    return _checked(scores, name, completions)


def _accepted(function: Callable[..., Any], name: str, offered: Mapping[str, Any]) -> list[str]:
    """Returns the names of the arguments that a function takes; RewardError where it needs another."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    by_name = {
        key: p
        for key, p in parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    needed = [
        key
        for key, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    unnamed = [key for key in needed if key not in by_name]
    if unnamed:
        raise RewardError(
            f"reward function {name} takes {', '.join(unnamed)} by position alone, but it is called by name; "
            "wrap it in a function such as def score(prompts, completions): ..."
        )
    missing = [key for key in needed if key not in offered]
    if missing:
        raise RewardError(
            f"reward function {name} needs {', '.join(missing)}, which the records do not have; it is given "
            f"{', '.join(offered)}: rename the parameter, give it a default, or map a column (data.columns)"
        )
    return [key for key in offered if takes_all or key in by_name]


def _checked(scores: Any, name: str, completions: Sequence[Content]) -> np.ndarray:
    """Returns a list or a one-dimensional array of scores as f32[B].

    Raises:
        RewardError: they are not B finite numbers.
    """
    wanted = f"it must return a list of {len(completions)} numbers, one per completion"
    num_dimensions = getattr(scores, "ndim", 1 if isinstance(scores, (list, tuple)) else None)
    if num_dimensions is None:
        kind = "None" if scores is None else f"a {type(scores).__name__}"
        raise RewardError(f"reward function {name} returned {kind}; {wanted}")
    if num_dimensions != 1:
        raise RewardError(
            f"reward function {name} returned an array of {num_dimensions} dimensions; {wanted}"
        )
    if len(scores) != len(completions):
        raise RewardError(f"reward function {name} returned {len(scores)} scores; {wanted}")
    checked = np.zeros(len(completions), np.float32)
    for row, (score, completion) in enumerate(zip(scores, completions, strict=True)):
        number = _number(score)
        if number is None or not np.isfinite(number):
            raise RewardError(
                f"reward function {name} returned {_shorten(repr(score))} for row {row}, where a "
                f"finite number must stand; the completion is {_shorten(repr(completion))}"
            )
        checked[row] = number
    return checked


def _number(score: Any) -> np.float32 | None:
    """Returns a number, or an array that is one, as float32; None for anything else."""
    if isinstance(score, (str, bytes)):
        return None
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        return None
    with np.errstate(over="ignore"):
        return np.float32(number)


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
