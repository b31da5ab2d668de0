"""manifest.json of a checkpoint: what it holds, and whether its files are still what was written.

It has the caller's `info`, the shape and type of every leaf, and the size and CRC-32 of every file.
"""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import watchdog

FORMAT = 1  # of the manifest and of the leaf names
MANIFEST = "manifest.json"
MAX_MISMATCHES = 20  # lines of a mismatch table


def leaf_kind(leaf: Any) -> list:
    """Returns [type, shape] of a leaf, as the manifest has them."""
    return [str(leaf.dtype), list(leaf.shape)]


def shape_and_dtype(kind: list) -> tuple[tuple[int, ...], np.dtype]:
    """Returns what `leaf_kind` says."""
    dtype, shape = kind
    return tuple(shape), jax.numpy.dtype(dtype)


def check_match(path: Path, stored: dict[str, list], wanted: dict[str, list]) -> None:
    """Raises ValueError, with a table, where leaves differ in name, type or shape.

    Args:
        path: of the checkpoint.
        stored, wanted: {name: `leaf_kind`}.
    """

    def show(kinds: dict[str, list], name: str) -> str:
        return f"{kinds[name][0]}{kinds[name][1]}" if name in kinds else "missing"

    rows = [
        (name, show(stored, name), show(wanted, name))
        for name in sorted(stored | wanted)
        if stored.get(name) != wanted.get(name)
    ]
    if not rows:
        return
    shown = [("leaf", "in the checkpoint", "in this run"), *rows[:MAX_MISMATCHES]]
    widths = [max(len(row[column]) for row in shown) for column in range(2)]
    lines = [f"  {name:{widths[0]}}  {left:{widths[1]}}  {right}" for name, left, right in shown]
    if len(rows) > MAX_MISMATCHES:
        lines.append(f"  and {len(rows) - MAX_MISMATCHES} more")
    raise ValueError(
        "\n".join([f"checkpoint {path} does not fit this run; use the configuration that wrote it:", *lines])
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest. Raises OSError or ValueError."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not {"format", "info", "leaves", "files"} <= manifest.keys():
        raise ValueError(f"{path / MANIFEST} is not a manifest of a checkpoint")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path / MANIFEST} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest


def problem_of(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint; None if it may be loaded. Reads files that have changed."""
    try:
        expected = dict(read_manifest(path)["files"])
    except FileNotFoundError:
        return f"incomplete: it has no {MANIFEST}"
    except (ValueError, TypeError) as error:
        return f"unreadable {MANIFEST}: {error}"
    for name in expected:
        if not (path / name).is_file():
            return f"{name} is gone"
        stat = (path / name).stat()
        if stat.st_size != expected[name][0]:
            return f"{name} has {stat.st_size} bytes instead of {expected[name][0]}"
        if _crc_once(path / name, stat.st_mtime_ns, stat.st_size, stat.st_ino) != expected[name][1]:
            return f"{name} has a wrong checksum"
    return None


@lru_cache(maxsize=4096)
def _crc_once(path: Path, *of_file: int) -> int:
    """Returns the CRC-32 of a file, read once while its time, size and inode stay."""
    return _crc(path)


def files_of(path: Path) -> dict[str, tuple[int, int]]:
    """Returns {name: (bytes, CRC-32)} of all files of a checkpoint."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): (file.stat().st_size, _crc(file)) for file in files}


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
            watchdog.beat()
    return crc
