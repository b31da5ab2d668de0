"""What the processes of a run tell each other on their hosts; in a run of one, nothing is told.

All processes call these functions, and in the same order: none may decide by itself whether to.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax import distributed, watchdog
from rlhf_jax.distributed import num_processes, process_id
from rlhf_jax.failures import is_of_runtime

TOLD = (ValueError, OSError)
"""Errors that one process meets and all raise; any other ends its process, and that the run."""


def exchanged(value: Any) -> list[Any]:
    """Returns the values that the processes give, by process; they may be anything that pickles."""
    if num_processes() == 1:
        return [value]
    told = np.frombuffer(pickle.dumps(value), np.uint8)
    with watchdog.waiting():
        sizes = multihost_utils.process_allgather(np.int32(told.size)).tolist()
        padded = np.zeros(max(sizes), np.uint8)
        padded[: told.size] = told
        every = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def on_first[T](make: Callable[[], T]) -> T:
    """Returns, on every process, what a function returns on the first one, which alone calls it.

    For what lies on a disk that processes share: one of them looks or writes, and all are told. What was
    written there before this returns is there for all.

    Raises:
        ValueError, OSError: the function raised it there.
    """
    if num_processes() == 1:
        return make()
    outcome: tuple[Any, Exception | None] = (None, None)
    if process_id() == 0:
        try:
            outcome = make(), None
        except TOLD as error:
            outcome = None, error
    told = exchanged(outcome)
    value, error = outcome if process_id() == 0 else told[0]
    if error is not None:
        raise _of(error, 0)
    return value  # pyright: ignore[reportReturnType]


def together[T](make: Callable[[], T]) -> T:
    """Returns what a function returns on this process; where it fails on one, all raise that error.

    Raises:
        ValueError, OSError: the function raised it, on the lowest process that it failed on.
    """
    if num_processes() == 1:
        return make()
    value, failure = None, None
    try:
        value = make()
    except TOLD as error:
        failure = error
    for rank, error in enumerate(exchanged(failure)):
        if error is not None:
            raise (failure if rank == process_id() and failure else _of(error, rank))
    return value  # pyright: ignore[reportReturnType]


def check_alike(
    what: str, make: Callable[[], object], remedy: str = "give all hosts the same files and the same command"
) -> None:
    """Raises ValueError, on every process, where a function does not return the same on all of them.

    Args:
        what: it returns, in the plural, for the message.
        make: is not called where there is one process. Of dicts the message names the keys that differ.
        remedy: what makes them the same.
    """
    if num_processes() == 1:
        return
    told = exchanged(make())
    others = [rank for rank, found in enumerate(told) if found != told[0]]
    if others:
        raise ValueError(
            f"{what} are not the same on process 0 and on {', '.join(map(str, others))}"
            f"{_difference(told[0], told[others[0]])}; {remedy}"
        )


def _difference(one: object, other: object, most: int = 5) -> str:
    """Returns in what two dicts differ, with the values if these are short; nothing of other things."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return ""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    shown = [f"{key} ({one.get(key, 'missing')}, {other.get(key, 'missing')})" for key in keys[:most]]
    return f": {', '.join(shown)}{more}"


def is_of_another(error: BaseException) -> bool:
    """Returns whether an error is one that another process met, of which this one was told."""
    return error.__dict__.get("_met_by", process_id()) != process_id()


def ended_with(error: BaseException) -> int:
    """Returns the exit code 2 after telling, on stderr and to all other processes, what was wrong."""
    message = f"rlhf_jax: {error}"
    if is_early := distributed.lifeline() is None:
        print(message, file=sys.stderr, flush=True)
    may_follow = is_of_another(error) or is_of_runtime(error)
    distributed.fail(message, 2, may_follow=may_follow, is_told=is_early)
    return 2


def _of(error: Exception, rank: int) -> Exception:
    """Returns the error, marked as one that a process met."""
    error.__dict__["_met_by"] = rank
    return error
