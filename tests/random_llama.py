"""A tiny random Llama as a directory that transformers could have written; and weights drawn by name."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# Untied, with grouped queries and a head_dim that is not hidden_size / heads.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
}
_LAYER = {
    "input_layernorm.weight": (24,),
    "post_attention_layernorm.weight": (24,),
    "self_attn.q_proj.weight": (32, 24),
    "self_attn.k_proj.weight": (16, 24),
    "self_attn.v_proj.weight": (16, 24),
    "self_attn.o_proj.weight": (24, 32),
    "mlp.gate_proj.weight": (40, 24),
    "mlp.up_proj.weight": (40, 24),
    "mlp.down_proj.weight": (24, 40),
}
SHAPES = {
    "model.embed_tokens.weight": (48, 24),
    "model.norm.weight": (24,),
    "lm_head.weight": (48, 24),
} | {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in _LAYER.items()}


def random_tensors(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Returns the weights of any model, each drawn by its name; norms are near 1, or 0 where 1 is added."""
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def _draw(name: str, shape: Sequence[int]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(0.0, 0.3, shape)
    is_scale = len(shape) == 1 and name.endswith("weight")
    return (values + 0.7 if is_scale else values).astype(np.float32)


def write(directory: Path) -> Path:
    """Writes the Llama and returns its directory, of which tests may change files."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_tensors(SHAPES), directory / "model.safetensors")
    return directory


def split(directory: Path) -> tuple[Path, dict[str, str]]:
    """Cuts the Llama's file in two, with an index; returns the path of the index, and its map."""
    names = ("a.safetensors", "b.safetensors")
    tensors = load_file(directory / "model.safetensors")
    weight_map = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t, of in weight_map.items() if of == name}, directory / name)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, weight_map
