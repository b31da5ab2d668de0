"""Records of TensorFlow Datasets, without TensorFlow: prepared sets in a format with random access."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from rlhf_jax.data.arrow import Record, is_path
from rlhf_jax.data.third_party import told_as
from rlhf_jax.options import did_you_mean

ROWS_AT_ONCE = 1000
DEFAULT_DIRECTORY = "~/tensorflow_datasets"  # that of TFDS
INFO = "dataset_info.json"


class TfdsRecords(Sequence[Record]):
    """Records of a TFDS data source as Python values, read when they are asked for."""

    def __init__(self, source: Any, features: Any, name: str, rows: range | None = None):
        """`name` is the configuration key and the name of the source, for messages; `rows` are taken."""
        self._source = source
        self._features = features
        self._name = name
        self._rows = range(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> TfdsRecords: ...
    def __getitem__(self, index: int | slice) -> Record | TfdsRecords:
        rows = self._rows[index]
        if isinstance(rows, range):
            return TfdsRecords(self._source, self._features, self._name, rows)
        return self._read([rows])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._read(self._rows[start : start + ROWS_AT_ONCE])

    def _read(self, rows: Sequence[int]) -> list[Record]:
        with told_as(f"{self._name} cannot be read"):
            return [plain(record, self._features) for record in self._source.__getitems__(rows)]


def read_tfds(spec: str, where: str) -> TfdsRecords:
    """Returns the records of `tfds:NAME[/CONFIG][:VERSION]:SPLIT` or `tfds:DIRECTORY:SPLIT`.

    A NAME is looked for in TFDS_DATA_DIR, or ~/tensorflow_datasets; nothing is downloaded or prepared.

    Raises:
        ValueError: no such set, configuration, version or split, one that is not whole, or of tfrecord files.
    """
    name, _, split = spec.removeprefix("tfds:").rpartition(":")
    if not re.fullmatch(r"\w+", split) or not name:
        raise ValueError(
            f"{where}: {spec}: must read tfds:NAME[/CONFIG][:VERSION]:SPLIT or tfds:DIRECTORY:SPLIT, such as "
            "tfds:imdb_reviews:train"
        )
    directory = _prepared(Path(name).expanduser(), where) if is_path(name) else _find(name, where)
    import tensorflow_datasets as tfds

    with told_as(f"{where}: {directory} is no whole data set of TFDS"):
        builder = tfds.builder_from_directory(directory)
        splits = list(builder.info.splits)
        formats = builder.info.available_file_formats()
    if split not in splits:
        raise ValueError(
            f"{where}: {spec}: there is no split {split!r}; splits: {', '.join(splits)}"
            f"{did_you_mean(split, splits)}"
        )
    if not formats & tfds.core.FileFormat.with_random_access():
        stored = " and ".join(file_format.value for file_format in formats)
        raise ValueError(
            f"{where}: {directory} is stored as {stored}, which cannot be read in any order, nor without "
            f"TensorFlow; convert it once, in a Python environment of its own: {CONVERT} {directory}"
        )
    with told_as(f"{where}: {spec} cannot be read"):
        source = cast(Any, builder).as_data_source(split=split)
    return TfdsRecords(source, builder.info.features, f"{where}: {spec}")


CONVERT = (
    "pip install tensorflow tensorflow-datasets array_record apache-beam mlcroissant importlib_resources && "
    "tfds convert_format --out_file_format=array_record --dataset_version_dir"
)
PREPARE = (
    'prepare it with python -c "import tensorflow_datasets as tfds; '
    "tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
)


def plain(value: Any, feature: Any) -> Any:
    """Returns a value of TFDS as Python's: str, numbers, lists and dicts, also a sequence of dicts as a list.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8, such as those of an image.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: plain(value[name], feature[name]) for name in feature}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(value, dict):  # TFDS hands a sequence of dicts over as a dict of sequences
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        return [plain(item, feature.feature) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return _decoded(value)


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def _find(name: str, where: str) -> Path:
    """Returns the directory of a prepared set: of the version that is asked for, or else of the newest."""
    root = Path(os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIRECTORY).expanduser()
    name, _, version = name.partition(":")
    versions = _versions(root / name)
    if versions and (not version or version in versions):
        return root / name / (version or versions[-1])
    if versions:
        raise ValueError(
            f"{where}: {name} has no version {version!r} in {root / name}; there are {', '.join(versions)}"
        )
    home, _, config = name.partition("/")
    configs = [entry for entry in _directories(root / home) if _versions(root / home / entry)]
    if configs:
        problem = f"has no configuration {config!r}" if config else "has several configurations, name one"
        raise ValueError(
            f"{where}: {home} {problem}: there are {', '.join(configs)}{did_you_mean(config, configs)}"
        )
    raise ValueError(
        f"{where}: no TFDS set {name!r} is prepared in {root}, the directory that TFDS_DATA_DIR names"
        f"{did_you_mean(home, _directories(root))}; {PREPARE.format(name=name)}"
    )


def _prepared(directory: Path, where: str) -> Path:
    """Returns a directory that is given by its path."""
    if (directory / INFO).is_file():
        return directory
    below = sorted(str(info.parent) for depth in ("*", "*/*") for info in directory.glob(f"{depth}/{INFO}"))
    hint = f"; did you mean {' or '.join(below[:4])}?" if below else ""
    problem = f"has no {INFO}, and so is no prepared TFDS set" if directory.is_dir() else "is no directory"
    raise ValueError(f"{where}: {directory} {problem}{hint}")


def _versions(home: Path) -> list[str]:
    """Returns the versions that are prepared in a directory, the newest last."""
    found = [
        name
        for name in _directories(home)
        if re.fullmatch(r"\d+\.\d+\.\d+", name) and (home / name / INFO).is_file()
    ]
    return sorted(found, key=lambda name: tuple(map(int, name.split("."))))


def _directories(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
