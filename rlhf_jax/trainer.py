"""The loop: next batch -> update -> evaluate, log, save. The same for every algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import keys
from rlhf_jax.batch import Metrics, Params, TrainState
from rlhf_jax.checkpoint import Checkpointer
from rlhf_jax.config import StageConfig
from rlhf_jax.evaluation import Evaluate
from rlhf_jax.metrics import MetricWriter, Progress, to_host, write_samples
from rlhf_jax.programs import Programs
from rlhf_jax.rewards.functions import RewardError

FIGURES = (
    "loss/nll",
    "loss/bradley_terry",
    "reward/score",
    "reward/accuracy",
    "policy/kl",
    "rollout/eos_rate",
)


class NextBatch(NamedTuple):
    """A batch on the device, where the data order stands after it, and what making it showed."""

    batch: Any
    position: int
    metrics: Metrics


Source = Callable[[TrainState, int, Array], NextBatch]
"""State, position in the data order, key -> the next batch."""


class NotFiniteError(RuntimeError):
    """Too many updates in a row had to be skipped."""


class Trainer:
    """Trains one stage: holds what the loop writes to and where it stands between two steps."""

    def __init__(
        self,
        stage: StageConfig,
        programs: Programs,
        source: Source,
        evaluate: Evaluate,
        writer: MetricWriter,
        checkpointer: Checkpointer,
        info: dict,
    ) -> None:
        """Args:
        stage: settings and periods.
        programs: of the stage.
        source: makes the next batch.
        evaluate: on held-out data.
        writer: of metrics.jsonl.
        checkpointer: of the stage's directory.
        info: saved beside every checkpoint; `seconds` and `before` are kept up to date in it.
        """
        self._stage = stage
        self._programs = programs
        self._source = source
        self._evaluate = evaluate
        self._writer = writer
        self._checkpointer = checkpointer
        self.info = {"seconds": 0.0, "before": {}, "after": {}} | info
        self._skipped_in_a_row = 0
        self._clock = time.perf_counter()

    def train(self, state: TrainState, frozen: Params, root: Array) -> TrainState:
        """Returns the state after the last step; starts where the given state stands.

        Metrics of a step are read when the next one is already on its way, so that the device does not wait.

        Args:
            state: donated.
            frozen: parameters of the roles that are only read.
            root: root key of the stage.
        Raises:
            NotFiniteError: after run.max_skipped_updates updates in a row that were not finite.
        """
        settings, num_steps = self._stage.settings, self._stage.settings.num_updates
        start, position = int(state.step), int(state.position)
        if start == 0:
            self.info["before"] = self._evaluated(state, frozen, 0)
            self._writer.write(0, self.info["before"])
        self._last_log = time.perf_counter()
        pending: tuple[int, Metrics] | None = None
        with Progress(self._stage.name, num_steps, start, self._stage.run.log_every) as progress:
            for iteration in range(start, num_steps):
                step, key = iteration + 1, keys.at_iteration(root, iteration)
                try:
                    batch, position, gathered = self._source(state, position, keys.named(key, "rollout"))
                except RewardError:
                    self._keep(progress, pending, state)
                    raise
                state, metrics = self._programs.update(state, frozen, batch, keys.named(key, "update"))
                state = at_position(state, position)
                if pending:
                    self._log(progress, *pending, {})
                pending = (step, gathered | metrics)
                is_last = step == num_steps
                evaluates = is_last or step % settings.eval_every == 0
                saves = not is_last and step % self._stage.checkpoint.every == 0
                if evaluates or saves or is_last:
                    jax.block_until_ready(state)
                    found = self._evaluated(state, frozen, step) if evaluates else {}
                    self.info["after"] = found or self.info["after"]
                    self._log(progress, *pending, found)
                    pending = None
                if saves:
                    self.save(state)
        return state

    def _keep(self, progress: Progress, pending: tuple[int, Metrics] | None, state: TrainState) -> None:
        """Logs and saves what is there before an error ends the run."""
        if pending:
            self._log(progress, *pending, {})
            if self._checkpointer.latest() != int(state.step):
                self.save(state)
        self._checkpointer.wait()

    def save(self, state: TrainState) -> None:
        """Saves the state and the info; returns before the files are written."""
        now = time.perf_counter()
        self.info["seconds"] += now - self._clock
        self._clock = now
        self._checkpointer.save(int(state.step), state, self.info)

    def _evaluated(self, state: TrainState, frozen: Params, step: int) -> dict[str, float]:
        start = time.perf_counter()
        metrics, samples = self._evaluate(state.params, frozen)
        if samples:
            write_samples(self._stage.run.dir, self._stage.name, step, samples)
        return metrics | {"perf/eval_seconds": time.perf_counter() - start}

    def _log(self, progress: Progress, step: int, metrics: Metrics, evaluated: dict[str, float]) -> None:
        found = to_host(metrics)
        bad = [
            name.removeprefix("not_finite/") for name, x in found.items() if "not_finite/" in name and x > 0
        ]
        found = {name: x for name, x in found.items() if "not_finite/" not in name}
        now = time.perf_counter()
        seconds = now - self._last_log - evaluated.get("perf/eval_seconds", 0.0)
        self._last_log = now
        found |= {
            "perf/step_seconds": seconds,
            "perf/tokens_per_s": found["perf/tokens"] / max(seconds, 1e-9),
        }
        self._writer.write(step, found | evaluated)
        progress.update(step, {name: found[name] for name in FIGURES if name in found})
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
        if self._skipped_in_a_row >= self._stage.run.max_skipped_updates:
            raise NotFiniteError(
                f"stage {self._stage.name}, step {step}: {self._skipped_in_a_row} updates in a row were not "
                f"finite; the first bad quantity is {bad[0]}. The parameters are those before these updates; "
                "lower optimizer.learning_rate, or look at the data of these steps"
            )


def at_position(state: TrainState, position: int) -> TrainState:
    """Returns the state with its place in the data order."""
    return state._replace(position=jax.device_put(jnp.int32(position), state.position.sharding))
