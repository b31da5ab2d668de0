"""Traces of a range of a stage's steps by JAX's profiler, for XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import jax

from rlhf_jax.batch import TrainState
from rlhf_jax.config import RunConfig
from rlhf_jax.distributed import is_first


class StepTraces:
    """Traces the steps of a stage that the options name, into RUN/profile/STAGE; else does nothing.

    A run that goes on in the middle of them traces the rest. What an exception ends is written as well.
    """

    def __init__(self, run: RunConfig, stage: str) -> None:
        """Begins nothing yet."""
        is_writer = is_first() or run.profile_hosts == "all"
        self._steps = run.profiled_steps(stage) if is_writer else range(0)
        self._directory = Path(run.dir) / "profile" / stage
        self._name = f"steps_{run.profile_steps}"  # the same on all hosts, so that XProf shows them together
        self._is_tracing = False
        self._step: jax.profiler.StepTraceAnnotation | None = None

    def begin(self, step: int, state: TrainState) -> None:
        """Begins a step; what is under way is awaited first, where it is the first one that is traced."""
        if step not in self._steps:
            return
        if not self._is_tracing:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.session_id = self._name
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._is_tracing = True
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

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _close(self) -> None:
        """Writes what is traced until now."""
        self._end_step()
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._close()
