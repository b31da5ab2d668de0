"""A specification such as `stories.jsonl[:4000]` becomes a sequence of records, dicts of columns."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast, overload

from rlhf_jax.data.third_party import told_as
from rlhf_jax.options import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, object]
NOTATION = (
    "a .jsonl[.gz] or .parquet file, a directory of datasets.save_to_disk, or hub:NAME[/CONFIG]:SPLIT, "
    "each with an optional slice such as [:4000]"
)


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


def open_source(spec: str, *, where: str = "data.train") -> Sequence[Record]:
    """Returns the records that `spec` names: a sequence with random access, at least one record long.

    Args:
        spec: see NOTATION. `hub:owner/name:split` names a data set of the hub, `hub:owner/name/config:split`
            one configuration of it; code of the hub is never run. A slice counts as Python's, without a step.
        where: the configuration key that holds `spec`, for messages.

    Raises:
        ValueError: nothing there, a file of no known kind, a broken line or a damaged file, or no records.
    """
    path, part = _split_slice(spec, where)
    records = _read_hub(path, where) if path.startswith("hub:") else _read_path(Path(path), where)
    if not len(records):
        raise ValueError(f"{where}: {path} holds no records; a stage needs at least one")
    taken = records[part]
    if not len(taken):
        raise ValueError(f"{where}: {spec} takes no records: there are {len(records)}; widen the slice")
    return taken


def _split_slice(spec: str, where: str) -> tuple[str, slice]:
    if not spec.endswith("]") or "[" not in spec:
        return spec, slice(None)
    path, _, inside = spec[:-1].rpartition("[")
    match = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", inside)
    if not match:
        raise ValueError(
            f"{where}: slice [{inside}] of {path}: must be [A:B] with integers or nothing for A and B"
        )
    start, stop = (None if bound is None else int(bound) for bound in match.groups())
    return path, slice(start, stop)


def _read_path(path: Path, where: str) -> Sequence[Record]:
    if not path.exists():
        if not path.parent.is_dir():
            raise ValueError(f"{where}: no such file: {path}; there is no directory {path.parent} either")
        names = sorted(entry.name for entry in path.parent.iterdir())
        raise ValueError(f"{where}: no such file: {path}{did_you_mean(path.name, names)}")
    if path.is_dir():
        return _read_directory(path, where)
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader(path, where)
    raise ValueError(
        f"{where}: {path} is of no known kind; known extensions: {' '.join(READERS)}; give {NOTATION}"
    )


def _read_json_lines(path: Path, where: str) -> list[Record]:
    with path.open("rb") as file:
        return _parse_lines(file, path, where)


def _read_gzip_json_lines(path: Path, where: str) -> list[Record]:
    try:
        with gzip.open(path, "rb") as file:
            return _parse_lines(cast("IO[bytes]", file), path, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: {path} is not a whole gzip file: {error}") from None


def _parse_lines(file: IO[bytes], path: Path, where: str) -> list[Record]:
    """Returns one record per line that is not blank; the whole file is parsed: a broken line shows early."""
    records = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = _parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            hint = (
                "; a JSON array must be rewritten as one object per line" if line.lstrip()[:1] == b"[" else ""
            )
            raise ValueError(f"{where}: {path}:{number}: broken JSON: {error}{hint}") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise ValueError(
                f'{where}: {path}:{number}: a line must be an object such as {{"text": "..."}}, is a {kind}'
            )
        records.append(record)
    return records


def _parse(line: str) -> object:
    """Returns the value of a line of JSON; ValueError where it has none that can be worked with."""
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    if SURROGATE_ESCAPE.search(line) and (half := SURROGATE.search(json.dumps(value, ensure_ascii=False))):
        raise ValueError(f"{half[0]!r} is half of a pair that makes one character; the other half is missing")
    return value


SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")  # those of a pair have become one character


def _read_parquet(path: Path, where: str) -> ArrowRecords:
    import pyarrow.parquet
    from datasets import Dataset

    with told_as(f"{where}: {path} cannot be read as Parquet"):
        return ArrowRecords(Dataset(pyarrow.parquet.read_table(path)), f"{where}: {path}")


def _read_directory(path: Path, where: str) -> ArrowRecords:
    from datasets import DatasetDict, load_from_disk

    with told_as(f"{where}: {path} is not a directory that datasets.save_to_disk wrote", f"give {NOTATION}"):
        dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        raise ValueError(
            f"{where}: {path} holds several data sets; name one of them: {_listed(path, dataset)}"
        )
    return ArrowRecords(dataset, f"{where}: {path}")


def _read_hub(spec: str, where: str) -> ArrowRecords:
    from datasets import load_dataset

    match = re.fullmatch(r"hub:([^:\[\]]+):([^:\[\]]+)", spec)
    if not match:
        raise ValueError(f"{where}: {spec}: must read hub:NAME[/CONFIG]:SPLIT, such as hub:owner/name:train")
    parts = match[1].split("/")
    name, config = "/".join(parts[:2]), "/".join(parts[2:])
    with told_as(f"{where}: {spec} cannot be loaded from the hub"):
        dataset = load_dataset(name, config or None, split=match[2])
    return ArrowRecords(cast("Dataset", dataset), f"{where}: {spec}")


def _listed(path: Path, names: Sequence[str] | dict) -> str:
    return ", ".join(str(path / name) for name in names)


READERS: dict[str, Callable[[Path, str], Sequence[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".jsonl.gz": _read_gzip_json_lines,
    ".json.gz": _read_gzip_json_lines,
    ".parquet": _read_parquet,
}
"""How a file is read, by the end of its name; a new format is a new row."""
