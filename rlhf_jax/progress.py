"""How far a loop is that may take long, on stderr: nothing where it takes less than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from time import monotonic
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET = 2.0
"""Seconds in which nothing is shown."""
PERIOD = 20.0
"""Seconds between two lines where there is no terminal."""


def watched[T](
    items: Iterable[T],
    what: str,
    total: int | None = None,
    *,
    size: Callable[[T], int] = lambda item: 1,
    file: TextIO | None = None,
) -> Iterator[T]:
    """Yields the items unchanged and shows how many are done.

    `for row in watched(rows, "tokenising data.train"): ...`: after two seconds there is a bar on a terminal,
    elsewhere a line every twenty seconds and one at the end. The clock is read when an item is done, so that
    a single long one is not shown while it lasts.

    Args:
        items: what is gone through.
        what: what is done with them, such as "tokenising data.train".
        total: how many there are, where `items` has no length or an item counts for several.
        size: how many an item counts for, such as `len` of a batch.
        file: instead of stderr.
    """
    shown_on = file or sys.stderr
    total = len(items) if total is None and isinstance(items, Sized) else total
    start = monotonic()
    due = start + QUIET
    bar: Progress | None = None
    done = shown = 0
    try:
        for item in items:
            yield item
            now = monotonic()
            done += size(item)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            elif now >= due and shown_on.isatty():
                bar = _bar(what, done, total, shown_on)
            elif now >= due:
                print(_line(what, done, total, now - start), file=shown_on, flush=True)
                due, shown = now + PERIOD, done
        if shown and shown != done:
            print(_line(what, done, done, monotonic() - start), file=shown_on, flush=True)
    finally:
        if bar is not None:
            bar.stop()


def clock(seconds: float) -> str:
    """Returns 2:31, or 1:02:31 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bar(what: str, done: int, total: int | None, file: TextIO) -> Progress:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=file),
    )
    bar.add_task(what, completed=done, total=total)
    bar.start()
    return bar


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    if total is None or total < done:
        return f"[{what}] {done:,} in {clock(seconds)}"
    if total == done:
        return f"[{what}] {done:,} of {total:,} in {clock(seconds)}"
    return f"[{what}] {done:,} of {total:,}, {clock(seconds / done * (total - done))} left"
