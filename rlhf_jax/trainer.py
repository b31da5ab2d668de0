"""The loop: next batch -> update -> evaluate, log, save. The same for every algorithm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from rlhf_jax import compilations, keys, watchdog
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Metrics, Params, Rollout, TrainState
from rlhf_jax.checkpoint import Checkpointer
from rlhf_jax.config import StageConfig
from rlhf_jax.evaluation import Evaluate
from rlhf_jax.metrics import MetricWriter, Progress, to_host, write_samples
from rlhf_jax.programs import Programs
from rlhf_jax.rewards.functions import RewardError
from rlhf_jax.sharding import place
from rlhf_jax.step_traces import StepTraces
from rlhf_jax.stop_signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

NOT_FINITE = "not_finite/"  # metrics that say which quantity made an update be skipped


class NextBatch(NamedTuple):
    """A batch on the device, where the data order stands after it, and what making it showed."""

    batch: Any
    position: int
    metrics: Metrics
    meanwhile: Callable[[], tuple[Rollout | None, Metrics]] | None = None
    """Does what the batch after it can have done before the update is; then that is awaited, for the rest
    needs it. Returns that batch's rollout, where it could be made, and metrics. None: nothing needs it."""


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
        signals: StopSignals,
        utilization: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda found: {},
    ) -> None:
        """Makes the trainer of a stage.

        Args:
            stage: settings and periods.
            programs: of the stage.
            source: makes the next batch.
            evaluate: on held-out data.
            writer: of metrics.jsonl.
            checkpointer: of the stage's directory.
            info: saved beside every checkpoint. `seconds`, `in_steps` (the seconds of the steps that are not
                lost, without what was compiled), `before` and `after` (evaluations), `evaluated` (the step of
                `after`) and `skipped_in_a_row` are kept up to date in it; `begun` is when the stage was first
                started, now by default.
            signals: asked between two steps, and before an evaluation.
            utilization: metrics of a step -> further ones.
        """
        self._stage = stage
        self._programs = programs
        self._source = source
        self._evaluate = evaluate
        self._writer = writer
        self._checkpointer = checkpointer
        self._signals = signals
        empty: dict[str, Any] = {"seconds": 0.0, "in_steps": 0.0, "begun": time.time()}
        empty |= {"before": {}, "after": {}, "evaluated": 0, "skipped_in_a_row": 0}
        self.info = empty | info
        self._utilization = utilization
        self._pending: tuple[int, Metrics, tuple[float, float] | None] | None = None
        self._clock = self._step_end = time.perf_counter()
        self._compiled, self._compile_seconds = compilations.count(), compilations.seconds()
        self._known: set[object] = set()  # shapes of batches, and what else was done: it is compiled
        self._may_compile_until = 0  # step

    def train(self, state: TrainState, frozen: Params, root: Array) -> TrainState:
        """Returns the state after the last step; starts where the given state stands.

        Metrics of a step are read when the next one's update is on its way, so that the device does not wait;
        where the next batch needs the updated policy, what it does not need it for is done first. Then the
        update is awaited, and its seconds are a metric.

        Args:
            state: donated.
            frozen: parameters of the roles that are only read.
            root: root key of the stage.
        Raises:
            NotFiniteError: an update was skipped in run.max_skipped_updates steps in a row.
            RewardError: a reward function failed; what was trained until then is logged and saved.
            Stopped: SIGINT or SIGTERM came; the same.
        """
        num_steps = self._stage.settings.num_updates
        start, position = int(state.step), int(state.position)
        self._signals.check()
        if start == 0:
            self.info["before"] = self._evaluated(state, frozen, 0)
            self._writer.write(0, self.info["before"])
        elif self._is_evaluated(start) and self.info["evaluated"] != start:  # the last run did not come to it
            self._writer.amend(start, self._evaluated(state, frozen, start))
        self._step_end, self._compile_seconds = time.perf_counter(), compilations.seconds()
        self._newly_compiled()
        with (
            Progress(self._stage.name, num_steps, start, self._stage.run.log_every) as progress,
            StepTraces(self._stage.run, self._stage.name, self._apart) as traces,
        ):
            try:
                for iteration in range(start, num_steps):
                    watchdog.beat()
                    self._signals.check()
                    step, key = iteration + 1, keys.at_iteration(root, iteration)
                    traces.begin(step, state)
                    batch, position, gathered, meanwhile = self._source(
                        state, position, keys.named(key, "rollout")
                    )
                    self._expect_compilations(tuple(map(np.shape, jax.tree.leaves(batch))), step + 1)
                    begun = time.perf_counter()
                    state = state._replace(ahead=None)
                    state, metrics = self._programs.update(state, frozen, batch, keys.named(key, "update"))
                    state = at_position(state, position)
                    if is_online := meanwhile is not None:
                        ahead, told = meanwhile()
                        state, gathered = state._replace(ahead=ahead), gathered | told
                        del meanwhile  # and the weights that it has sampled with
                    self._log_pending(progress)
                    passed = None
                    if is_online:
                        jax.block_until_ready(state)
                        passed = self._passed()  # its line may come when the next batch is there
                        gathered = gathered | {"perf/update_seconds": time.perf_counter() - begun}
                    compiled = {"perf/compilations": float(self._newly_compiled())}
                    traces.end(step, state)
                    self._pending = (step, gathered | metrics | compiled, passed)
                    evaluates, is_last = self._is_evaluated(step), step == num_steps
                    saves = not is_last and step % self._stage.checkpoint.every == 0
                    if evaluates and not is_last:
                        self._signals.check()
                    if evaluates or saves:
                        jax.block_until_ready(state)
                        found = self._evaluated(state, frozen, step) if evaluates else {}
                        self._log_pending(progress, found)
                    if saves:
                        self._expect_compilations("saving", step + 1)
                        with self._apart():
                            self.save(state)
            except (RewardError, Stopped):
                self._log_pending(progress)
                if int(state.step) > 0 and self._checkpointer.latest() != int(state.step):
                    self.save(state)
                self._checkpointer.wait()
                raise
        return state

    def _is_evaluated(self, step: int) -> bool:
        settings = self._stage.settings
        return step == settings.num_updates or step % settings.eval_every == 0

    def times(self) -> dict[str, float]:
        """Returns the seconds since the stage was first started, those in steps, and their share: goodput.

        Steps that had to be made again count once. What is compiled, loaded, evaluated and saved is in none.
        """
        passed = time.time() - self.info["begun"]
        in_steps = self.info["in_steps"]
        # No more than 1, though the clock was set back, or a host's is behind that of the first start.
        return {
            "goodput": min(in_steps / max(passed, 1e-9), 1.0),
            "in_steps": in_steps,
            "since_begun": passed,
        }

    def save(self, state: TrainState) -> None:
        """Saves the state and the info; returns before the files are written."""
        now = time.perf_counter()
        self.info["seconds"] += now - self._clock
        self._clock = now
        self._checkpointer.save(int(state.step), state, self.info)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Keeps the time of what is done in it out of the seconds of steps."""
        start, compiled = time.perf_counter(), compilations.seconds()
        try:
            yield
        finally:
            self._step_end += time.perf_counter() - start
            self._compile_seconds += compilations.seconds() - compiled

    def _evaluated(self, state: TrainState, frozen: Params, step: int) -> dict[str, float]:
        start = time.perf_counter()
        self._expect_compilations("evaluation", step)
        with self._apart():
            metrics, samples = self._evaluate(state.params, frozen)
            if samples:
                write_samples(self._stage.run.dir, self._stage.name, step, samples)
        if self._stage.is_online and "eval/score" in metrics:  # the reference is the policy at step 0
            of_reference = self.info["before"].get("eval/score", metrics["eval/score"])
            metrics["eval/ref_score"] = math.nan if of_reference is None else of_reference
        self.info |= {"after": metrics, "evaluated": step}
        return metrics | {"perf/eval_seconds": time.perf_counter() - start}

    def _log_pending(self, progress: Progress, evaluated: Mapping[str, float] = MappingProxyType({})) -> None:
        """Writes the line of the step that is not yet written, if there is one, with its evaluation."""
        if self._pending is None:
            return
        step, metrics, passed = self._pending
        self._pending = None
        found = to_host(metrics)
        bad = [
            name.removeprefix(NOT_FINITE) for name in found if name.startswith(NOT_FINITE) and found[name] > 0
        ]
        bad.sort(key=lambda name: not name.startswith("loss/"))  # a loss comes before its gradient
        found = {name: x for name, x in found.items() if not name.startswith(NOT_FINITE)}
        seconds, compiling = passed or self._passed()
        self.info["in_steps"] += max(seconds - compiling, 0.0)
        found |= {
            "perf/step_seconds": seconds,
            "perf/tokens_per_s": found["perf/tokens"] / max(seconds, 1e-9),
            "perf/goodput": self.times()["goodput"],
        }
        found |= self._utilization(found)
        found["perf/compilations"] += self._newly_compiled() if evaluated else 0
        if found["perf/compilations"] > 0 and step > self._may_compile_until:
            logger.warning(
                "stage %s, step %d: %d programs were compiled, which costs time: after the second step some "
                "shape or type is new; JAX_LOG_COMPILES=1 names them",
                self._stage.name,
                step,
                found["perf/compilations"],
            )
        self._writer.write(step, found | dict(evaluated))
        algorithm = ALGORITHMS[self._stage.algorithm]
        progress.update(step, {name: found[name] for name in algorithm.figures if name in found})
        for name, limit in algorithm.alarms:
            if found[name] > limit:
                logger.warning(
                    "stage %s, step %d: %s is %.3g, above %g",
                    self._stage.name,
                    step,
                    name,
                    found[name],
                    limit,
                )
        self._watch(step, bad)

    def _passed(self) -> tuple[float, float]:
        """Returns the seconds since it was asked before, but for those apart, and of these the compiling."""
        now, compiled = time.perf_counter(), compilations.seconds()
        passed = now - self._step_end, compiled - self._compile_seconds
        self._step_end, self._compile_seconds = now, compiled
        return passed

    def _newly_compiled(self) -> int:
        """Returns how many programs were compiled since it was asked before."""
        before, self._compiled = self._compiled, compilations.count()
        return self._compiled - before

    def _expect_compilations(self, what: object, until: int) -> None:
        """Lets programs be compiled until a step without a warning, where this is done for the first time."""
        if what not in self._known:
            self._known.add(what)
            self._may_compile_until = max(self._may_compile_until, until)

    def _watch(self, step: int, bad: list[str]) -> None:
        """Warns of a skipped update, and raises when it has become a habit."""
        self.info["skipped_in_a_row"] = self.info["skipped_in_a_row"] + 1 if bad else 0
        if not bad:
            return
        where = f"stage {self._stage.name}, step {step}"
        logger.warning("%s: an update was skipped, for %s is not finite", where, bad[0])
        if self.info["skipped_in_a_row"] >= self._stage.run.max_skipped_updates:
            raise NotFiniteError(
                f"{where}: updates were skipped in {self.info['skipped_in_a_row']} steps in a row; the first "
                f"bad quantity is {bad[0]}. Skipped updates change no parameter. Lower "
                "optimizer.learning_rate, or look at the data of these steps"
            )


def at_position(state: TrainState, position: int) -> TrainState:
    """Returns the state with its place in the data order."""
    return state._replace(position=place(np.int32(position), state.position.sharding))
