"""SIGINT and SIGTERM end a run where nothing is lost, in several processes at the same step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from rlhf_jax import distributed
from rlhf_jax.failures import PERIOD, Store, tell

logger = logging.getLogger(__name__)

CHECKS = "rlhf_jax/checks/"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0
"""Seconds in which the main thread is to raise what stops the run at once, before the process is ended."""
TOGETHER = 0.5
"""Seconds in which several signals are one."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; what was trained until then is saved."""

    def __init__(self, signum: int, *, by_all: bool = True) -> None:
        """Names the signal.

        Args:
            signum: its number.
            by_all: all processes of the run stop here; else the others must be told.
        """
        super().__init__(signal.Signals(signum).name)
        self.signum, self.by_all = signum, by_all


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM raises Stopped; a second acts as it does elsewhere.

    It raises at once, in the main thread, but within `deferred` where `check` is called next, all processes
    stop at the same call then. One that is never entered stops nothing. A signal that the process ignores
    stays ignored.

    Python runs its handlers between two of its instructions, so not while the main thread compiles, or waits
    for other processes. What is to stop at once is ended then by a thread: nothing on the disk is half done
    at any moment.
    """

    def __init__(self) -> None:
        """Nothing is installed before it is entered."""
        self._received: int | None = None
        self._is_deferred = False
        self._agreed: Agreement | None = None
        self._before: dict[int, Any] = {}
        self._is_over = threading.Event()
        self._pipe: tuple[int, int] | None = None  # to the thread, from what Python does when a signal comes

    def check(self) -> None:
        """Raises Stopped where a signal has come; all processes call it equally often."""
        signum = self._received if self._agreed is None else self._agreed.check()
        if signum is not None:
            raise Stopped(signum)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While it is entered, a signal waits for `check`, and for the end of the block where none comes."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self._received is not None:
            raise Stopped(self._received, by_all=self._agreed is None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        self._restore()
        if not self._is_deferred:
            raise Stopped(signum, by_all=self._agreed is None)
        logger.warning("%s: stopping after this step; again to stop at once", signal.Signals(signum).name)
        if self._agreed is not None:
            self._agreed.wanted = signum

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _listen(self, pipe: int) -> None:
        first: float | None = None
        while word := os.read(pipe, 1):
            if word[0] in SIGNALS:
                first = time.monotonic() if first is None else first
                # What comes with the first one is it again: a terminal's and a launcher's, or both signals.
                is_due_now = time.monotonic() - first > TOGETHER or not self._is_deferred
                if is_due_now and not self._is_over.wait(PATIENCE):
                    _end(word[0])
        os.close(pipe)

    def __enter__(self) -> Self:
        if (lifeline := distributed.lifeline()) is not None:
            self._agreed = Agreement(lifeline.store, lifeline.rank, lifeline.num_processes)
            lifeline.errand = self._agreed.look  # for good: others may need to know where this process was
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            read, write = os.pipe()
            os.set_blocking(write, False)
            threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()
            self._pipe = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            for signum in SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        self._is_over.set()
        self._restore()
        if self._pipe is not None:
            write, before = self._pipe
            signal.set_wakeup_fd(before)
            os.close(write)


def _end(signum: int) -> NoReturn:
    """Ends the process, and the others of its run."""
    text = f"rlhf_jax: stopped at once by {signal.Signals(signum).name}; the same command goes on"
    try:
        if (lifeline := distributed.lifeline()) is not None:
            lifeline.fail(text, 128 + signum)
        tell(text)
    finally:
        os._exit(128 + signum)


class Agreement:
    """On which of their checks several processes stop, once one of them wants to.

    That one leaves the number of its last check in the store, and its next one waits. Those who find a number
    there do the same. When all have, they stop at the check after the highest.
    """

    def __init__(self, store: Store, rank: int, num_processes: int) -> None:
        """Names this process; once in a run."""
        self.wanted: int | None = None
        """The signal that came to this process."""
        self._store, self._rank, self._num_processes = store, rank, num_processes
        self._count = 0
        self._left: str | None = None  # what this process has left in the store: its count and signal
        self._stop: tuple[int, int] | None = None  # count and signal that all have agreed on
        self._changed = threading.Condition()

    def check(self) -> int | None:
        """Returns the signal where all processes stop at this check."""
        with self._changed:
            while self._left is not None and self._stop is None:
                self._changed.wait(PERIOD)
            self._count += 1
            return self._stop[1] if self._stop is not None and self._count >= self._stop[0] else None

    def look(self) -> None:
        """Takes part in the agreement; called about once a second, by a thread that only watches.

        Raises:
            JaxRuntimeError: the store cannot be reached; the next call tries again.
        """
        if self._stop is not None:
            return
        found = dict(self._store.key_value_dir_get(CHECKS))
        if not found and self.wanted is None:
            return
        with self._changed:
            self._left = self._left or f"{self._count} {self.wanted or 0}"
        self._store.key_value_set(f"{CHECKS}{self._rank}", self._left, allow_overwrite=True)
        found[f"{CHECKS}{self._rank}"] = self._left
        if len(found) < self._num_processes:
            return
        told = [tuple(map(int, found[f"{CHECKS}{rank}"].split())) for rank in range(self._num_processes)]
        signum = next(wanted for _, wanted in told if wanted)
        with self._changed:
            self._stop = max(count for count, _ in told) + 1, signum
            self._changed.notify_all()
