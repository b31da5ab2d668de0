"""LoRA adapters in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

A module of theirs has lora_A [r, in] and lora_B [out, r]: y += alpha / r B A x. tensor_tables.py says which
parameters a module has. Where it has several, as q, k and v in one tensor, they share A and each has its rows
of B; ours have an `a` each. So one A is read as the same `a` for all of them; and several `a` that differ are
written as one A of so many times the rank, each with columns of B that are zero for the others.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.batch import ADAPTER, Params
from rlhf_jax.models import hf, tensor_files
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.lora import ATTENTION, FEED_FORWARD, Lora
from rlhf_jax.models.scorers import SCORE
from rlhf_jax.models.tensor_files import NewTensor, StoredTensor
from rlhf_jax.models.tensor_tables import Layout
from rlhf_jax.models.tensors import Piece, pieces
from rlhf_jax.models.transformer import make_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's wrappers, before the names in the model
# Of each target, the part of a layer that it is in.
_GROUPS = {**dict.fromkeys(ATTENTION, "attention"), **dict.fromkeys(FEED_FORWARD, "mlp")}
# What changes the model and is not computed here.
_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_SAME_BASE = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # others of init_lora_weights change the base

logger = logging.getLogger(__name__)


class Adapter(NamedTuple):
    """What a directory holds."""

    lora: Lora
    params: Params
    """{"layers": {"attention": {"q_adapter": {"a": f32[L, D, r], "b": f32[L, r, H, h]}, ...}, "mlp": ...}}"""
    score_head: Params | None
    """kernel f32[D], bias f32[] zero; of an adapter of sequence classification."""


class _Part(NamedTuple):
    """The adapter of one parameter in one layer, as it is stored."""

    a: Piece
    b: Piece
    scale: float


class _Stored(NamedTuple):
    """An adapter in a file, checked, of which no more is read than its headers and what `_rows` needs."""

    config: Mapping[str, Any]
    files: Mapping[str, StoredTensor]
    lora: Lora
    parts: Mapping[str, list[_Part]]
    """Of each target, in the layers that have it."""
    rows: Mapping[str, np.ndarray]
    """Of each target, which of its module's rank are its own."""


def check_adapter(directory: str | os.PathLike[str], architecture: Architecture) -> tuple[Lora, bool]:
    """Returns rank, scale and targets of what `read_adapter` would return, and whether it has a score head.

    Headers alone are read, and B where several parameters lie in one tensor.

    Raises:
        ValueError: see there.
    """
    stored = _open(Path(directory), architecture)
    return stored.lora, _PREFIX + SCORE in stored.files


def read_adapter(
    directory: str | os.PathLike[str], architecture: Architecture, shardings: Params | None = None
) -> Adapter:
    """Returns the adapter in a directory, float32.

    Modules may have ranks and scales of their own (rank_pattern, alpha_pattern) and be in some layers only:
    smaller ranks are padded with zeros, which get no gradient, and scales that differ are folded into b.

    Args:
        directory: adapter_config.json and adapter_model.safetensors.
        architecture: of the model that it is for.
        shardings: of the adapter's parameters, in their tree; by default they are on one device.
    Raises:
        ValueError: a file is missing or damaged; not plain LoRA; modules that are not adapted here, or
            tensors that do not fit the architecture or the configuration.
    """
    stored = _open(Path(directory), architecture)
    if stored.config.get("lora_dropout"):
        logger.warning(
            "%s was trained with lora_dropout %s; here is none", directory, stored.config["lora_dropout"]
        )
    layers: dict[str, Params] = {}
    for target, parts in stored.parts.items():
        group, name = _GROUPS[target], target + ADAPTER
        factors = _stack(parts, stored.rows[target], stored, architecture.num_layers)
        at = {} if shardings is None else shardings["layers"][group][name]
        layers.setdefault(group, {})[name] = {key: _place(x, at.get(key)) for key, x in factors.items()}
    score = stored.files.get(_PREFIX + SCORE)
    head = None if score is None else {"kernel": jnp.asarray(score[0], jnp.float32), "bias": jnp.float32(0)}
    return Adapter(stored.lora, {"layers": layers}, head)


