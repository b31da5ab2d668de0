"""Ends a stage that hangs: JAX waits for ever where one process of several does not come.

There is one watchdog in a process. It watches while `watching` is entered; whatever makes progress says so by
`beat`. Where a run has several processes, it hangs when none of them makes progress: one that is not among
the steps, or not yet, is expected to come too. What may take as long as it takes, on any of them, is
compiling, and what is done while the watchdog is `paused`, but for waiting for the others meanwhile.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rlhf_jax import distributed
from rlhf_jax.failures import HUNG, PERIOD, stacks, tell

JAX, OURS = str(Path(jax.__file__).parent), str(Path(__file__).parent)
COMPILERS = tuple(
    os.path.join(JAX, "_src", *names)
    for names in (("compiler.py",), ("interpreters", "mlir.py"), ("interpreters", "partial_eval.py"))
)
"""Files of JAX that are on the stack while it traces, lowers or compiles, and not while a program runs."""
COURTESY = 3 * PERIOD
"""Seconds in which a process that only waits lets another one, which hangs by itself, speak first."""

_progress_at = time.monotonic()
_num_pauses = _num_waits = 0
_thread = threading.main_thread().ident  # does the work


def beat() -> None:
    """Says that the stage makes progress."""
    global _progress_at
    _progress_at = time.monotonic()


@contextmanager
def paused() -> Iterator[None]:
    """While it is entered, nothing counts as hung: what is done may take as long as it takes."""
    global _num_pauses
    _num_pauses += 1
    try:
        yield
    finally:
        _num_pauses -= 1
        beat()


@contextmanager
def waiting() -> Iterator[None]:
    """While it is entered, the process waits for the others: that counts, also where the watchdog is paused.

    Else one that waits while it saves would hide that another one hangs.
    """
    global _num_waits
    if _num_pauses:
        beat()
    _num_waits += 1
    try:
        yield
    finally:
        _num_waits -= 1


@contextmanager
def watching(timeout: float) -> Iterator[None]:
    """While it is entered, so many seconds without a beat end the run, with the stacks of all threads.

    Time in which the thread that enters it compiles, or in which the watchdog is paused, does not count.
    Where there are other processes, they are watched from here as well, wherever they are.

    Args:
        timeout: seconds; 0: it does not watch.
    """
    if timeout <= 0:
        yield
        return
    global _thread
    is_over, before = threading.Event(), _thread
    _thread = threading.get_ident()
    beat()
    watcher = threading.Thread(target=_watch, args=(timeout, is_over), name="watchdog", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        _thread = before
        beat()


def idle() -> float:
    """Returns the seconds since this process made progress, watched or not; 0 while it compiles or saves."""
    is_busy = any(name.startswith(COMPILERS) for name in _files(_thread))
    if is_busy or (_num_pauses and not _num_waits):
        beat()
    return time.monotonic() - _progress_at


def _watch(timeout: float, is_over: threading.Event) -> None:
    while not is_over.wait(min(PERIOD, timeout / 4)):
        if idle() < timeout:
            continue
        lifeline = distributed.lifeline()
        if lifeline is None:
            try:
                tell(_told(timeout))
            finally:
                os._exit(HUNG)
        if lifeline.idle_of_all() < timeout:
            continue
        waits = next(_files(_thread), "").startswith((JAX, OURS))  # for a program, not in a user's function
        if waits and is_over.wait(COURTESY):
            return
        if lifeline.idle_of_all() >= timeout:
            lifeline.fail(_told(timeout), HUNG)


def _told(timeout: float) -> str:
    return (
        f"rlhf_jax: no step made progress in {timeout:g} s (distributed.step_timeout), so the run is ended; "
        f"where its threads are, the newest call first:\n{stacks()}"
    )


def _files(thread: int | None) -> Iterator[str]:
    """Yields the files of the functions that a thread is in, the innermost first."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back
