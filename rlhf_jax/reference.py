"""Log-probabilities of the reference on given records: computed once for a stage, kept in its directory.

REFERENCE/SPLIT.npz has those of all rows of a split, and of which model and records they are; what is not yet
computed is NaN. The file is written now and then and at the end, so that little is lost when a run is killed.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import watchdog
from rlhf_jax.agreement import on_first
from rlhf_jax.batch import Params, RecordRows, Rows, parts_of
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.loader import Loader
from rlhf_jax.distributed import is_first
from rlhf_jax.sharding import gathered, place_rows

SECONDS_BETWEEN_WRITES = 60.0

RefLogprobs = Callable[[Params, Rows], Array]
"""Frozen parameters, rows -> log-probabilities of their sequences' completions, f32[B], packed f32[B * S]."""


def with_reference(
    examples: Examples,
    program: RefLogprobs,
    frozen: Params,
    path: Path,
    of: str,
    *,
    batch_size: int,
    seed: int,
    mesh: Mesh,
) -> Examples:
    """Returns the examples with the reference's log-probabilities; what the file has of them is not computed.

    All processes of a run call it.

    Args:
        examples: of a split.
        program: of the stage, see `RefLogprobs`.
        frozen: the reference, or the base that is it.
        path: the file; one of another model, or of other records, is replaced.
        of: tells the model, and how it computes.
        batch_size: units of a batch, as in training.
        seed: of the run.
        mesh: where everything lies.
    """
    of = f"{of}; records {examples.fingerprint:08x}"
    shape = (len(examples), examples.rows_per_record)
    found = on_first(partial(_read, path, of, shape))
    if not np.isnan(found).any():
        return dataclasses.replace(examples, ref_logprobs=found)
    written = time.monotonic()
    for batch, units in Loader[RecordRows, Any](examples, batch_size, seed, mesh).numbered_batches():
        if not any(np.isnan(found[number]).any() for unit in units for number in unit):
            continue
        of_parts = [
            gathered(program(frozen, place_rows(mesh, rows))).reshape(batch_size, -1)
            for rows in parts_of(batch)
        ]
        for place, unit in enumerate(units):
            for k, of_part in enumerate(of_parts):
                per = shape[1] // len(of_parts)
                of_records = of_part[place, : per * len(unit)].reshape(len(unit), per)
                found[np.asarray(unit), per * k : per * (k + 1)] = of_records
        watchdog.beat()
        if is_first() and time.monotonic() - written > SECONDS_BETWEEN_WRITES:
            _write(path, of, found)
            written = time.monotonic()
    on_first(partial(_write, path, of, found))
    return dataclasses.replace(examples, ref_logprobs=found)


def _read(path: Path, of: str, shape: tuple[int, int]) -> np.ndarray:
    """Returns f32[N, rows_per_record] of a file, NaN where it has none; all NaN where it is of another."""
    if path.is_file():
        with np.load(path) as stored:
            if str(stored["of"]) == of and stored["logprobs"].shape == shape:
                return stored["logprobs"]
    return np.full(shape, np.nan, np.float32)


def _write(path: Path, of: str, logprobs: np.ndarray) -> None:
    """Writes the file: a reader finds the old one or the new one, whenever we are killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, of=of, logprobs=logprobs)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
