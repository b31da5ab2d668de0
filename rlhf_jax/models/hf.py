"""Hugging Face directories (config.json and safetensors): read straight into sharded arrays, and written.

tensors.py says which tensor is which parameter; reading, checking and writing all go by it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.batch import Params
from rlhf_jax.models import tensor_files
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.families import from_hf, to_hf
from rlhf_jax.models.tensor_files import FLOAT_TYPES, NewTensor, StoredTensor, open_tensors, read_json
from rlhf_jax.models.tensors import Piece, is_buffer, pieces, tied_tensors
from rlhf_jax.models.transformer import make_model
from rlhf_jax.progress import watched

_CONFIG, _GENERATION = "config.json", "generation_config.json"

Dtype = Literal["float32", "bfloat16", "float16"]
STORED_AS: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

Slices = tuple[slice, ...]


def read_architecture(directory: str | os.PathLike[str]) -> Architecture:
    """Returns the architecture in a directory's config.json.

    Raises:
        ValueError: no such directory or file, not JSON, or a model that is not supported.
    """
    config = read_config(directory)
    try:
        return from_hf(config)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / _CONFIG}: {error}") from error


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns a directory's config.json; ValueError where there is none, or it holds no JSON object."""
    path = Path(directory) / _CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is not a Hugging Face model directory: it has no {_CONFIG}")
    return read_json(path)


def load_policy(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    shardings: Params,
    dtype: Dtype = "float32",
) -> Params:
    """Returns the policy parameters of a checkpoint, each device holding and reading only its part.

    The host holds the parts of one parameter at a time; those of CPU devices stay where they were read to. A
    checkpoint with tied embeddings may store the matrix as either of the two, or as both if they are equal.

    Args:
        directory: config.json and model.safetensors, or several safetensors with their index.
        architecture: the checkpoint's; see `read_architecture`.
        shardings: of the policy parameters, in their tree.
        dtype: of the parameters, to which they are rounded as they are read: the host never has them wider.
    Raises:
        ValueError: no safetensors, a file that is damaged or outside the directory, or tensors that are
            missing, not expected, of another shape or not of floats; these all in one table.
    """
    files = open_tensors(Path(directory))
    expected = checked_tensors(directory, architecture, files)
    return read_parameters(directory, expected, files, shardings, dtype)


def check_policy(directory: str | os.PathLike[str], architecture: Architecture) -> None:
    """Raises what `load_policy` would raise, reading the headers alone (and a tied matrix stored twice)."""
    checked_tensors(directory, architecture, open_tensors(Path(directory)))


