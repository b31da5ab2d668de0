"""Where an online stage's batches come from: prompts, completed by the policy, judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import keys
from rlhf_jax.batch import Metrics, Params, Prompts, Rollout, Rows, Scored, TrainState
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.loader import Loader, Prefetched
from rlhf_jax.data.records import AnyRecord, PromptOnly
from rlhf_jax.experience import Collector, Experience
from rlhf_jax.programs import Programs
from rlhf_jax.rollout.generate import RolloutPrograms
from rlhf_jax.sharding import batch_sharding, gathered, place_rows, replicated
from rlhf_jax.trainer import NextBatch, Source

OF_SCORES = ("reward/", "rollout/equal_groups")
"""Metrics that a selection of groups would bias."""
SUMMED = (
    "perf/tokens",
    "perf/prompt_tokens",
    "perf/sequences",
    "perf/rollout_seconds",
    "perf/score_seconds",
)


class PromptBatch(NamedTuple):
    """A batch of prompts."""

    prompts: Prompts
    """On the mesh."""
    records: list[PromptOnly]
    """One for each completion."""
    end: int
    """The next position in the data order."""


class PromptBatches:
    """The batches of prompts of a loader, on a mesh; those taken last are kept."""

    def __init__(self, loader: Loader[Prompts, PromptOnly], mesh: Mesh, group_size: int = 1) -> None:
        """Takes nothing yet; each prompt is going to have so many completions."""
        self.group_size = group_size

        def take(position: int) -> PromptBatch:
            prompts, end = loader.batch(position)
            records = [record for record in loader.records(position) for _ in range(group_size)]
            return PromptBatch(place_rows(mesh, prompts), records, end)

        self._take = lru_cache(maxsize=2)(take)

    def __call__(self, position: int) -> PromptBatch:
        """Returns the batch at a position in the data order."""
        return self._take(position)


class OnPolicy:
    """A source of batches, each of completions by the policy that it is going to change."""

    def __init__(
        self,
        programs: Programs,
        frozen: Params,
        collector: Collector,
        batches: PromptBatches,
        max_rollouts: int = 1,
        greedy: Collector | None = None,
    ) -> None:
        """Makes a source.

        Args:
            programs: of the stage.
            frozen: parameters of the roles that are only read.
            collector: completes and judges.
            batches: of prompts, on the mesh of the programs.
            max_rollouts: batches of prompts that are sampled at most to replace groups of equal scores; 1
                with greedy.
            greedy: completes and judges each prompt once more, where the score of that is a baseline.
        """
        self._greedy = greedy
        self._max_rollouts = max_rollouts
        self._has_merged = False
        self._programs = programs
        self._frozen = frozen
        self._collector = collector
        self._batches = batches

    def __call__(self, state: TrainState, position: int, key: Array) -> NextBatch:
        """Returns the batch at a position; the next one's prompts are made while the update runs."""
        taken = self._batches(position)
        experience = self._collect(state, taken, key)
        scored, end, told = experience.scored, taken.end, experience.metrics
        if self._max_rollouts > 1:
            scored, end, more = self._filled(state, experience, end, key)
            told = told | more
        batch, metrics = self._programs.advantages(scored, state.aux)
        if scored is not experience.scored:  # what is told of scores is told of all that was sampled first
            of_first = self._programs.advantages(experience.scored, state.aux)[1]
            metrics = metrics | {name: x for name, x in of_first.items() if name.startswith(OF_SCORES)}

        def meanwhile() -> tuple[None, Metrics]:
            self._batches(end)
            return None, {}

        return NextBatch(batch, end, told | metrics, meanwhile)

    def _collect(self, state: TrainState, taken: PromptBatch, key: Array) -> Experience:
        found = self._collector.collect(state.params, self._frozen, taken.prompts, taken.records, key)
        if self._greedy is None:
            return found
        records = taken.records[:: self._batches.group_size]
        greedy = self._greedy.collect(state.params, self._frozen, taken.prompts, records, key)
        return found._replace(
            scored=found.scored._replace(greedy=greedy.scored),
            metrics=found.metrics | _summed([found.metrics, greedy.metrics]),
        )

    def _filled(
        self, state: TrainState, first: Experience, end: int, key: Array
    ) -> tuple[Scored, int, Metrics]:
        """Returns a rollout whose groups of equal rewards are replaced by those of further prompts.

        The replaced ones stay where there are not enough others. Tokens and seconds are those of all
        rollouts, other metrics the first one's, with all of its groups. Source: arXiv:2503.14476 section 3.2.

        Args:
            state: of the policy.
            first: the first rollout.
            end: the position behind it in the data order.
            key: of all rollouts of the iteration; a completion's random numbers follow from its prompt's
                position.
        """
        scored, teaches = first.scored, self._informative(first, state)
        rows = np.arange(len(scored.scores), dtype=np.int32).reshape(len(teaches), -1)
        told = [first.metrics]
        if not self._has_merged:  # compiled now, not at the first gap
            scored = self._programs.merge(scored, scored, rows.ravel())
            self._has_merged = True
        while not teaches.all() and len(told) < self._max_rollouts:
            taken = self._batches(end)
            more = self._collect(state, taken, key)
            end = taken.end
            told.append(more.metrics)
            found = np.flatnonzero(self._informative(more, state))
            gaps = np.flatnonzero(~teaches)[: len(found)]
            source = rows.copy()
            source[gaps] = rows.size + rows[found[: len(gaps)]]
            scored = self._programs.merge(scored, more.scored, source.ravel())
            teaches[gaps] = True
        return scored, end, {"rollout/rollouts": float(len(told))} | _summed(told)

    def _informative(self, experience: Experience, state: TrainState) -> np.ndarray:
        return np.array(self._programs.informative_groups(experience.scored, state.aux))


