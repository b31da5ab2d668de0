"""A stage's data: source -> records -> tokens, and the order in which batches are taken from them.

The order is a function of (seed, position) alone. Position is one integer: how many records were consumed.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np

from rlhf_jax.batch import Prompts, Rows
from rlhf_jax.config import PROMPTLESS_FORMATS, DataConfig
from rlhf_jax.data.arrow import Record
from rlhf_jax.data.collate import Row, collate_prompts, collate_rows, static_length
from rlhf_jax.data.columns import Format, Kind, record_format
from rlhf_jax.data.mixture import mixture_pick
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
from rlhf_jax.data.tokenize import Losses, encode_records
from rlhf_jax.data.tokenizer import Tokenizer

Split = Literal["train", "eval"]
SYNTHETIC = "synthetic"


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
        rows = (np.asarray([row.prompt_length, *row.ids], np.int32).tobytes() for row in self.rows)
        return functools.reduce(lambda crc, row: zlib.crc32(row, crc), rows, 0)

    def collate(self, numbers: Sequence[int], index: Sequence[int], num_records: int) -> Rows | Prompts:
        """Returns the numbered records as a batch of num_records; rows without a record have length 0.

        Preferences are interleaved: row 2i is chosen, row 2i + 1 rejected. `index` becomes Prompts.index.
        """
        per = self.rows_per_record
        rows = [self.rows[per * number + k] for number in numbers for k in range(per)]
        if self.kind == "prompt_only":
            return collate_prompts([row.ids for row in rows], index, self.length, self.pad_id, num_records)
        return collate_rows(rows, self.length, self.pad_id, per * num_records)


class Loader[Batch: Rows | Prompts, Taken: AnyRecord]:
    """Batches of examples in an order that is reshuffled for every epoch of a source.

    The type parameters say what the examples' kind only tells at run time: Loader[Prompts, PromptOnly] gives
    prompts to sample from.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        """batch_size counts records: a batch of preferences has twice as many rows."""
        self.examples = examples
        self.batch_size = batch_size
        self._seed = seed

    def batch(self, position: int) -> tuple[Batch, int]:
        """Returns the batch at a position, always full, and the next position.

        The sequence of records does not depend on the batch size; a batch may reach into the next epoch.
        """
        end = position + self.batch_size
        return self._collated(self._numbers(position), range(position, end)), end

    def records(self, position: int) -> list[Taken]:
        """Returns the records of batch(position), as text, for reward functions and samples."""
        return self._taken(self._numbers(position))

    def eval_batches(self) -> Iterator[tuple[Batch, list[Taken]]]:
        """Yields all examples once, in their own order: batches, the last filled up with rows of length 0."""
        for start in range(0, len(self.examples), self.batch_size):
            numbers = range(start, min(start + self.batch_size, len(self.examples)))
            yield self._collated(numbers, numbers), self._taken(numbers)

    def _collated(self, numbers: Sequence[int], index: Sequence[int]) -> Batch:
        return cast(Batch, self.examples.collate(numbers, index, self.batch_size))

    def _taken(self, numbers: Sequence[int]) -> list[Taken]:
        return [cast(Taken, self.examples.records[number]) for number in numbers]

    def _numbers(self, position: int) -> list[int]:
        return [self._number(place) for place in range(position, position + self.batch_size)]

    def _number(self, place: int) -> int:
        counts = self.examples.counts or (len(self.examples),)
        source, taken = mixture_pick(self.examples.weights, place)
        epoch, within = divmod(taken, counts[source])
        return sum(counts[:source]) + int(epoch_order(self._seed, epoch, counts[source], source)[within])


@functools.lru_cache(maxsize=32)
def epoch_order(seed: int, epoch: int, count: int, source: int = 0) -> np.ndarray:
    """Returns i64[count], the order of a source's records in an epoch: a function of its arguments alone."""
    entropy = np.random.SeedSequence([seed, epoch, source])
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
    encoded = encode_records(records, kind, tokenizer, cfg, loss_on=loss_on, where=where)
    longest = max(len(row.ids) for row in encoded.rows)
    return Examples(
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