def save_policy(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    params: Params,
    dtype: Dtype = "float32",
    token_ids: Mapping[str, int] | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json and safetensors for transformers.

    All processes call it, for parameters are gathered tensor by tensor; the first process writes.

    Args:
        directory: made where it does not exist.
        architecture: of the policy.
        params: policy parameters, sharded in any way.
        dtype: of the tensors written.
        token_ids: see `families.to_hf`.
        shard_bytes: a larger checkpoint becomes several files of at most so many bytes, and an index.
    Raises:
        ValueError: parameters that are not this architecture's, or have numbers too large for the dtype.
    """
    check_range(params, dtype)
    tensors = new_tensors(architecture, params, make_model(architecture).policy_shapes, dtype)
    write_checkpoint(directory, tensors, to_hf(architecture, dtype, token_ids), dtype, shard_bytes)
    if jax.process_index() == 0:
        _write_json(Path(directory) / _GENERATION, token_ids or {})


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: list[NewTensor],
    config: Mapping[str, Any],
    dtype: Dtype,
    shard_bytes: int,
) -> None:
    """Writes the tensors and a config.json; all processes call it. See `save_policy`."""
    path, writes = Path(directory), jax.process_index() == 0
    if writes:
        path.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(path, tensors, STORED_AS[dtype], shard_bytes, writes=writes)
    if writes:
        _write_json(path / _CONFIG, config)


def check_range(params: Params, dtype: Dtype) -> None:
    """Raises ValueError with the parameters that float16 makes infinite; other types reach far enough."""
    if dtype != "float16":
        return
    largest = {name: max(float(leaf.max()), -float(leaf.min())) for name, leaf in _flatten(params)}
    limit = float(np.finfo(np.float16).max)
    beyond = [f"{name} (up to {value:.6g})" for name, value in largest.items() if value > limit]
    if beyond:
        raise ValueError(
            f"float16 ends at {limit:.0f}, and these parameters have larger numbers: {', '.join(beyond)}; "
            "write bfloat16 or float32"
        )


def new_tensors(
    architecture: Architecture, params: Params, abstract: Params, dtype: Dtype
) -> list[NewTensor]:
    """Returns the tensors of the parameters, none of them gathered yet; ValueError for other parameters."""
    leaves, shapes = dict(_flatten(params)), _shapes(abstract)
    found = _shapes(params)
    if found != shapes:
        rows = [(name, shapes.get(name), found.get(name)) for name in sorted(shapes.keys() | found.keys())]
        raise ValueError(_table("parameters that are not the architecture's", "parameter", rows))
    of_tensor: dict[str, list[Piece]] = {}
    for piece in pieces(architecture, shapes):
        of_tensor.setdefault(piece.tensor, []).append(piece)

    def make(parts: list[Piece]) -> np.ndarray:
        tensor = np.empty(parts[0].shape, FLOAT_TYPES[STORED_AS[dtype]])
        for piece in parts:
            piece.write(tensor, gather(leaves[piece.parameter][piece.at]))
        return tensor

    return [NewTensor(name, parts[0].shape, partial(make, parts)) for name, parts in of_tensor.items()]


def read_parameters(
    directory: str | os.PathLike[str],
    expected: Mapping[str, list[Piece]],
    files: Mapping[str, StoredTensor],
    shardings: Params,
    dtype: Dtype,
) -> Params:
    """Returns the parameters of a tree of shardings, read one after the other."""
    flat, tree = jax.tree.flatten_with_path(shardings)
    stored_as = FLOAT_TYPES[STORED_AS[dtype]]

    def load(path: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        parts = expected[jax.tree_util.keystr(path, simple=True, separator="/")]
        shape = (*(n + 1 for n in parts[-1].at), *parts[0].ours)  # the last piece is that of the last layer
        read = _reader(parts, shape, files, stored_as)
        # Waited for, so that the host does not hold many parameters that are on their way to the devices.
        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read, dtype=stored_as))

    return jax.tree.unflatten(tree, [load(*leaf) for leaf in watched(flat, f"reading {directory}")])


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _flatten(params)}


def _flatten(params: Params) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _by_parameter(of: list[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in of:
        grouped.setdefault(piece.parameter, []).append(piece)
    return grouped


def _reader(
    parts: list[Piece], shape: tuple[int, ...], files: Mapping[str, StoredTensor], dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
    """Returns what reads a part of a parameter; a part that several devices hold is read once."""
    of_place = {piece.at: piece for piece in parts}
    num_leading = len(parts[0].at)

    @cache
    def read(index: Slices) -> np.ndarray:
        places = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        out = tensor_files.empty([len(place) for place in places], dtype)
        for here, at in zip(
            np.ndindex(*out.shape[:num_leading]), product(*places[:num_leading]), strict=True
        ):
            stored = files[of_place[at].tensor]
            values = of_place[at].read(stored, index[num_leading:])
            tensor_files.copy_in_blocks(out[here], values, stored.release)
        return out

    return read


def _tied_name(
    names: tuple[str, str], files: Mapping[str, StoredTensor], directory: str | os.PathLike[str]
) -> str:
    """Returns which tensor, of embedding and LM head, holds the one matrix of a tied checkpoint."""
    embedding, lm_head = names
    if lm_head not in files:
        return embedding
    if embedding not in files:
        return lm_head
    one, other = (files[name] for name in names)
    if one.dtype in FLOAT_TYPES and not tensor_files.are_equal(one, other):
        raise ValueError(
            f"{directory}: its {_CONFIG} says tie_word_embeddings, but {embedding} and {lm_head} differ; "
            "set tie_word_embeddings to false there if the model is not tied"
        )
    return embedding


def checked_tensors(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    files: Mapping[str, StoredTensor],
    others: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, list[Piece]]:
    """Returns the tensors of each parameter of a policy; ValueError where those of the files are not these.

    Args:
        directory: for messages.
        architecture: of the policy.
        files: what the directory holds.
        others: shapes of tensors by name: those of a model that has them in place of an LM head.
    """
    shapes = _shapes(make_model(architecture).policy_shapes)
    if others is not None:
        shapes = {name: shape for name, shape in shapes.items() if name.startswith("trunk/")}
    expected = pieces(architecture, shapes, files)
    needless: set[str] = set()
    if architecture.tie_embeddings:
        names = tied_tensors(architecture, files)
        stored = _tied_name(names, files, directory)
        expected = [p._replace(tensor=stored) if p.tensor in names else p for p in expected]
        needless = set(names) - {stored}
    wanted = {piece.tensor: piece.shape for piece in expected} | dict(others or {})
    check_tensors(directory, wanted, needless, files)
    return _by_parameter(expected)


def check_tensors(
    directory: str | os.PathLike[str],
    wanted: Mapping[str, tuple[int, ...]],
    needless: set[str],
    files: Mapping[str, StoredTensor],
    config: str = _CONFIG,
) -> None:
    """Raises ValueError with a table of all tensors that are missing, too many, mis-shaped or not floats."""
    rows: list[tuple[str, Any, Any]] = []
    for name in sorted(wanted.keys() | files.keys()):
        stored = files.get(name)
        shape = stored.shape if stored else None
        if name in wanted and shape != wanted[name]:
            rows.append((name, wanted[name], shape))
        elif name in wanted and stored and stored.dtype not in FLOAT_TYPES:
            rows.append((name, " or ".join(FLOAT_TYPES), stored.dtype))
        elif name not in wanted and name not in needless and not is_buffer(name):
            rows.append((name, None, shape))
    if rows:
        raise ValueError(_table(f"the tensors in {directory} are not those of its {config}", "tensor", rows))


def _table(title: str, first: str, rows: list[tuple[str, Any, Any]]) -> str:
    """Returns a table of the rows whose last two entries differ; None is nothing."""
    cells = [(first, "expected", "found")]
    cells += [(name, str(want or "-"), str(got or "-")) for name, want, got in rows if want != got]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    lines = [f"  {name:<{widths[0]}}  {want:<{widths[1]}}  {got}" for name, want, got in cells]
    return "\n".join([f"{title}:", *lines])


def gather(leaf: Any) -> np.ndarray:
    """Returns the whole array on the host, on every process."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    tensor_files.write_file(path, [json.dumps(content, indent=2).encode() + b"\n"])
