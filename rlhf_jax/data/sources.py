"""A specification such as `stories.jsonl[:4000]` becomes a sequence of records, dicts of columns."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, cast

from rlhf_jax.data.arrow import Record, is_path, read_directory, read_hub, read_parquet, read_stream
from rlhf_jax.data.tfds import read_tfds
from rlhf_jax.options import did_you_mean
from rlhf_jax.progress import watched

NOTATION = (
    "a .jsonl[.gz] or .parquet file, a directory of datasets.save_to_disk, hub:NAME[/CONFIG]:SPLIT, "
    "tfds:NAME[/CONFIG][:VERSION]:SPLIT, each with an optional slice such as [:4000], or "
    "stream:NAME[/CONFIG]:SPLIT[:4000]"
)


def open_source(spec: str, *, where: str = "data.train") -> Sequence[Record]:
    """Returns the records that `spec` names: a sequence with random access, at least one record long.

    Args:
        spec: see NOTATION. `hub:owner/name:split` names a data set of the hub, `hub:owner/name/config:split`
            one configuration of it; `stream:` reads the beginning of one without downloading the rest. Code
            of the hub is never run. `tfds:` names a set that is prepared. In place of NAME[/CONFIG] all three
            take a directory that begins with `/`, `.` or `~`. A slice counts as Python's, without a step.
        where: the configuration key that holds `spec`, for messages.

    Raises:
        ValueError: nothing there, a file of no known kind, a broken line or a damaged file, or no records.
    """
    path, part = _split_slice(spec, where)
    if path.startswith("stream:"):
        records, path, part = read_stream(path, part, where), spec, slice(None)
    elif path.startswith("hub:"):
        records = read_hub(path, where)
    elif path.startswith("tfds:"):
        records = read_tfds(path, where)
    else:
        records = _read_path(Path(path), where)
    if not len(records):
        raise ValueError(f"{where}: {path} holds no records; a stage needs at least one")
    taken = records[part]
    if not len(taken):
        raise ValueError(f"{where}: {spec} takes no records: there are {len(records)}; widen the slice")
    return taken


def open_sources(specs: Iterable[str], *, where: str = "data.train") -> list[Sequence[Record]]:
    """Returns the records of each source, as open_source.

    Raises:
        ValueError: a line for each source that cannot be opened.
    """
    opened, problems = [], []
    for spec in specs:
        try:
            opened.append(open_source(spec, where=where))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return opened


def local_path(spec: str) -> Path | None:
    """Returns the file or directory that a specification reads; None where it is known by a name."""
    path = re.sub(r"\[[^\[\]]*\]$", "", spec)
    kind, _, rest = path.partition(":")
    if kind not in ("hub", "stream", "tfds"):
        return Path(path)
    name = rest.rpartition(":")[0]
    return Path(name).expanduser() if is_path(name) else None


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
        return read_directory(path, where, NOTATION)
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
    for number, line in enumerate(watched(file, f"parsing {where}: {path}"), start=1):
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


READERS: dict[str, Callable[[Path, str], Sequence[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".jsonl.gz": _read_gzip_json_lines,
    ".json.gz": _read_gzip_json_lines,
    ".parquet": read_parquet,
}
"""How a file is read, by the end of its name; a new format is a new row."""
