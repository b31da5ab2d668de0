"""Records in Arrow tables, which stay on disk: Parquet, `datasets.save_to_disk`, the hub and its streams."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

from rlhf_jax.data.third_party import told_as
from rlhf_jax.progress import watched

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

Record = dict[str, object]
ROWS_AT_ONCE = 1000


class ArrowRecords(Sequence[Record]):
    """Rows of a `datasets` table, which stays on disk; ValueError where one cannot be read."""

    def __init__(self, dataset: Dataset, name: str):
        """`name` is the configuration key and the name of the source, for messages."""
        self._dataset = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> ArrowRecords: ...
    def __getitem__(self, index: int | slice) -> Record | ArrowRecords:
        taken = range(len(self))[index]
        with self._reading():
            if isinstance(taken, int):
                return self._dataset[taken]
            part = self._dataset.select(taken)
            part.data.validate(full=True)  # to read rows of a damaged file may end the process without a word
            return ArrowRecords(part, self._name)

    def __iter__(self) -> Iterator[Record]:
        with self._reading():
            yield from cast("Iterator[Record]", self._dataset)

    def _reading(self) -> AbstractContextManager[None]:
        return told_as(f"{self._name} cannot be read")


def read_parquet(path: Path, where: str) -> ArrowRecords:
    """Returns the rows of a Parquet file, which is rewritten as an Arrow file once, as that can be mapped."""
    import pyarrow.parquet
    from datasets import Dataset, Features

    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    with (
        told_as(f"{where}: {path} cannot be read as Parquet"),
        pyarrow.parquet.ParquetFile(path, memory_map=True) as file,
    ):
        Features.from_arrow_schema(file.schema_arrow)  # raises where `datasets` cannot hold a column
        kept = _kept_file(identity)
        if not kept.exists():
            _write(kept, file.iter_batches(ROWS_AT_ONCE), f"{where}: {path.name}", file.metadata.num_rows)
        return ArrowRecords(Dataset.from_file(str(kept)), f"{where}: {path}")


def read_directory(path: Path, where: str, notation: str) -> ArrowRecords:
    """Returns the rows of a directory that `datasets.save_to_disk` wrote; `notation` is for messages."""
    from datasets import DatasetDict, load_from_disk

    with told_as(f"{where}: {path} is not a directory that datasets.save_to_disk wrote", f"give {notation}"):
        dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        names = ", ".join(f"{path}/{name}" for name in dataset)
        raise ValueError(f"{where}: {path} holds several data sets; name one of them: {names}")
    return ArrowRecords(dataset, f"{where}: {path}")


def read_hub(spec: str, where: str) -> ArrowRecords:
    """Returns the rows of `hub:NAME[/CONFIG]:SPLIT`, which are downloaded once."""
    from datasets import load_dataset

    hub = HubName.parse(spec, where)
    with told_as(f"{where}: {spec} cannot be loaded from the hub"):
        dataset = load_dataset(hub.name, hub.config or None, split=hub.split)
    return ArrowRecords(cast("Dataset", dataset), f"{where}: {spec}")


def read_stream(spec: str, part: slice, where: str) -> ArrowRecords:
    """Returns the rows A to B of `stream:NAME[/CONFIG]:SPLIT`, without downloading the others.

    A stream has an order but no random access: its beginning is read once and kept on disk, in a file that
    goes by what the hub (or the directory) holds now.
    """
    import pyarrow
    from datasets import Dataset, load_dataset_builder

    hub = HubName.parse(spec, where)
    start, stop = part.start or 0, part.stop
    if stop is None or not 0 <= start < stop:
        raise ValueError(
            f"{where}: {spec}: a stream needs a slice that says which records are read, counted from the "
            f"beginning, such as {spec}[:10000]"
        )
    with told_as(f"{where}: {spec} cannot be read as a stream"):
        builder = load_dataset_builder(hub.name, hub.config or None)
        kept = _kept_file(f"{builder.cache_dir} {hub.split} {start} {stop}")
        if not kept.exists():
            print(
                f"[{where}] {spec}[{start}:{stop}] is read from its beginning and kept in {kept}; a run that "
                "is resumed without that file reads it again",
                file=sys.stderr,
            )
            stream = cast("IterableDataset", builder.as_streaming_dataset(split=hub.split))
            schema = stream.features and stream.features.arrow_schema
            # Batches of the stream itself would be filled from beyond the slice before it ends.
            rows = itertools.islice(stream.skip(start), stop - start)
            tables = (
                pyarrow.Table.from_pylist(list(batch), schema)
                for batch in itertools.batched(rows, ROWS_AT_ONCE)
            )
            _write(kept, tables, f"{where}: {spec}", stop - start)
        return ArrowRecords(Dataset.from_file(str(kept)), f"{where}: {spec}")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A data set of the hub, or a local directory that is laid out like one."""

    name: str
    config: str
    split: str

    @classmethod
    def parse(cls, spec: str, where: str) -> HubName:
        """Returns what `hub:NAME[/CONFIG]:SPLIT` says, or `stream:...`."""
        kind, _, rest = spec.partition(":")
        match = re.fullmatch(r"([^:\[\]]+):([^:\[\]]+)", rest)
        if not match:
            raise ValueError(
                f"{where}: {spec}: must read {kind}:NAME[/CONFIG]:SPLIT, such as {kind}:owner/name:train"
            )
        name, split = match.groups()
        if is_path(name):
            return cls(os.path.expanduser(name), "", split)
        parts = name.split("/")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), split)


def is_path(name: str) -> bool:
    """Returns whether what stands for a name is a path instead."""
    return name.startswith(("/", ".", "~"))


def _kept_file(identity: str) -> Path:
    """Returns where rows are kept that go by this identity, among the data sets that `datasets` keeps."""
    from datasets import config

    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Path(config.HF_DATASETS_CACHE) / "rlhf_jax" / f"{name}.arrow"


def _write(
    path: Path, parts: Iterator[pyarrow.RecordBatch] | Iterator[pyarrow.Table], what: str, total: int
) -> None:
    """Writes parts of a table as an Arrow file: whole or not at all, whoever else writes the same one."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(parts, None)
    schema = pyarrow.schema([]) if first is None else first.schema
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            parts = itertools.chain([] if first is None else [first], parts)
            for part in watched(parts, f"reading {what}", total, size=lambda part: part.num_rows):
                writer.write(part)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
