"""Hugging Face directories (config.json and safetensors): read straight into sharded arrays, and written.

tensors.py says which tensor is which parameter; reading, checking and writing all go by it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes  # makes bfloat16 a type that numpy, and so the safetensors reader, knows
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.batch import Params
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.tensors import Piece, pieces, tied_tensors
from rlhf_jax.models.transformer import make_model

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_FLOAT_TYPES = ("F32", "BF16", "F16")
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")


def read_architecture(directory: str | os.PathLike[str]) -> Architecture:
    """Returns the architecture in a directory's config.json.

    Raises:
        ValueError: no such directory or file, not JSON, or a model that is not supported.
    """
    config = read_config(directory)
    try:
        return Architecture.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / _CONFIG}: {error}") from error


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a directory's config.json; ValueError where there is none, or it holds no JSON object."""
    path = Path(directory) / _CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is not a Hugging Face model directory: it has no {_CONFIG}")
    return _read_json(path)


def load_policy(directory: str | os.PathLike[str], architecture: Architecture, shardings: Params) -> Params:
    """Returns the policy parameters of a checkpoint, float32, each device holding and reading only its part.

    A checkpoint with tied embeddings may store the matrix as either of the two, or as both if they are equal.

    Args:
        directory: config.json and model.safetensors, or several safetensors with their index.
        architecture: the checkpoint's; see `read_architecture`.
        shardings: of the policy parameters, in their tree.
    Raises:
        ValueError: no safetensors, a file that is damaged or outside the directory, or tensors that are
            missing, not expected, of another shape or not of floats; these all in one table.
    """
    shapes = _policy_shapes(architecture)
    with ExitStack() as stack:
        files = _open_tensors(Path(directory), stack)
        expected = _checked_tensors(directory, architecture, files)

        def load(path: Any, sharding: jax.sharding.Sharding) -> jax.Array:
            parameter = jax.tree_util.keystr(path, simple=True, separator="/")
            read = _reader(expected[parameter], shapes[parameter], files)
            return jax.make_array_from_callback(shapes[parameter], sharding, read, dtype=np.float32)

        return jax.tree.map_with_path(load, shardings)


def check_policy(directory: str | os.PathLike[str], architecture: Architecture) -> None:
    """Raises what `load_policy` would raise, reading the headers alone (and a tied matrix stored twice)."""
    with ExitStack() as stack:
        _checked_tensors(directory, architecture, _open_tensors(Path(directory), stack))


def save_policy(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    params: Params,
    dtype: Literal["float32", "bfloat16"] = "float32",
    token_ids: Mapping[str, int] | None = None,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors for transformers' LlamaForCausalLM.

    All processes call it, for parameters are gathered leaf by leaf; the first process writes.

    Args:
        directory: made where it does not exist.
        architecture: of the policy.
        params: policy parameters, sharded in any way.
        dtype: of the tensors written.
        token_ids: see `Architecture.to_hf`.
    Raises:
        ValueError: parameters that are not this architecture's.
    """
    shapes = _policy_shapes(architecture)
    found = {name: leaf.shape for name, leaf in _flatten(params)}
    if found != shapes:
        rows = [(name, shapes.get(name), found.get(name)) for name in sorted(shapes.keys() | found.keys())]
        raise ValueError(_table("parameters that are not the architecture's", "parameter", rows))
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    tensors: dict[str, np.ndarray] = {}
    of_parameter = _by_parameter(pieces(architecture, shapes))
    for parameter, leaf in _flatten(params):
        values = _gather(leaf).astype(stored)
        for piece in of_parameter[parameter]:
            if piece.tensor not in tensors:
                tensors[piece.tensor] = np.empty(piece.shape, stored)
            piece.write(tensors[piece.tensor], values[piece.at])
    if jax.process_index() != 0:
        return
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / _WEIGHTS, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))
    config = json.dumps(architecture.to_hf(dtype, token_ids), indent=2)
    _replace(path / _CONFIG, lambda partial: partial.write_text(config + "\n"))
    generation = json.dumps(dict(token_ids or {}), indent=2)
    _replace(path / _GENERATION, lambda partial: partial.write_text(generation + "\n"))
    shutil.copymode(path / _CONFIG, path / _WEIGHTS)  # safetensors lets nobody else read its files


def _policy_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _flatten(make_model(architecture).policy_shapes)}


def _flatten(params: Params) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _by_parameter(of: list[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in of:
        grouped.setdefault(piece.parameter, []).append(piece)
    return grouped


def _reader(
    parts: list[Piece], shape: tuple[int, ...], files: Mapping[str, Any]
) -> Callable[[Any], np.ndarray]:
    """Returns what reads a part of a parameter; a part that several devices hold is read once."""
    of_place = {piece.at: piece for piece in parts}
    num_leading = len(parts[0].at)

    def read_one(piece: Piece, index: Any) -> np.ndarray:
        return np.asarray(piece.read(files[piece.tensor].get_slice(piece.tensor), index), np.float32)

    @cache
    def read(index: Any) -> np.ndarray:
        places = [range(*s.indices(n)) for s, n in zip(index[:num_leading], shape[:num_leading], strict=True)]
        values = np.stack([read_one(of_place[at], index[num_leading:]) for at in product(*places)])
        return values.reshape([*map(len, places), *values.shape[1:]])

    return read


def _open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Returns the open file of each tensor in a directory."""
    if not (directory / _INDEX).is_file():
        if not (directory / _WEIGHTS).is_file():
            raise ValueError(_no_safetensors(directory))
        file = _open(directory / _WEIGHTS, stack)
        return dict.fromkeys(file.keys(), file)
    content = _read_json(directory / _INDEX)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{directory / _INDEX} has no weight_map from tensors to file names")
    outside = [name for name in set(weight_map.values()) if not _is_plain_name(name)]
    if outside:
        raise ValueError(f"{directory / _INDEX} names files outside its directory: {sorted(outside)}")
    opened = {name: _open(directory / name, stack) for name in sorted(set(weight_map.values()))}
    lost = [
        f"{tensor} ({name})" for tensor, name in weight_map.items() if tensor not in set(opened[name].keys())
    ]
    if lost:
        raise ValueError(
            f"{directory / _INDEX} names tensors that their files do not have: {', '.join(lost[:8])}"
        )
    return {tensor: opened[name] for tensor, name in weight_map.items()}


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}; is it complete? Copy or download it again") from error


