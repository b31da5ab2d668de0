"""Files and directories that are either whole or not there, and JSON that every reader accepts."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def replace_file(path: Path, text: str) -> None:
    """Writes a file atomically: a reader finds the old text or the new one, whenever we are killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives an empty directory to fill, which becomes `path` when the block ends: `path` is whole or absent.

    What a killed run left of an earlier attempt is removed. There must be no `path` yet.
    """
    temporary = path.with_name(path.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    os.replace(temporary, path)


def to_json(value: object, indent: int | None = None) -> str:
    """Returns value as standard JSON: a number that is not finite becomes null, a numpy scalar a number."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
