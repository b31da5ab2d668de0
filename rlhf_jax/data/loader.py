"""The order in which batches are taken from a stage's examples.

The order is a function of (seed, position) alone. Position is one integer: how many units were consumed. A
unit is a record, or with data.packing a row that several records share. An epoch has every record once:

* Records are taken in a permutation that is drawn for every epoch of a source.
* With data.packing the rows are, and so are the records that fill them; see data/packing.py. The records of a
  row are of one source.
* With data.length_buckets records are first taken as above for WINDOW batches. Those are dealt to batches by
  length, and the batches come in an order of their own. At the end of a window the same records are consumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.batch import Prompts, RecordRows
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.mixture import mixture_pick
from rlhf_jax.data.records import AnyRecord
from rlhf_jax.distributed import process_id
from rlhf_jax.sharding import row_holders

WINDOW = 32  # batches within which records of like length are put together


class Loader[Batch: RecordRows | Prompts, Taken: AnyRecord]:
    """Batches of examples in an order that is reshuffled for every epoch of a source.

    The type parameters say what the examples' kind only tells at run time: Loader[Prompts, PromptOnly] gives
    prompts to sample from.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int, mesh: Mesh | None = None):
        """Makes a loader.

        Args:
            examples: of a split.
            batch_size: counts units: a batch of preferences that are not packed has twice as many rows.
            seed: of the run.
            mesh: batches have the tokens of those rows that this process holds; without one, of all.
        """
        self.examples = examples
        self.batch_size = batch_size
        self._seed = seed
        num_rows = examples.rows_per_unit * batch_size
        self._is_held = None if mesh is None else row_holders(mesh, num_rows)[process_id()]
        self._window = functools.lru_cache(maxsize=2)(self._deal)
        # Of each source the epoch that batches are taken from, and the next one, into which they reach.
        self._filled = functools.lru_cache(maxsize=2 * len(examples.num_units))(self._fill)

    def batch(self, position: int) -> tuple[Batch, int]:
        """Returns the batch at a position, always full, and the next position.

        Without buckets, the sequence of records does not depend on the batch size; a batch may reach into
        the next epoch.
        """
        places = self._places(position)
        return self._collated([self._unit(place) for place in places], places), position + self.batch_size

    def records(self, position: int) -> list[Taken]:
        """Returns the records of batch(position), as text, for reward functions and samples."""
        return self._taken([self._unit(place) for place in self._places(position)])

    def eval_batches(self) -> Iterator[tuple[Batch, list[Taken]]]:
        """Yields all examples once: batches, the last filled up with rows of length 0.

        Records come in their own order, or where they are packed as their lengths bring it about.
        """
        for batch, units in self.numbered_batches():
            yield batch, self._taken(units)

    def numbered_batches(self) -> Iterator[tuple[Batch, Sequence[Sequence[int]]]]:
        """Yields the same batches, each with the numbers of the records of its units."""
        places = [
            (source, unit) for source, count in enumerate(self.examples.num_units) for unit in range(count)
        ]
        for start in range(0, len(places), self.batch_size):
            units = [self._records_of(*place, None) for place in places[start : start + self.batch_size]]
            yield self._collated(units, range(start, start + len(units))), units

    def _collated(self, units: Sequence[Sequence[int]], index: Sequence[int]) -> Batch:
        return cast(Batch, self.examples.collate(units, index, self.batch_size, self._is_held))

    def _taken(self, units: Sequence[Sequence[int]]) -> list[Taken]:
        return [cast(Taken, self.examples.records[number]) for unit in units for number in unit]

    def _places(self, position: int) -> Sequence[int]:
        """Returns the places in the sequence of units that make up a batch."""
        if not self.examples.shorter:
            return range(position, position + self.batch_size)
        window, within = divmod(position, WINDOW * self.batch_size)
        assert within % self.batch_size == 0, position
        return self._window(window)[within // self.batch_size].tolist()

    def _deal(self, window: int) -> np.ndarray:
        """Returns i64[WINDOW, batch_size], the places of a window by batch."""
        size = WINDOW * self.batch_size
        places = np.arange(window * size, (window + 1) * size)
        longest = self.examples.lengths.max(axis=1)
        by_length = np.argsort([longest[self._unit(place)[0]] for place in places.tolist()], kind="stable")
        return places[by_length].reshape(WINDOW, -1)[epoch_order(self._seed, window, WINDOW, use=2)]

    def _unit(self, place: int) -> Sequence[int]:
        """Returns the numbers of the records at a place in the sequence of units."""
        source, taken = mixture_pick(self.examples.weights, place)
        count = self.examples.num_units[source]
        epoch, within = divmod(taken, count)
        return self._records_of(source, int(epoch_order(self._seed, epoch, count, source)[within]), epoch)

    def _records_of(self, source: int, unit: int, epoch: int | None) -> Sequence[int]:
        """Returns the numbers of the records of a source's unit; of a packed one, as the epoch fills it."""
        examples = self.examples
        if not examples.packings:
            return [examples.of_source(source)[unit]]
        return self._filled(source, epoch)[examples.packings[source].row(unit)].tolist()

    def _fill(self, source: int, epoch: int | None) -> np.ndarray:
        """Returns i64[N], a source's record of each rank in an epoch; None: in the records' own order."""
        of = self.examples.of_source(source)
        count, lengths = len(of), self.examples.packed_lengths[of.start : of.stop]
        order = np.arange(count) if epoch is None else epoch_order(self._seed, epoch, count, source, use=1)
        return of.start + self.examples.packings[source].fill(lengths, order)


class Prefetched[Batch: RecordRows | Prompts, Taken: AnyRecord]:
    """A loader's batches, made by threads before they are asked for; the same ones, in any order."""

    def __init__(self, loader: Loader[Batch, Taken], num_threads: int = 2, num_ahead: int = 4):
        """Of num_ahead batches behind the last one that was asked for, each is made or being made."""
        self._loader = loader
        self._num_ahead = num_ahead
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
        self._made: dict[int, Future[tuple[Batch, int]]] = {}

    def batch(self, position: int) -> tuple[Batch, int]:
        """Returns loader.batch(position); raises what that raises."""
        size = self._loader.batch_size
        wanted = range(position, position + (self._num_ahead + 1) * size, size)
        self._made = {
            place: self._made.get(place) or self._threads.submit(self._loader.batch, place)
            for place in wanted
        }
        return self._made[position].result()


@functools.lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, count: int, source: int = 0, use: int = 0) -> np.ndarray:
    """Returns i64[count], a permutation: a function of its arguments alone.

    Args:
        seed: of the run.
        epoch: number of the epoch, or of what else is put in order.
        count: how many there are.
        source: of a mixture.
        use: what is put in order: units of an epoch 0, records of an epoch that fill rows 1, batches of a
            window 2.
    """
    entropy = np.random.SeedSequence([seed, epoch, source, use])
    order = np.random.Generator(np.random.Philox(entropy)).permutation(count)
    order.flags.writeable = False
    return order