def _no_safetensors(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory"
    others = sorted(path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern))
    if not others:
        return f"{directory} has no {_WEIGHTS} and no {_INDEX}"
    return (
        f"{directory} has weights only as {', '.join(others)}. Such files can run code when they are opened; "
        "only safetensors are read. Where you trust them, convert them once, with torch and transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
    )


def _tied_name(names: tuple[str, str], files: Mapping[str, Any], directory: str | os.PathLike[str]) -> str:
    """Returns which tensor, of embedding and LM head, holds the one matrix of a tied checkpoint."""
    embedding, lm_head = names
    if lm_head not in files:
        return embedding
    if embedding not in files:
        return lm_head
    stored = [files[name].get_tensor(name) for name in names]
    if not np.array_equal(*stored):
        raise ValueError(
            f"{directory}: its {_CONFIG} says tie_word_embeddings, but {embedding} and {lm_head} differ; "
            "set tie_word_embeddings to false there if the model is not tied"
        )
    return embedding


def _checked_tensors(
    directory: str | os.PathLike[str], architecture: Architecture, files: Mapping[str, Any]
) -> dict[str, list[Piece]]:
    """Returns the tensors of each parameter; ValueError where those of the files are not these."""
    expected = pieces(architecture, _policy_shapes(architecture))
    needless: set[str] = set()
    if architecture.tie_embeddings:
        names = tied_tensors(architecture)
        stored = _tied_name(names, files, directory)
        expected = [p._replace(tensor=stored) if p.tensor in names else p for p in expected]
        needless = set(names) - {stored}
    _check_tensors(directory, expected, needless, files)
    return _by_parameter(expected)


def _check_tensors(
    directory: str | os.PathLike[str], expected: list[Piece], needless: set[str], files: Mapping[str, Any]
) -> None:
    """Raises ValueError with a table of all tensors that are missing, too many, mis-shaped or not floats."""
    wanted = {piece.tensor: piece.shape for piece in expected}
    rows: list[tuple[str, Any, Any]] = []
    for name in sorted(wanted.keys() | files.keys()):
        stored = files[name].get_slice(name) if name in files else None
        shape = tuple(stored.get_shape()) if stored else None
        if name in wanted and shape != wanted[name]:
            rows.append((name, wanted[name], shape))
        elif name in wanted and stored and stored.get_dtype() not in _FLOAT_TYPES:
            rows.append((name, " or ".join(_FLOAT_TYPES), stored.get_dtype()))
        elif name not in wanted and name not in needless and not name.endswith("rotary_emb.inv_freq"):
            rows.append((name, None, shape))
    if rows:
        raise ValueError(_table(f"the tensors in {directory} are not those of its {_CONFIG}", "tensor", rows))


def _table(title: str, first: str, rows: list[tuple[str, Any, Any]]) -> str:
    """Returns a table of the rows whose last two entries differ; None is nothing."""
    cells = [(first, "expected", "found")]
    cells += [(name, str(want or "-"), str(got or "-")) for name, want, got in rows if want != got]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    lines = [f"  {name:<{widths[0]}}  {want:<{widths[1]}}  {got}" for name, want, got in cells]
    return "\n".join([f"{title}:", *lines])


def _gather(leaf: Any) -> np.ndarray:
    """Returns the whole array on the host, on every process."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path` and moves it there, so that a half-written one never has its name."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)
