"""A stage's data: source -> records -> tokens, and the order in which batches are taken from them.

The order is a function of (seed, position) alone. Position is one integer: how many units were consumed. A
unit is a record, or with data.packing a row that several records share. An epoch has every record once:

* Records are taken in a permutation that is drawn for every epoch of a source.
* With data.packing the rows are, and so are the records that fill them; see data/packing.py. The records of a
  row are of one source.
* With data.length_buckets records are first taken as above for WINDOW batches. Those are dealt to batches by
  length, and the batches come in an order of their own. At the end of a window the same records are consumed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, cast

import numpy as np

from rlhf_jax.batch import Prompts, Rows
from rlhf_jax.config import PROMPTLESS_FORMATS, DataConfig
from rlhf_jax.data.arrow import Record
from rlhf_jax.data.collate import Row, collate_packed, collate_prompts, collate_rows, static_length
from rlhf_jax.data.columns import Format, Kind, record_format
from rlhf_jax.data.mixture import mixture_pick
from rlhf_jax.data.packing import Packing, pack
from rlhf_jax.data.records import (
    AnyRecord,
    completions,
    in_template,
    is_conversational,
    read_records,
    texts,
)
from rlhf_jax.data.sources import open_source, open_sources
from rlhf_jax.data.synthetic import synthetic_records
from rlhf_jax.data.token_cache import through_cache
from rlhf_jax.data.tokenize import Losses, encode_records
from rlhf_jax.data.tokenizer import Tokenizer

Split = Literal["train", "eval"]
SYNTHETIC = "synthetic"
NOT_OF_TOKENS = ("train", "eval", "max_eval_records", "packing", "length_buckets", "cache_dir")
"""Options of the data section that decide no token of given records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The tokenised records of a stage; how many were left out or cut stands beside them."""

    kind: Kind
    formats: tuple[Format, ...]  # of each source's columns; the embedded task has none
    records: Sequence[AnyRecord]  # as text; a prompt that was cut to its first tokens reads as cut
    rows: Sequence[Row]  # one per record, of a preference two: chosen, rejected; of a prompt its prompt alone
    length: int  # static length of a collated row: T, of prompts P
    pad_id: int
    num_dropped: int  # records whose prompt is too long, or whose text is too short to have one
    num_cut: int  # rows that were cut at data.max_length and so have no EOS
    longest_row: int
    longest_prompt: int
    weights: tuple[float, ...] = (1.0,)  # of each source; its records are drawn in this proportion
    counts: tuple[int, ...] = ()  # records of each source, which follow each other; of a single one all
    losses: Losses = dataclasses.field(default_factory=Losses)
    packings: tuple[Packing, ...] = ()  # of each source, where records share rows of `length` tokens
    shorter: tuple[int, ...] = ()  # further static lengths, ascending: a batch has the least that holds it

    def __len__(self) -> int:
        return len(self.records)

    @property
    def has_conversations(self) -> bool:
        """Returns whether the records are conversations rather than plain text."""
        return is_conversational(self.records[0])

    @property
    def rows_per_record(self) -> int:
        """Returns 2 for preferences, 1 otherwise."""
        return 2 if self.kind == "preference" else 1

    @functools.cached_property
    def fingerprint(self) -> int:
        """Returns a checksum of all rows in their order: a run is resumed on the data that it began with."""
        rows = (
            np.asarray([row.prompt_length, *row.ids, *itertools.chain(*row.excluded)], np.int32).tobytes()
            for row in self.rows
        )
        return functools.reduce(lambda crc, row: zlib.crc32(row, crc), rows, 0)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Returns i32[N, rows_per_record], tokens of the rows of each record."""
        return self._of_records(len(row.ids) for row in self.rows)

    @functools.cached_property
    def most_loss_tokens(self) -> int:
        """Returns the most tokens that carry loss in any row of a batch: C."""
        of_rows = self._of_records(row.num_loss_tokens for row in self.rows)
        if not self.packings:
            return int(of_rows.max())
        lengths, counts = self.lengths.sum(axis=1), of_rows.sum(axis=1)
        parts = [self.of_source(source) for source in range(len(self.packings))]
        return max(
            packing.most(lengths[part.start : part.stop], counts[part.start : part.stop])
            for packing, part in zip(self.packings, parts, strict=True)
        )

    @functools.cached_property
    def has_excluded(self) -> bool:
        """Returns whether any row has tokens behind its prompt that are not the model's own."""
        return any(row.excluded for row in self.rows)

    @property
    def num_units(self) -> tuple[int, ...]:
        """Returns for each source how many rows its records are packed into, or how many records it has."""
        return tuple(packing.num_rows for packing in self.packings) or self.counts or (len(self),)

    def of_source(self, source: int) -> range:
        """Returns the numbers of a source's records."""
        counts = self.counts or (len(self),)
        return range(sum(counts[:source]), sum(counts[: source + 1]))

    def packed(self, capacity: int) -> Examples:
        """Returns the examples of one source with a plan of rows of `capacity` tokens that records share."""
        return dataclasses.replace(
            self, length=capacity, packings=(pack(self.lengths.sum(axis=1), capacity),)
        )

    def collate(self, units: Sequence[Sequence[int]], index: Sequence[int], num_units: int) -> Rows | Prompts:
        """Returns the records of each unit, by number, as a batch of num_units; what is missing has length 0.

        Preferences alternate: sequence 2i is chosen, sequence 2i + 1 rejected. `index` becomes Prompts.index.
        """
        per = self.rows_per_record
        groups = [[self.rows[per * number + k] for number in unit for k in range(per)] for unit in units]
        if self.packings:
            most = per * max(packing.most_records for packing in self.packings)
            return collate_packed(
                groups, self.length, self.pad_id, num_units, most, with_excluded=self.has_excluded
            )
        rows = [row for group in groups for row in group]
        longest = max((len(row.ids) for row in rows), default=0)
        length = next(length for length in (*self.shorter, self.length) if longest <= length)
        if self.kind == "prompt_only":
            return collate_prompts([row.ids for row in rows], index, length, self.pad_id, num_units)
        return collate_rows(rows, length, self.pad_id, per * num_units, with_excluded=self.has_excluded)

    def _of_records(self, numbers: Iterable[int]) -> np.ndarray:
        return np.fromiter(numbers, np.int32, len(self.rows)).reshape(-1, self.rows_per_record)


