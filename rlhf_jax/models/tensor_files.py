"""Safetensors files: read by byte ranges, a little at a time, and written tensor by tensor.

What is read is copied from the mapped file to where it shall lie, cast and transposed on the way, and the
pages of the file are given back after each block: a host's memory peaks at what it keeps of a checkpoint.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax import watchdog

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
SHARD_BYTES = 5 * 10**9  # what transformers takes as the limit of a file

_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_BLOCK_BYTES = 2**18  # transposing 1 MiB at a time takes twice as long, and 16 MiB five times
_ALIGNMENT = 64  # of memory that JAX's CPU device takes as it is, without a copy


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: mmap.mmap
    start: int
    """The first byte in the file."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns a part as a view of the file, of a type of FLOAT_TYPES: nothing is read yet."""
        flat = np.frombuffer(self.file, FLOAT_TYPES[self.dtype], prod(self.shape), self.start)
        return flat.reshape(self.shape)[index]

    def release(self) -> None:
        """Gives the pages of the file that were read back to the system; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of model.safetensors, or of the files that the index names; only headers are read.

    Where both are there, model.safetensors is read, as by transformers. Of files that an index names, also
    tensors that it does not name are among those returned.

    Raises:
        ValueError: no safetensors; a file that is damaged, or not in the directory; an index that does not
            fit its files.
    """
    if (directory / WEIGHTS).is_file():
        return open_tensor_file(directory, WEIGHTS)
    if not (directory / INDEX).is_file():
        raise ValueError(_no_safetensors(directory))
    content = read_json(directory / INDEX)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{directory / INDEX} has no weight_map from tensors to file names")
    outside = [name for name in set(weight_map.values()) if not _is_inside(directory, name)]
    if outside:
        raise ValueError(f"{directory / INDEX} names files outside its directory: {sorted(outside)}")
    opened = {name: _open(directory / name) for name in sorted(set(weight_map.values()))}
    lost = [f"{tensor} ({name})" for tensor, name in weight_map.items() if tensor not in opened[name]]
    if lost:
        raise ValueError(
            f"{directory / INDEX} names tensors that their files do not have: {', '.join(lost[:8])}"
        )
    stored = {tensor: of[tensor] for of in opened.values() for tensor in of}
    return stored | {tensor: opened[name][tensor] for tensor, name in weight_map.items()}


def open_tensor_file(directory: Path, name: str) -> dict[str, StoredTensor]:
    """Returns the tensors of one file that is there; ValueError where it is damaged, or lies elsewhere."""
    if not _is_inside(directory, name):
        raise ValueError(
            f"{directory / name} is a link to a file outside its directory; copy it here, or give "
            "the directory that it is in"
        )
    return _open(directory / name)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array that a CPU device can use where it lies."""
    size = dtype.itemsize * prod(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_in_blocks(out: np.ndarray, values: np.ndarray, release: Callable[[], None]) -> None:
    """Copies values, a view of a file, to `out` of the same shape, and calls `release` after each block.

    A block is consecutive in the file as far as the part is.
    """
    axis = int(np.argmax(np.abs(values.strides)))
    length = values.shape[axis]
    step = max(1, _BLOCK_BYTES * length // max(1, values.nbytes))
    for start in range(0, length, step):
        block = (*[slice(None)] * axis, slice(start, start + step))
        out[block] = values[block]
        release()
        watchdog.beat()


def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Returns whether two tensors are the same in type, shape and numbers, read a block of each at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    numbers, others = one[...].reshape(-1), other[...].reshape(-1)
    step = _BLOCK_BYTES // numbers.itemsize
    for start in range(0, numbers.size, step):
        is_equal = np.array_equal(numbers[start : start + step], others[start : start + step])
        one.release()
        other.release()
        if not is_equal:
            return False
    return True


class NewTensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Gathers it on the host, in any float type."""

    def num_bytes(self, dtype: np.dtype) -> int:
        """Returns its size in the file."""
        return prod(self.shape) * dtype.itemsize


def write_tensors(
    directory: Path, tensors: Sequence[NewTensor], dtype: str, shard_bytes: int, *, writes: bool
) -> None:
    """Writes the tensors, in their order, to one file, or to several and an index.

    One tensor at a time is on the host. A file has its name when it is whole, and the index comes last; then
    weights of an earlier checkpoint are removed.

    Args:
        directory: is there.
        tensors: every process makes each of them, in the same order.
        dtype: a key of FLOAT_TYPES.
        shard_bytes: no file has more, unless it is of one tensor.
        writes: whether this process writes, or only takes part in gathering.
    """
    stored = FLOAT_TYPES[dtype]
    shards = _shards(tensors, stored, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        write_tensor_file(directory / name, shard, dtype, writes=writes)
    if not writes:
        return
    if len(shards) > 1:
        in_file = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes(stored) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(in_file.items()))}
        write_file(directory / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])
        names.append(INDEX)
    for path in (*directory.glob("model*.safetensors"), directory / INDEX):
        if path.name not in names:
            path.unlink(missing_ok=True)


def write_tensor_file(path: Path, tensors: Sequence[NewTensor], dtype: str, *, writes: bool) -> None:
    """Writes the tensors to one file; see `write_tensors`."""
    parts = _file_parts(tensors, dtype)
    if writes:
        write_file(path, parts)
    else:
        deque(parts, maxlen=0)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file beside `path` and moves it there, so that a half-written one never has its name."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.writelines(parts)
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; ValueError where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def _open(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file; safetensors checks its header, and that the file is whole."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; is it complete? Copy or download it again") from error
    (header_bytes,) = struct.unpack("<Q", mapped[:8])
    header = json.loads(mapped[8 : 8 + header_bytes])
    return {
        name: StoredTensor(of["dtype"], tuple(of["shape"]), mapped, 8 + header_bytes + of["data_offsets"][0])
        for name, of in header.items()
        if name != "__metadata__"
    }


def _is_inside(directory: Path, name: str) -> bool:
    """Returns whether a name is one of a file in the directory itself.

    The hub's cache, `MODEL/snapshots/REVISION/`, consists of links to `MODEL/blobs/`.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return False
    target, home = (directory / name).resolve(), directory.resolve()
    is_cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    return target.parent == home or is_cached


def _no_safetensors(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory"
    others = sorted(path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern))
    if not others:
        return f"{directory} has no {WEIGHTS} and no {INDEX}"
    return (
        f"{directory} has weights only as {', '.join(others)}. Such files can run code when they are opened; "
        "only safetensors are read. Where you trust them, convert them once, with torch and transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
    )


def _shards(tensors: Sequence[NewTensor], dtype: np.dtype, limit: int) -> list[list[NewTensor]]:
    """Returns the tensors in groups of at most `limit` bytes, in their order."""
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.num_bytes(dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _file_parts(tensors: Sequence[NewTensor], dtype: str) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file: length of the header, header, tensors.

    Source: https://github.com/huggingface/safetensors#format
    """
    stored = FLOAT_TYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # whoever reads it with torch looks for this
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes(stored)
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        values = tensor.make()
        assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
        yield memoryview(np.ascontiguousarray(values, stored).reshape(-1).view(np.uint8))
