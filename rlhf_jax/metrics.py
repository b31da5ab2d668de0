"""Metrics: reduced on the device, written on the host.

`metrics.jsonl` of a run has one line for each (stage, step), exactly once, also after a crash and a resume:
`{"stage": "ppo", "step": 12, "time": 1767225600.0, "policy/kl": 3.1, ...}`. What is not finite is null.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import jax
import rich.console
import rich.progress
from jax import Array

from rlhf_jax.batch import Max, Mean
from rlhf_jax.files import replace_file, to_json
from rlhf_jax.progress import clock

logger = logging.getLogger(__name__)


def to_host(metrics: Mapping[str, Mean | Max | Array | float]) -> dict[str, float]:
    """Returns metrics as Python floats, fetched from the devices in one transfer.

    Args:
        metrics: scalars; a Mean is divided here, and is NaN where nothing was counted.
    """
    return {name: _number(metric) for name, metric in jax.device_get(dict(metrics)).items()}


def _number(metric: Any) -> float:
    """Returns the value of a metric that is on the host, without going back to the device."""
    if isinstance(metric, Mean):
        return float(metric.total) / float(metric.weight) if metric.weight != 0 else math.nan
    return float(metric.value if isinstance(metric, Max) else metric)


class MetricWriter:
    """Appends the metrics of one stage to RUN/metrics.jsonl, and to TensorBoard files if asked.

    Call `resume` before the first `write`. In a run of several processes the first one writes.
    """

    def __init__(self, run_dir: Path | str, stage: str, tensorboard: bool) -> None:
        """Opens nothing yet. Raises ValueError if tensorboard is true and tensorboardX is not installed."""
        self.path = Path(run_dir) / "metrics.jsonl"
        self.stage = stage
        self._is_writer = jax.process_index() == 0
        self._file: TextIO | None = None
        self._events: Any = None
        self._last_step: int | None = None
        self._non_finite: set[str] = set()  # names already reported
        self._event_writer = _tensorboard_writer() if tensorboard and self._is_writer else None

    def resume(self, step: int) -> None:
        """Makes ready to write from a step on.

        Lines of this stage from that step on are dropped; so are torn lines, with a warning.
        """
        self.close()
        self._last_step = step - 1
        if not self._is_writer:
            return
        if self.path.exists():
            self._drop_from(step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        if self._event_writer is not None:
            directory = self.path.parent / "tensorboard" / self.stage
            self._events = self._event_writer(str(directory), purge_step=step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and hands it to the operating system.

        Args:
            step: greater than the last one written.
            metrics: all that is known about the step, evaluation included; not finite is written as null.

        Raises:
            ValueError: the step, or a later one, is already written.
        """
        assert self._last_step is not None, "resume() comes before the first write()"
        if step <= self._last_step:
            raise ValueError(
                f"stage {self.stage}: metrics of step {step} come after those of step {self._last_step}; "
                "each step is written once, in order"
            )
        self._last_step = step
        if self._file is None:
            return
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in self._non_finite:
                self._non_finite.add(name)
                logger.warning("%s is %s at step %d of %s: written as null", name, value, step, self.stage)
        line = {"stage": self.stage, "step": step, "time": round(time.time(), 3), **metrics}
        self._file.write(to_json(line) + "\n")
        self._file.flush()
        self._write_events(step, metrics)

    def _write_events(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds figures to the newest line of this stage, that of `step`; `write` may follow."""
        if self._is_writer:
            lines = self._read()
            for place, (_, written) in enumerate(lines):
                if (written["stage"], written["step"]) == (self.stage, step):
                    lines[place] = (to_json(written | dict(metrics)) + "\n", written)
            replace_file(self.path, "".join(line for line, _ in lines))
        self.resume(step + 1)
        self._write_events(step, metrics)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _drop_from(self, step: int) -> None:
        kept = [line for line, x in self._read() if x["stage"] != self.stage or x["step"] < step]
        replace_file(self.path, "".join(kept))

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        """Returns each line with what it says; warns of those that say nothing."""
        found = []
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    record |= {"stage": str(record["stage"]), "step": int(record["step"])}
                except (ValueError, KeyError, TypeError):
                    logger.warning("%s:%d: dropped a line that is not a metrics record", self.path, number)
                    continue
                found.append((line.rstrip("\n") + "\n", record))
        return found


def write_samples(run_dir: Path | str, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Returns RUN/samples/STAGE-STEP.jsonl, written atomically; a resumed run replaces it.

    Args:
        run_dir: RUN.
        stage: the stage's name.
        step: the step of the evaluation.
        rows: one object per completion: prompt, completion, score, ...; stage and step are put before them.
    """
    path = Path(run_dir) / "samples" / f"{stage}-{step:06d}.jsonl"
    if jax.process_index() == 0:
        replace_file(path, "".join(to_json({"stage": stage, "step": step, **row}) + "\n" for row in rows))
    return path


class Progress:
    """Shows how far a stage is, on stderr: a bar on a terminal, a line every few steps elsewhere."""

    def __init__(
        self, stage: str, total: int, start: int, log_every: int, file: TextIO | None = None
    ) -> None:
        """Starts the display.

        Args:
            stage: the stage's name.
            total: steps of the stage.
            start: steps that an earlier run has done.
            log_every: steps between two lines where there is no terminal.
            file: instead of stderr.
        """
        self.stage, self.total, self.log_every = stage, total, log_every
        self._file = file or sys.stderr
        self._first: tuple[int, float] | None = None  # the first step compiles, so the clock starts after it
        self._bar: rich.progress.Progress | None = None
        self._is_shown = jax.process_index() == 0
        if self._is_shown and self._file.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[figures]}", markup=False),
                console=rich.console.Console(file=self._file),
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, figures="")
            self._bar.start()

    def update(self, step: int, figures: Mapping[str, str | float]) -> None:
        """Shows that `step` steps are done, with the three or four figures that matter.

        Args:
            step: steps done, of this run and earlier ones.
            figures: by metric name, of which the part after the last slash is shown.
        """
        now = time.monotonic()
        self._first = self._first or (step, now)
        if not self._is_shown:
            return
        parts = [f"{name.rpartition('/')[2]} {format_number(value)}" for name, value in figures.items()]
        first_step, first_time = self._first
        if step > first_step:
            seconds = (now - first_time) / (step - first_step)
            left = round(seconds * (self.total - step))
            parts += [
                f"{seconds:.2g} s/step" if seconds < 10 else f"{seconds:.0f} s/step",
                f"{clock(left)} left",
            ]
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif step % self.log_every == 0 or step == self.total or step == first_step:
            print(f"[{self.stage} {step}/{self.total}] {text}", file=self._file, flush=True)

    def close(self) -> None:
        """Ends the display."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def format_number(value: str | float) -> str:
    """Returns a number as a person reads it: about three digits, no exponent unless it is tiny."""
    if isinstance(value, str):
        return value
    if math.isfinite(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _tensorboard_writer() -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ValueError(
            "run.tensorboard is true, but tensorboardX is missing; pip install tensorboardX"
        ) from error
    return tensorboardX.SummaryWriter
