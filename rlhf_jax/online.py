"""Where an online stage's batches come from: prompts, completed by the policy, judged."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from jax import Array
from jax.sharding import Mesh

from rlhf_jax.batch import Params, Prompts, TrainState
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.experience import Collector
from rlhf_jax.programs import Programs
from rlhf_jax.sharding import place_rows
from rlhf_jax.trainer import NextBatch


class PromptBatch(NamedTuple):
    """A batch of prompts."""

    prompts: Prompts
    """On the mesh."""
    records: list[PromptOnly]
    """One for each row."""
    end: int
    """The next position in the data order."""


class PromptBatches:
    """The batches of prompts of a loader, on a mesh; those taken last are kept."""

    def __init__(self, loader: Loader[Prompts, PromptOnly], mesh: Mesh) -> None:
        """Takes nothing yet."""

        def take(position: int) -> PromptBatch:
            prompts, end = loader.batch(position)
            return PromptBatch(place_rows(mesh, prompts), loader.records(position), end)

        self._take = lru_cache(maxsize=2)(take)

    def __call__(self, position: int) -> PromptBatch:
        """Returns the batch at a position in the data order."""
        return self._take(position)


class OnPolicy:
    """A source of batches, each of completions by the policy that it is going to change."""

    def __init__(
        self, programs: Programs, frozen: Params, collector: Collector, batches: PromptBatches
    ) -> None:
        """Makes a source.

        Args:
            programs: of the stage.
            frozen: parameters of the roles that are only read.
            collector: completes and judges.
            batches: of prompts, on the mesh of the programs.
        """
        self._programs = programs
        self._frozen = frozen
        self._collector = collector
        self._batches = batches

    def __call__(self, state: TrainState, position: int, key: Array) -> NextBatch:
        """Returns the batch at a position; the next one's prompts are made while the update runs."""
        taken = self._batches(position)
        experience = self._collector.collect(state.params, self._frozen, taken.prompts, taken.records, key)
        batch, metrics = self._programs.advantages(experience.scored, state.aux)

        def meanwhile() -> None:
            self._batches(taken.end)

        return NextBatch(batch, taken.end, experience.metrics | metrics, meanwhile)