WINDOW = 32  # batches within which records of like length are put together


class Loader[Batch: Rows | Prompts, Taken: AnyRecord]:
    """Batches of examples in an order that is reshuffled for every epoch of a source.

    The type parameters say what the examples' kind only tells at run time: Loader[Prompts, PromptOnly] gives
    prompts to sample from.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        """batch_size counts units: a batch of preferences that are not packed has twice as many rows."""
        self.examples = examples
        self.batch_size = batch_size
        self._seed = seed
        self._window = functools.lru_cache(maxsize=2)(self._deal)
        self._filled = functools.lru_cache(maxsize=3)(self._fill)

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
        places = [
            (source, unit) for source, count in enumerate(self.examples.num_units) for unit in range(count)
        ]
        for start in range(0, len(places), self.batch_size):
            units = [self._records_of(*place, None) for place in places[start : start + self.batch_size]]
            yield self._collated(units, range(start, start + len(units))), self._taken(units)

    def _collated(self, units: Sequence[Sequence[int]], index: Sequence[int]) -> Batch:
        return cast(Batch, self.examples.collate(units, index, self.batch_size))

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
        count, lengths = len(of), self.examples.lengths[of.start : of.stop].sum(axis=1)
        order = np.arange(count) if epoch is None else epoch_order(self._seed, epoch, count, source, use=1)
        return of.start + self.examples.packings[source].fill(lengths, order)


class Prefetched[Batch: Rows | Prompts, Taken: AnyRecord]:
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


def load_examples(
    cfg: DataConfig,
    kind: Kind,
    split: Split,
    tokenizer: Tokenizer,
    seed: int,
    *,
    loss_on: Literal["completion", "all"] = "completion",
) -> Examples:
    """Returns the tokenised records of a split.

    Args:
        cfg: the stage's data section.
        kind: what the stage reads.
        split: train or held out; of held-out records at most cfg.max_eval_records are taken.
        tokenizer: with EOS and padding token.
        seed: decides the embedded task's records, and which labelled texts meet in a pair.
        loss_on: `all` gives the prompt's tokens loss too, as completion tokens.

    Raises:
        ValueError: as open_source, read_records, tokenize_records.
    """
    parts = [
        dataclasses.replace(
            tokenize_records(source.records, kind, tokenizer, cfg, loss_on=loss_on, where=source.name),
            formats=(source.format,) if source.format else (),
            weights=(source.weight,),
        )
        for source in load_records(cfg, kind, split, seed)
    ]
    return functools.reduce(_joined, parts)


def _joined(first: Examples, second: Examples) -> Examples:
    """Returns the examples of two lots of sources as one, those of the first before those of the second.

    Raises:
        ValueError: some are conversations and others plain text.
    """
    if first.has_conversations != second.has_conversations:
        raise ValueError(
            "data.train: some sources hold conversations and others plain text; let all be alike, for a "
            "conversation ends with a token of its chat template"
        )
    longer = max(first, second, key=lambda examples: examples.length)
    return dataclasses.replace(
        longer,
        formats=first.formats + second.formats,
        records=[*first.records, *second.records],
        rows=[*first.rows, *second.rows],
        num_dropped=first.num_dropped + second.num_dropped,
        num_cut=first.num_cut + second.num_cut,
        longest_row=max(first.longest_row, second.longest_row),
        longest_prompt=max(first.longest_prompt, second.longest_prompt),
        weights=first.weights + second.weights,
        packings=first.packings + second.packings,
        counts=(*(first.counts or (len(first),)), *(second.counts or (len(second),))),
        losses=Losses(*map(sum, zip(first.losses, second.losses, strict=True))),
    )


class SourceRecords(NamedTuple):
    """The records of one source as text."""

    name: str
    """Configuration key and source, for messages."""
    weight: float
    format: Format | None
    """What the columns meant; the embedded task has none."""
    records: list[AnyRecord]


def load_records(cfg: DataConfig, kind: Kind, split: Split, seed: int) -> list[SourceRecords]:
    """Returns the records of each source of a split; see load_examples."""
    own_eval = SYNTHETIC if cfg.train == SYNTHETIC else ""
    weights = cfg.sources if split == "train" else {cfg.eval or own_eval: 1.0}
    where = f"data.{split}"
    if "" in weights:
        raise ValueError(
            "data.eval: is empty; name held-out records (only data.train: synthetic brings its own)"
        )
    if SYNTHETIC in weights:
        found = [SourceRecords(where, 1.0, None, synthetic_records(kind, split, seed))]
    else:
        opened = zip(weights.items(), open_sources(weights, where=where), strict=True)
        found = [
            _read(f"{where}: {spec}", weight, source, cfg, kind, seed) for (spec, weight), source in opened
        ]
    limit = None if split == "train" else cfg.max_eval_records
    return [source._replace(records=source.records[:limit]) for source in found]


def _read(
    name: str, weight: float, source: Sequence[Record], cfg: DataConfig, kind: Kind, seed: int
) -> SourceRecords:
    format = record_format(source, kind, cfg, name)
    is_paired = format == "labelled" and cfg.prompts
    prompts = open_source(cfg.prompts, where="data.prompts") if is_paired else ()
    records = read_records(source, kind, cfg, name, prompts=prompts, seed=seed)
    if format not in PROMPTLESS_FORMATS:
        records = [in_template(record, cfg.prompt_template) for record in records]
    return SourceRecords(name, weight, format, records)


def training_texts(cfg: DataConfig, kind: Kind, seed: int) -> Iterator[str]:
    """Yields the texts of the training records, for the training of a tokenizer."""
    for source in load_records(cfg, kind, "train", seed):
        for record in source.records:
            for content in (record.prompt, *completions(record)):
                yield from texts(content)


def tokenize_records(
    records: Sequence[AnyRecord],
    kind: Kind,
    tokenizer: Tokenizer,
    cfg: DataConfig,
    *,
    loss_on: Literal["completion", "all"] = "completion",
    where: str = "data.train",
) -> Examples:
    """Returns the records with their token ids; arguments and errors are those of encode_records."""
    encode = functools.partial(encode_records, records, kind, tokenizer, cfg, loss_on=loss_on, where=where)
    settings = [kind, loss_on, {name: x for name, x in vars(cfg).items() if name not in NOT_OF_TOKENS}]
    encoded = through_cache(cfg.cache_dir, encode, records, tokenizer, settings)
    longest = max(len(row.ids) for row in encoded.rows)
    examples = Examples(
        kind=kind,
        formats=(),
        records=encoded.records,
        rows=encoded.rows,
        length=static_length(longest, cfg.max_prompt_length if kind == "prompt_only" else cfg.max_length),
        pad_id=cast(int, tokenizer.pad_token_id),
        num_dropped=len(records) - len(encoded.records),
        num_cut=sum(row.was_cut for row in encoded.rows),
        longest_row=longest,
        longest_prompt=encoded.longest_prompt,
        losses=encoded.losses,
    )
    return examples.packed(examples.rows_per_record * cfg.max_length) if cfg.packing else examples