def _summed(told: list[Metrics]) -> Metrics:
    """Returns the tokens and seconds of several rollouts together."""

    def number(x: Any) -> float:
        return x if isinstance(x, float) else float(gathered(x))  # seconds are this process's own

    return {name: sum(number(of[name]) for of in told) for name in SUMMED}


def with_ptx(source: Source, examples: Examples, num_rows: int, seed: int, mesh: Mesh) -> Source:
    """Returns a source whose batches have demonstrations beside them: other ones at each step.

    Which ones they are follows from the step alone, whatever the source takes of the prompts.

    Args:
        source: of batches of a policy.
        examples: the demonstrations, in the order of their sft stage.
        num_rows: of a batch.
        seed: of the run.
        mesh: where the batches lie.
    """
    loader = Prefetched(Loader[Rows, AnyRecord](examples, num_rows, seed, mesh))

    def with_both(state: TrainState, position: int, key: Array) -> NextBatch:
        found = source(state, position, key)
        rows, _ = loader.batch(num_rows * int(state.step))
        return found._replace(batch=found.batch._replace(ptx=place_rows(mesh, rows)))

    return with_both


class RolloutWorker:
    """Completes prompts on devices of its own while others update the policy."""

    def __init__(
        self,
        rollout: RolloutPrograms,
        to_decode: Callable[[Params], Params],
        shardings: Params,
        base: Params,
        mesh: Mesh,
        training_mesh: Mesh,
    ) -> None:
        """Copies the base to its devices.

        Args:
            rollout: for its mesh.
            to_decode: casts parameters where they are trained, so that fewer bytes are copied.
            shardings: of the parameters of the roles `policy`, and `base` where there is one, on its mesh.
            base: {"base": parameters} where policies are adapters on one; else empty.
            mesh: its own; prompts are to be on it.
            training_mesh: where rollouts are wanted.
        """
        self.mesh = mesh
        self._rollout = rollout
        self._to_decode = to_decode
        self._shardings = shardings
        self._base = jax.device_put(base, {role: shardings[role] for role in base})
        self._rows_on = batch_sharding(training_mesh)

    def begin(self, params: Params, prompts: Prompts, key: Array) -> Callable[[], Rollout]:
        """Returns what waits for the completions by the policy and returns them; params may be donated then.

        Args:
            params: by role, on the training mesh.
            prompts: on the worker's mesh.
            key: of this rollout.
        """
        policy = jax.device_put(self._to_decode(params["policy"]), self._shardings["policy"])
        key = jax.device_put(key, replicated(self.mesh))
        finish = self._rollout.begin({"policy": policy}, self._base, prompts, key)
        return lambda: jax.device_put(finish(), self._rows_on)


class Asynchronous:
    """A source of batches, each of completions by the policy as it was before the last update.

    They were made while that update ran, on devices of their own. The first batch is of the policy itself.
    """

    def __init__(
        self,
        programs: Programs,
        frozen: Params,
        collector: Collector,
        batches: PromptBatches,
        worker: RolloutWorker,
        root: Array,
        num_iterations: int,
    ) -> None:
        """Makes a source.

        Args:
            programs, frozen, collector: see `OnPolicy`.
            batches: of prompts, on the worker's mesh.
            worker: completes.
            root: root key of the stage.
            num_iterations: of the stage: behind the last one nothing is sampled.
        """
        self._programs = programs
        self._frozen = frozen
        self._collector = collector
        self._batches = batches
        self._worker = worker
        self._root = root
        self._num_iterations = num_iterations

    def __call__(self, state: TrainState, position: int, key: Array) -> NextBatch:
        """Returns the batch at a position, of state.ahead; the next one is sampled while the update runs."""
        begun = time.perf_counter()
        taken, rollout, following = self._batches(position), state.ahead, int(state.step) + 1
        if rollout is None:
            rollout = self._worker.begin(state.params, taken.prompts, key)()
        finish = None
        if following < self._num_iterations:
            next_key = keys.named(keys.at_iteration(self._root, following), "rollout")
            finish = self._worker.begin(state.params, self._batches(taken.end).prompts, next_key)
        experience = self._collector.judge(state.params, self._frozen, rollout, taken.records, begun)
        batch, metrics = self._programs.advantages(experience.scored, state.aux)

        def meanwhile() -> tuple[Rollout | None, Metrics]:
            if finish is None:
                return None, {}
            begun = time.perf_counter()
            ahead = finish()
            seconds = time.perf_counter() - begun
            self._batches(self._batches(taken.end).end)
            return ahead, {"perf/rollout_wait_seconds": seconds}

        return NextBatch(batch, taken.end, experience.metrics | metrics, meanwhile)


def ahead_of(leaves: Mapping[str, np.ndarray], mesh: Mesh) -> Rollout | None:
    """Returns a state's `ahead`, on the mesh, of its leaves by name; None where there are none."""
    if not leaves:
        return None
    placed = place_rows(mesh, dict(leaves))
    rows = Rows(placed["rows/tokens"], placed["rows/prompt_lengths"], placed["rows/lengths"])
    return Rollout(rows, placed["ended"], placed["sampler_logprobs"])