def write_adapter(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    lora: Lora,
    adapter: Params,
    base: str,
    *,
    revision: str = "",
    score_head: Params | None = None,
    dtype: hf.Dtype = "float32",
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors for PEFT.

    All processes call it, for parameters are gathered tensor by tensor; the first process writes.

    Args:
        directory: made where it does not exist.
        architecture: of the model that is adapted.
        lora: of the adapter.
        adapter: its parameters, sharded in any way; see `Adapter`.
        base: the name or path of the model that is adapted, from which PEFT would load it.
        revision: of that model, on the hub.
        score_head: makes it an adapter of sequence classification. The bias is left out, as in transformers.
        dtype: of the tensors written.
    Raises:
        ValueError: numbers too large for the dtype.
    """
    hf.check_range(adapter, dtype)
    leaves = _leaves(adapter)
    assert set(leaves) == set(lora.targets), (sorted(leaves), lora.targets)
    adapted = {
        module: kept
        for module, parts in _modules(architecture).items()
        if (kept := [piece for piece in parts if _target(piece) in leaves])
    }

    @cache
    def share_a(*targets: str) -> bool:
        first, *others = (hf.gather(leaves[target]["a"]) for target in targets)
        return all(np.array_equal(first, other) for other in others)

    multiples = {
        module: 1 if share_a(*map(_target, parts)) else len(parts) for module, parts in adapted.items()
    }
    tensors = [
        tensor
        for module, parts in adapted.items()
        for tensor in _new_tensors(parts, leaves, lora.rank, multiples[module])
    ]
    if score_head is not None:
        kernel = score_head["kernel"]
        tensors.append(NewTensor(_PREFIX + SCORE, (1, *kernel.shape), lambda: hf.gather(kernel)[None]))
    path, writes = Path(directory), jax.process_index() == 0
    if writes:
        path.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensor_file(path / WEIGHTS, tensors, hf.STORED_AS[dtype], writes=writes)
    if writes:
        names = _short_names(adapted, _modules(architecture))
        config = _config(lora, {names[module]: n for module, n in multiples.items()})
        config |= {
            "task_type": "CAUSAL_LM" if score_head is None else "SEQ_CLS",
            "base_model_name_or_path": base,
            "revision": revision or None,
            "modules_to_save": None if score_head is None else [SCORE.removesuffix(".weight")],
            "fan_in_fan_out": any(p.layout.inputs_first for parts in adapted.values() for p in parts),
        }
        tensor_files.write_file(path / CONFIG, [json.dumps(config, indent=2).encode() + b"\n"])


def _modules(architecture: Architecture, stored: Collection[str] = ()) -> dict[str, list[Piece]]:
    """Returns the modules that can be adapted, by their names in the model, as pieces of our weights.

    Args:
        architecture: of the model.
        stored: names of the tensors in a file; those of a model without LM head have no prefix.
    """
    layers = make_model(architecture).policy_shapes["trunk"]["layers"]
    shapes = {
        f"trunk/layers/{group}/{target}": layers[group][target].shape
        for target, group in _GROUPS.items()
        if target in layers[group] and not (group == "mlp" and architecture.num_experts)
    }
    found: dict[str, list[Piece]] = {}
    for piece in pieces(architecture, shapes, stored):
        found.setdefault(_module(piece), []).append(piece)
    return found


def _module(piece: Piece) -> str:
    return piece.tensor.removesuffix(".weight")


def _target(piece: Piece) -> str:
    return piece.parameter.rpartition("/")[2]


def _factors(weight: Piece, rank: int) -> tuple[Piece, Piece]:
    """Returns a and b of a weight in one layer, as parts of its module's A and B."""
    n = weight.layout.num_inputs
    inputs, outputs = weight.ours[:n], weight.ours[n:]
    num_outputs = weight.shape[-1 if weight.layout.inputs_first else 0]
    a = weight._replace(
        tensor=f"{_PREFIX}{_module(weight)}.lora_A.weight",
        shape=(rank, prod(inputs)),
        ours=(*inputs, rank),
        layout=Layout(n),
        num_groups=1,
        start=0,
    )
    b = weight._replace(
        tensor=f"{_PREFIX}{_module(weight)}.lora_B.weight",
        shape=(num_outputs, rank),
        ours=(rank, *outputs),
        layout=weight.layout._replace(num_inputs=1, inputs_first=False),
    )
    return a, b


def _open(directory: Path, architecture: Architecture) -> _Stored:
    config = _read_config(directory)
    if not (directory / WEIGHTS).is_file():
        raise ValueError(
            f"{directory} has no {WEIGHTS}; only safetensors are read: load an adapter that is stored "
            "otherwise with PEFT, and save it again"
        )
    files = tensor_files.open_tensor_file(directory, WEIGHTS)
    modules = _modules(architecture, [name.removeprefix(_PREFIX) for name in files])
    rslora = bool(config.get("use_rslora"))
    parts: dict[str, list[_Part]] = {}
    wanted = {_PREFIX + SCORE: (1, architecture.hidden_size)} if _PREFIX + SCORE in files else {}
    for module, weights in modules.items():
        if not any(f"{_PREFIX}{module}.lora_{factor}.weight" in files for factor in "AB"):
            continue
        rank = _of_module(config, "rank_pattern", module, config.get("r", 8))
        alpha = _of_module(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        for weight in weights:
            a, b = _factors(weight, rank)
            wanted |= {a.tensor: a.shape, b.tensor: b.shape}
            scale = alpha / (sqrt(rank) if rslora else rank)
            parts.setdefault(_target(weight), []).append(_Part(a, b, scale))
    strange = sorted(files.keys() - wanted.keys())
    if strange or not parts:
        allowed = sorted({module.rpartition(".")[2] for module in modules})
        raise ValueError(
            f"{directory / WEIGHTS} holds {', '.join(strange[:4]) or 'no adapters'}"
            f"{', ...' if strange[4:] else ''}; in the {architecture.num_layers} layers of this "
            f"{architecture.family} can be adapted: {', '.join(allowed)}; {SCORE} may be with them"
        )
    hf.check_tensors(directory, wanted, set(), files, CONFIG)
    rows = _rows(parts, files)
    targets = tuple(target for target in _GROUPS if target in rows)
    rank = max(len(rows[target]) for target in targets)
    alpha = parts[targets[0]][0].scale * (sqrt(rank) if rslora else rank)
    lora = Lora(rank=rank, alpha=float(f"{alpha:.12g}"), targets=targets, rslora=rslora)  # so that 16 is 16
    return _Stored(config, files, lora, {target: parts[target] for target in targets}, rows)


def _read_config(directory: Path) -> dict[str, Any]:
    """Returns an adapter_config.json; ValueError with all that is in it and not computed here."""
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is no adapter in PEFT's format: it has no {CONFIG}")
    config = tensor_files.read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; it must be 'LORA'")
    problems = [f"{key} is {config[key]!r}; only plain LoRA is supported" for key in _OFF if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(
            f"bias is {config['bias']!r}; it must be 'none': biases are not trained with adapters"
        )
    if config.get("init_lora_weights") not in _SAME_BASE:
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base model; make the "
            "adapter plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    saved = sorted(set(config.get("modules_to_save") or ()) - {"score", "classifier"})
    if saved:
        problems.append(f"modules_to_save has {', '.join(saved)}; only a score head can be with an adapter")
    if type(config.get("r", 8)) is not int or config.get("r", 8) < 1:
        problems.append(f"r is {config['r']!r}; it must be a positive whole number")
    if not _is_positive(config.get("lora_alpha", 8)):
        problems.append(f"lora_alpha is {config['lora_alpha']!r}; it must be a positive number")
    for key, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = config.get(key) or {}
        is_good = isinstance(pattern, dict) and all(
            isinstance(value, kind) and _is_positive(value) and _is_regex(name)
            for name, value in pattern.items()
        )
        if not is_good:
            problems.append(f"{key} is {pattern!r}; it must map module names to positive numbers")
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value > 0


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _of_module(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Returns what a pattern, of names or regular expressions, says of a module: the first that fits."""
    pattern = config.get(key) or {}
    fitting = (value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", module))
    return next(fitting, default)


def _rows(parts: Mapping[str, list[_Part]], files: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
    """Returns which of its module's rank each target has: all, or those it uses, where they do not overlap.

    The latter is how `write_adapter` writes several `a`. A target that uses none is left out.
    """
    sharing: dict[str, list[str]] = {}
    for target, of in parts.items():
        sharing.setdefault(of[0].a.tensor, []).append(target)
    rows = {}
    for targets in sharing.values():
        rank = max(part.b.ours[0] for part in parts[targets[0]])
        rows |= {target: np.arange(rank) for target in targets}
        if len(targets) == 1:
            continue
        used = np.zeros((len(targets), rank), bool)
        for uses, target in zip(used, targets, strict=True):
            for part in parts[target]:
                b = _whole(part.b, files)
                uses[: len(b)] |= np.any(b.reshape(len(b), -1) != 0, axis=1)
        if used.any() and used.sum(axis=0).max() == 1:
            rows |= {target: np.flatnonzero(uses) for uses, target in zip(used, targets, strict=True)}
    return {target: of for target, of in rows.items() if len(of)}


def _whole(piece: Piece, files: Mapping[str, StoredTensor]) -> np.ndarray:
    return piece.read(files[piece.tensor], tuple(slice(0, size) for size in piece.ours))


def _stack(parts: list[_Part], rows: np.ndarray, stored: _Stored, num_layers: int) -> dict[str, np.ndarray]:
    """Returns a [L, ..., r] and b [L, r, ...] of one target, with the scale of the whole adapter."""
    rank, scale = stored.lora.rank, stored.lora.scale
    a = np.zeros((num_layers, *parts[0].a.ours[:-1], rank), np.float32)
    b = np.zeros((num_layers, rank, *parts[0].b.ours[1:]), np.float32)
    for part in parts:
        (layer,) = part.a.at
        own = rows[rows < part.b.ours[0]]
        a[layer, ..., : len(own)] = _whole(part.a, stored.files)[..., own]
        b[layer, : len(own)] = _whole(part.b, stored.files)[own]
        b[layer] *= np.float32(part.scale / scale)
    return {"a": a, "b": b}


def _place(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return (
        jnp.asarray(x) if sharding is None else jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    )


def _leaves(adapter: Params) -> dict[str, Params]:
    layers = adapter["layers"]
    return {
        target: layers[group][target + ADAPTER]
        for target, group in _GROUPS.items()
        if target + ADAPTER in layers.get(group, {})
    }


def _new_tensors(
    weights: list[Piece], leaves: Mapping[str, Params], rank: int, multiple: int
) -> list[NewTensor]:
    """Returns A and B of a module, of `multiple` times the rank: 1, or one for each of its weights."""
    factors = [_factors(weight, rank) for weight in weights]
    first_a, first_b = factors[0]
    shape_a = (multiple * rank, first_a.shape[1])
    shape_b = (first_b.shape[0], multiple * rank)

    def columns(number: int) -> slice:
        return slice(number * rank, (number + 1) * rank) if multiple > 1 else slice(0, rank)

    def value(piece: Piece, name: str) -> np.ndarray:
        return hf.gather(leaves[_target(piece)][name][piece.at])

    def make_a() -> np.ndarray:
        tensor = np.zeros(shape_a, np.float32)
        for number, (a, _) in enumerate(factors):
            a.write(tensor[columns(number)], value(a, "a"))
        return tensor

    def make_b() -> np.ndarray:
        tensor = np.zeros(shape_b, np.float32)
        for number, (_, b) in enumerate(factors):
            b.write(tensor[:, columns(number)], value(b, "b"))
        return tensor

    return [NewTensor(first_a.tensor, shape_a, make_a), NewTensor(first_b.tensor, shape_b, make_b)]


def _short_names(adapted: Collection[str], modules: Collection[str]) -> dict[str, str]:
    """Returns what PEFT shall call each adapted module: the last part of its name, or two of them.

    PEFT adapts all modules whose names end so: GPT-2 has attn.c_proj and mlp.c_proj.
    """

    def ending(module: str, parts: int) -> str:
        return ".".join(module.split(".")[-parts:])

    others = {ending(module, 1) for module in modules if module not in adapted}
    return {module: ending(module, 2 if ending(module, 1) in others else 1) for module in adapted}


def _config(lora: Lora, multiples: Mapping[str, int]) -> dict[str, Any]:
    """Returns what adapter_config.json says of the numbers: ranks, and alphas of the same scale."""

    def alpha(multiple: int) -> float:
        exact = float(f"{lora.alpha * (sqrt(multiple) if lora.rslora else multiple):.12g}")
        return int(exact) if exact.is_integer() else exact

    least = min(multiples.values())
    others = {name: n for name, n in multiples.items() if n != least}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": list(multiples),
        "r": least * lora.rank,
        "lora_alpha": alpha(least),
        "rank_pattern": {name: n * lora.rank for name, n in others.items()},
        "alpha_pattern": {name: alpha(n) for name, n in others.items()},
        "use_rslora": lora.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }
