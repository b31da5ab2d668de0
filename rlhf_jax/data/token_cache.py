"""Tokenised records on disk, by fingerprint of all that decides them: tokenised once, then only mapped.

DIRECTORY/FINGERPRINT/ holds one .npy file per array and checksums.json. It appears whole, by one rename: runs
that tokenise the same at once write the same, and the first one stays. What does not fit its checksums is
told and made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.records import AnyRecord
from rlhf_jax.data.token_rows import TokenRows
from rlhf_jax.data.tokenize import Encoded, Losses
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.progress import watched

logger = logging.getLogger(__name__)

OFF = "none"
LEAST_TOKENS = 1_000_000
"""What is smaller is tokenised within seconds and not kept."""
CHECKSUMS = "checksums.json"
OF_ROWS = tuple(field.name for field in dataclasses.fields(TokenRows))


class TokenArrays(NamedTuple):
    """What is kept: TokenRows, and the records that they are of."""

    tokens: np.ndarray
    ends: np.ndarray
    prompt_lengths: np.ndarray
    was_cut: np.ndarray
    excluded: np.ndarray
    numbers: np.ndarray  # i64[records kept], their places among those read
    longest_prompt: np.ndarray  # i64[]
    losses: np.ndarray  # i64[fields of Losses]


def through_cache(
    directory: str,
    encode: Callable[[], Encoded],
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    settings: Iterable[object],
    *,
    where: str = "data.train",
    least_tokens: int = LEAST_TOKENS,
) -> Encoded:
    """Returns what encode() does, from the cache where it is there; put there where it is large.

    Args:
        directory: of the cache; empty: rlhf_jax/tokens in $XDG_CACHE_HOME or ~/.cache; `none`: no cache.
        encode: tokenises the records; what it returns is kept if it leaves the records as they are, or out.
        records: as read.
        tokenizer: all of it is part of the fingerprint.
        settings: whatever else decides the result; its repr is part of the fingerprint.
        where: key and name of the source, for what is shown while it lasts.
        least_tokens: fewer are not kept.
    """
    if directory == OFF:
        return encode()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = (Path(directory) if directory else home / "rlhf_jax" / "tokens") / fingerprint(
        records, tokenizer, settings, where
    )
    arrays = _load(path)
    if arrays is None:
        encoded = encode()
        arrays = _arrays(encoded, records)
        if arrays is not None and len(arrays.tokens) >= least_tokens:
            _store(path, arrays)
        return encoded
    kept = [records[number] for number in arrays.numbers.tolist()]
    losses = Losses(*arrays.losses.tolist())
    return Encoded(kept, TokenRows(*arrays[: len(OF_ROWS)]), int(arrays.longest_prompt), losses)


def fingerprint(
    records: Sequence[AnyRecord], tokenizer: Tokenizer, settings: Iterable[object], where: str = "data.train"
) -> str:
    """Returns a name for what tokenising gives: of records' text, tokenizer, settings and our own code."""
    digest = hashlib.blake2b(digest_size=16)

    def add(part: object) -> None:
        digest.update(repr(part).encode("utf-8", "backslashreplace") + b"\n")

    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    add([version("tokenizers"), version("transformers"), type(tokenizer).__name__])
    add([tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.chat_template])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    add(sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str())
    add(list(settings))
    for record in watched(records, f"looking for the tokens of {where}"):
        add([getattr(record, field) for field in record._fields if field != "columns"])
    return digest.hexdigest()


def _arrays(encoded: Encoded, records: Sequence[AnyRecord]) -> TokenArrays | None:
    """Returns the encoded records as arrays; None where a record was changed, so that no number says it."""
    places = {id(record): number for number, record in enumerate(records)}
    numbers = [places.get(id(record), -1) for record in encoded.records]
    if min(numbers, default=-1) < 0:
        return None
    return TokenArrays(
        **{name: getattr(encoded.rows, name) for name in OF_ROWS},
        numbers=np.array(numbers),
        longest_prompt=np.array(encoded.longest_prompt),
        losses=np.array(encoded.losses, np.int64),
    )


def _store(path: Path, arrays: TokenArrays) -> None:
    """Writes the arrays, unless another run was faster; a cache that cannot be written is only told of."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))
        try:
            for name, array in arrays._asdict().items():
                np.save(unfinished / f"{name}.npy", array)
            sums = {name: zlib.crc32(np.ascontiguousarray(array)) for name, array in arrays._asdict().items()}
            (unfinished / CHECKSUMS).write_text(json.dumps(sums))
            try:
                os.rename(unfinished, path)
            except OSError:
                if not path.exists():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        logger.warning("tokens are not kept in data.cache_dir: %s: %s", path.parent, error.strerror or error)


def _load(path: Path) -> TokenArrays | None:
    """Returns the arrays, mapped from disk; None where there are none, or damaged ones, which are removed."""
    if not path.exists():
        return None
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in TokenArrays._fields}
        damaged = [name for name, array in arrays.items() if zlib.crc32(array) != sums[name]]
    except (OSError, ValueError, KeyError, EOFError) as error:
        damaged, arrays = [str(error)], {}
    if damaged:
        logger.warning("cached tokens in %s are damaged (%s); they are made again", path, ", ".join(damaged))
        shutil.rmtree(path, ignore_errors=True)
        return None
    return TokenArrays(**arrays)
