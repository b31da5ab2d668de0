"""Traces of a range of a stage's steps by JAX's profiler, for XProf or Perfetto."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Self

import jax

from rlhf_jax import watchdog
from rlhf_jax.agreement import exchanged
from rlhf_jax.batch import TrainState
from rlhf_jax.config import RunConfig
from rlhf_jax.distributed import is_first, process_id

logger = logging.getLogger(__name__)


class StepTraces:
    """Traces the steps of a stage that the options name, into RUN/profile/STAGE; else does nothing.

    A run that goes on in the middle of them traces the rest. What an exception ends is written as well. What
    cannot be traced or written is warned of: no training ends for that.
    """

    def __init__(
        self, run: RunConfig, stage: str, apart: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """Begins nothing yet; all processes call it.

        Args:
            run: names the steps, and the hosts that write.
            stage: of the steps.
            apart: is entered while the profiler starts, and while a trace is written.
        """
        self._stage, self._apart = stage, apart
        self._steps = run.profiled_steps(stage)
        if self._steps and not (_is_first_of_host() if run.profile_hosts == "all" else is_first()):
            self._steps = range(0)
        self._directory = Path(run.dir) / "profile" / stage
        self._is_tracing = False
        self._step: jax.profiler.StepTraceAnnotation | None = None

    def begin(self, step: int, state: TrainState) -> None:
        """Begins a step; what is under way is awaited first, where it is the first one that is traced."""
        if step not in self._steps:
            return
        if not self._is_tracing:
            jax.block_until_ready(state)
            self._do(lambda: self._start(step))
            self._is_tracing = bool(self._steps)
        if self._is_tracing:
            self._step = jax.profiler.StepTraceAnnotation("step", step_num=step)
            self._step.__enter__()

    def end(self, step: int, state: TrainState) -> None:
        """Ends a step; the last one is awaited, and the trace written."""
        if self._step is None:
            return
        if step == self._steps[-1]:
            jax.block_until_ready(state)
            self._close()
        else:
            self._end_step()

    def _start(self, step: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        # The same on all hosts, so that XProf shows them together; another one where a run goes on.
        options.session_id = f"steps_{step}-{self._steps[-1]}"
        jax.profiler.start_trace(self._directory, profiler_options=options)

    def _do(self, act: Callable[[], object]) -> None:
        """Starts the profiler or writes its trace; where that fails, no more steps are traced."""
        try:
            with self._apart(), watchdog.paused():
                act()
        except (OSError, RuntimeError) as error:
            self._steps = range(0)
            logger.warning(
                "stage %s: there is no trace of its steps in %s: %s", self._stage, self._directory, error
            )

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _close(self) -> None:
        """Writes what is traced until now."""
        self._end_step()
        if self._is_tracing:
            self._is_tracing = False
            self._do(jax.profiler.stop_trace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._close()


def _is_first_of_host() -> bool:
    """Returns whether no lower process is on this one's host: they would write the same file."""
    hosts = exchanged(socket.gethostname())
    return hosts.index(hosts[process_id()]) == process_id()
