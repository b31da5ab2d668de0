"""SIGINT and SIGTERM wait for a point at which nothing is lost."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, Self

from rlhf_jax import distributed

logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; what was trained until then is saved."""

    def __init__(self, signum: int) -> None:
        """Names the signal."""
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM waits until `check` is called; a second acts at once.

    One that is never entered stops nothing. A signal that the process ignores stays ignored.

    Where a run has several processes, SIGTERM to one stops all of them at the same call of `check`; JAX has
    the handler then. SIGINT interrupts the process at once there, and so ends the run as a failure does.
    """

    def __init__(self) -> None:
        """Nothing is installed before it is entered."""
        self._received: int | None = None
        self._num_checks = 0
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises Stopped where a signal has come; all processes call it equally often."""
        self._num_checks += 1
        if distributed.num_processes() > 1 and distributed.stop_is_due(self._num_checks):
            self._received = signal.SIGTERM
        if self._received is not None:
            raise Stopped(self._received)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        self._restore()
        logger.warning("%s: stopping after this step; again to stop at once", signal.Signals(signum).name)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def __enter__(self) -> Self:
        if distributed.num_processes() > 1:
            return self
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        self._restore()
