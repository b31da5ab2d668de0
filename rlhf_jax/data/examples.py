"""A stage's examples: source -> records -> tokens, with what was left out or cut beside them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np

from rlhf_jax.batch import JudgedRows, Prompts, RecordRows, Rows, UnpairedRows
from rlhf_jax.config import PROMPTLESS_FORMATS, DataConfig
from rlhf_jax.config_types import RANKINGS, Kind
from rlhf_jax.data.arrow import Record
from rlhf_jax.data.collate import (
    Row,
    collate_packed,
    collate_prompts,
    collate_rows,
    of_sequences,
    static_length,
)
from rlhf_jax.data.columns import Format, record_format
from rlhf_jax.data.formats import read_records
from rlhf_jax.data.packing import Packing, pack
from rlhf_jax.data.records import (
    AnyRecord,
    PromptOnly,
    Unpaired,
    completions,
    in_template,
    is_conversational,
    judgements,
    texts,
    with_mismatched,
)
from rlhf_jax.data.sources import open_source, open_sources
from rlhf_jax.data.synthetic import synthetic_records
from rlhf_jax.data.token_cache import through_cache
from rlhf_jax.data.token_rows import TokenRows
from rlhf_jax.data.tokenize import Losses, encode_records
from rlhf_jax.data.tokenizer import Tokenizer

Split = Literal["train", "eval"]
Batch = RecordRows | Prompts
SYNTHETIC = "synthetic"
NOT_OF_TOKENS = ("train", "eval", "max_eval_records", "packing", "length_buckets", "cache_dir")
"""Options of the data section that decide no token of given records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The tokenised records of a stage; how many were left out or cut stands beside them."""

    kind: Kind
    formats: tuple[Format, ...]  # of each source's columns; the embedded task has none
    records: Sequence[AnyRecord]  # as text; a prompt that was cut to its first tokens reads as cut
    rows: TokenRows  # one per record, of a prompt its prompt alone; two of preferences and of unpaired
    # completions; of rankings as many as the longest one has
    length: int  # static length of a collated row: T, of prompts P
    pad_id: int
    num_dropped: int  # records whose prompt is too long, or whose text is too short to have one
    num_cut: int  # rows that were cut at data.max_length and so have no EOS
    longest_row: int
    longest_prompt: int
    weights: tuple[float, ...] = (1.0,)  # of each source; its records are drawn in this proportion
    counts: tuple[int, ...] = ()  # records of each source, which follow each other; of a single one all
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # while reading, by why
    losses: Losses = dataclasses.field(default_factory=Losses)  # of those that were read
    packings: tuple[Packing, ...] = ()  # of each source, where records share rows of `length` tokens
    shorter: tuple[int, ...] = ()  # further static lengths, ascending: a batch has the least that holds it
    ref_logprobs: np.ndarray | None = None  # f32[N, rows_per_record], where computed beforehand

    def __len__(self) -> int:
        return len(self.records)

    @property
    def has_conversations(self) -> bool:
        """Returns whether the records are conversations rather than plain text."""
        return is_conversational(self.records[0])

    @property
    def rows_per_record(self) -> int:
        """Returns 2 for preferences (chosen, rejected) and unpaired completions (own, mismatched), else 1.

        Of rankings it is the number of completions that the longest one has.
        """
        if self.kind in RANKINGS:
            return len(self.rows) // len(self.records)
        return 2 if self.kind in ("preference", "preference_with_margin", "unpaired") else 1

    @property
    def rows_together(self) -> int:
        """Returns how many rows of a record lie behind each other; those of unpaired ones lie apart."""
        return 1 if self.kind == "unpaired" else self.rows_per_record

    @property
    def rows_per_unit(self) -> int:
        """Returns the rows of a batch that one of the units has by which its size is given."""
        return 1 if self.packings else self.rows_together

    @functools.cached_property
    def fingerprint(self) -> int:
        """Returns a checksum of the data: a run is resumed on that which it began with.

        It covers all rows in their order, judgements that they do not tell and, of prompts, the columns that
        reward functions are given.
        """
        columns = (
            repr(record.columns).encode("utf-8", "backslashreplace")
            for record in self.records
            if isinstance(record, PromptOnly)
        )
        told = (self.is_desirable,) if self.kind == "unpaired" else self.judgements or ()
        return functools.reduce(
            lambda crc, of: zlib.crc32(of, crc), itertools.chain(columns, told), self.rows.checksum()
        )

    @functools.cached_property
    def is_desirable(self) -> np.ndarray:
        """Returns bool[N], of unpaired completions."""
        return np.array([cast(Unpaired, record).is_desirable for record in self.records])

    @functools.cached_property
    def judgements(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns f32[N, K] ratings and bool[N, K, K], which is better than which; None: rows tell all."""
        if self.kind not in ("preference_with_margin", "rating", *RANKINGS):
            return None
        return judgements(self.records, self.rows_per_record)

    def with_rows_per_record(self, number: int) -> Examples:
        """Returns rankings with so many rows each, of which the last may be empty."""
        return dataclasses.replace(self, rows=self.rows.spread(self.rows_per_record, number))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Returns i32[N, rows_per_record], tokens of the rows of each record."""
        return self.rows.lengths.reshape(-1, self.rows_per_record)

    @property
    def packed_lengths(self) -> np.ndarray:
        """Returns i32[N], the tokens that each record takes up of a packed row."""
        return self._in_a_row(self.lengths)

    def _in_a_row(self, of_rows: np.ndarray) -> np.ndarray:
        """Returns of i32[N, rows_per_record] what a record adds to a packed row, the fuller one of two."""
        return of_rows.reshape(len(of_rows), -1, self.rows_together).sum(axis=2).max(axis=1)

    @functools.cached_property
    def most_loss_tokens(self) -> int:
        """Returns the most tokens that carry loss in any row of a batch: C."""
        if not self.packings:
            return int(self.rows.num_loss_tokens.max())
        of_records = self.rows.num_loss_tokens.reshape(-1, self.rows_per_record)
        lengths, counts = self.packed_lengths, self._in_a_row(of_records)
        parts = [self.of_source(source) for source in range(len(self.packings))]
        return max(
            packing.most(lengths[part.start : part.stop], counts[part.start : part.stop])
            for packing, part in zip(self.packings, parts, strict=True)
        )

    @property
    def has_excluded(self) -> bool:
        """Returns whether any row has tokens behind its prompt that are not the model's own."""
        return len(self.rows.excluded) > 0

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
        return dataclasses.replace(self, length=capacity, packings=(pack(self.packed_lengths, capacity),))

    def collate(
        self,
        units: Sequence[Sequence[int]],
        index: Sequence[int],
        num_units: int,
        is_held: np.ndarray | None = None,
    ) -> Batch:
        """Returns the records of each unit, by number, as a batch of num_units; what is missing has length 0.

        Preferences alternate: sequence 2i is chosen, sequence 2i + 1 rejected. `index` becomes Prompts.index.
        Rankings have the sequences of the longest one each, the last of them empty. The mismatched
        completions of unpaired ones lie in rows of their own, at the same places.

        Args:
            units: numbers of records.
            index: of each unit.
            num_units: of a full batch.
            is_held: bool[rows of the batch], the rows whose tokens are wanted; others have their lengths, but
                no tokens. All by default.
        """
        longest = max((self.lengths[number].max() for unit in units for number in unit), default=0)
        length = next(length for length in (*self.shorter, self.length) if longest <= length)
        if self.kind == "prompt_only":
            prompts = [self.rows[number].ids for unit in units for number in unit]
            return collate_prompts(prompts, index, length, self.pad_id, num_units)
        collated = functools.partial(self._collated, units, length, num_units, is_held)
        if self.kind == "unpaired":
            rows, mismatched = collated(range(1)), collated(range(1, 2))
            of_rows = of_sequences(self.is_desirable[:, None], units, rows.lengths.shape)
            return UnpairedRows(rows, mismatched, of_rows)
        rows = collated(range(self.rows_per_record))
        if self.judgements is None:
            return rows
        ratings, better = (of_sequences(of, units, rows.lengths.shape) for of in self.judgements)
        return JudgedRows(rows, ratings, better)

    def _collated(
        self,
        units: Sequence[Sequence[int]],
        length: int,
        num_units: int,
        is_held: np.ndarray | None,
        which: range,
    ) -> Rows:
        """Returns those rows of each record, of its rows_per_record, for which it is asked."""
        per, per_unit = len(which), self.rows_per_unit

        def row(place: int, number: int, k: int) -> Row:
            is_wanted = is_held is None or is_held[per_unit * place + k % per_unit]
            make = self.rows.__getitem__ if is_wanted else self.rows.blank
            return make(self.rows_per_record * number + which[k])

        groups = [
            [row(place, number, k) for number in unit for k in range(per)] for place, unit in enumerate(units)
        ]
        if self.packings:
            most = per * max(packing.most_records for packing in self.packings)
            rows = collate_packed(
                groups, length, self.pad_id, num_units, most, with_excluded=self.has_excluded
            )
        else:
            one_each = [row for group in groups for row in group]
            rows = collate_rows(
                one_each, length, self.pad_id, per * num_units, with_excluded=self.has_excluded
            )
        if self.ref_logprobs is None:
            return rows
        known = self.ref_logprobs[:, which.start : which.stop]
        return rows._replace(ref_logprobs=of_sequences(known, units, rows.lengths.shape))


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
            left_out=source.left_out,
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
    if first.kind in RANKINGS:
        most = max(first.rows_per_record, second.rows_per_record)
        first, second = (of.with_rows_per_record(most) for of in (first, second))
    longer = max(first, second, key=lambda examples: examples.length)
    return dataclasses.replace(
        longer,
        formats=first.formats + second.formats,
        records=[*first.records, *second.records],
        rows=first.rows.joined(second.rows),
        num_dropped=first.num_dropped + second.num_dropped,
        num_cut=first.num_cut + second.num_cut,
        longest_row=max(first.longest_row, second.longest_row),
        longest_prompt=max(first.longest_prompt, second.longest_prompt),
        weights=first.weights + second.weights,
        packings=first.packings + second.packings,
        counts=(*(first.counts or (len(first),)), *(second.counts or (len(second),))),
        left_out=Counter(first.left_out) + Counter(second.left_out),
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
    left_out: Counter[str]
    """How many others the source holds, by why they are not read."""


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
        found = [SourceRecords(where, 1.0, None, synthetic_records(kind, split, seed), Counter())]
    else:
        opened = zip(weights.items(), open_sources(weights, where=where), strict=True)
        found = [
            _read(f"{where}: {spec}", weight, source, cfg, kind, seed) for (spec, weight), source in opened
        ]
    if kind == "unpaired":
        found = [
            source._replace(records=list(with_mismatched(cast("list[Unpaired]", source.records))))
            for source in found
        ]
    return found if split == "train" else [_limited(source, cfg.max_eval_records) for source in found]


def _limited(source: SourceRecords, limit: int) -> SourceRecords:
    beyond = Counter({f"beyond data.max_eval_records = {limit}": max(len(source.records) - limit, 0)})
    return source._replace(records=source.records[:limit], left_out=source.left_out + beyond)


def _read(
    name: str, weight: float, source: Sequence[Record], cfg: DataConfig, kind: Kind, seed: int
) -> SourceRecords:
    format = record_format(source, kind, cfg, name)
    is_paired = format == "labelled" and cfg.prompts
    prompts = open_source(cfg.prompts, where="data.prompts") if is_paired else ()
    records, left_out = read_records(source, kind, cfg, name, prompts=prompts, seed=seed)
    if format not in PROMPTLESS_FORMATS:
        records = [in_template(record, cfg.prompt_template) for record in records]
    return SourceRecords(name, weight, format, records, left_out)


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
    encoded = through_cache(cfg.cache_dir, encode, records, tokenizer, settings, where=where)
    longest = int(encoded.rows.lengths.max())
    examples = Examples(
        kind=kind,
        formats=(),
        records=encoded.records,
        rows=encoded.rows,
        length=static_length(longest, cfg.max_prompt_length if kind == "prompt_only" else cfg.max_length),
        pad_id=cast(int, tokenizer.pad_token_id),
        num_dropped=len(records) - len(encoded.records),
        num_cut=int(encoded.rows.was_cut.sum()),
        longest_row=longest,
        longest_prompt=encoded.longest_prompt,
        losses=encoded.losses,
    )
    return examples.packed(examples.rows_together * cfg.max_length) if cfg.packing else examples
