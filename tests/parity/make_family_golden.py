"""Makes golden/families.npz and families.json: logits of tiny random models of every family, by transformers.

With torch and transformers installed, from the root of the repository:

    python -m tests.parity.make_family_golden golden             # writes both files
    python -m tests.parity.make_family_golden reload DIRECTORY   # loads what test_families.py exported there

For the second, run the tests with RLHF_JAX_KEEP_EXPORTS=DIRECTORY before. Weights are drawn by name, so that
the tests draw the same; the golden files have the names and shapes that transformers itself writes, and the
logits. Seen with torch 2.13.0 and transformers 5.24: the largest difference over all exports is in the
message of the commit that made the files.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.random_llama import random_tensors

GOLDEN = Path(__file__).parent / "golden"
ROWS, LENGTH = 2, 24
_SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 100.0}
_NEOX = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}


def _scaled(**scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": _ROPE | scaling}


def _scaled_llama(kind: str, **scaling: Any) -> dict[str, Any]:
    long = _scaled(rope_type=kind, factor=4.0, original_max_position_embeddings=16, **scaling)
    return {"model_type": "llama", **_SIZES, "head_dim": 16, **long}


# Of each variant, what differs from transformers' defaults. Windows are shorter than the rows, and so are the
# contexts before scaling.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, "head_dim": 6, "rms_norm_eps": 1e-4, **_scaled()},
    "llama_tied_biases": {
        "model_type": "llama",
        **_SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
    "llama_linear": {"model_type": "llama", **_SIZES, **_scaled(rope_type="linear", factor=3.0)},
    "llama3": _scaled_llama("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "llama_yarn": _scaled_llama("yarn", beta_fast=2.0),
    "llama_yarn_mscale": _scaled_llama("yarn", mscale=1.0, mscale_all_dim=0.5, truncate=False),
    "mistral": {"model_type": "mistral", **_SIZES, "head_dim": 6, "sliding_window": 5},
    "mistral_no_window": {"model_type": "mistral", **_SIZES, "sliding_window": None},
    "mixtral": {
        "model_type": "mixtral",
        **_SIZES,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
    },
    "qwen2": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "qwen2_windows": {
        "model_type": "qwen2",
        **_SIZES,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3_biases": {"model_type": "qwen3", **_SIZES, "head_dim": 6, "attention_bias": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        "head_dim": 8,
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "qwen3_moe_normalized": {
        "model_type": "qwen3_moe",
        **_SIZES,
        "head_dim": 8,
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "gemma": {"model_type": "gemma", **_SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        **_SIZES,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma2_no_caps": {
        "model_type": "gemma2",
        **_SIZES,
        "head_dim": 8,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 4,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_SIZES,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2_untied": {"model_type": "gpt2", **_GPT2, "n_inner": 20, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **_NEOX, "hidden_size": 32, "rotary_pct": 0.25},
    "gpt_neox_sequential": {
        "model_type": "gpt_neox",
        **_NEOX,
        "hidden_size": 32,
        "rotary_pct": 0.5,
        "rotary_emb_base": 300,
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", **_SIZES, "sliding_window": 9, "pad_token_id": 0},
    "phi3_longrope": {
        "model_type": "phi3",
        **_SIZES,
        "hidden_size": 32,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 24,
        "partial_rotary_factor": 0.75,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 2.5],
            "long_factor": [2.0, 4.0, 8.0],
        },
    },
    "olmo2": {"model_type": "olmo2", **_SIZES, "pad_token_id": 0},
    "olmo2_biases": {"model_type": "olmo2", **_SIZES, "attention_bias": True, "pad_token_id": 0},
    "smollm3": {
        "model_type": "smollm3",
        **_SIZES,
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "pad_token_id": 0,
    },
    "smollm3_windows": {
        "model_type": "smollm3",
        **_SIZES,
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "pad_token_id": 0,
        **_scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    },
}


def tokens() -> np.ndarray:
    """Returns i32[ROWS, LENGTH], the same for all models."""
    return np.random.default_rng(8).integers(0, 48, (ROWS, LENGTH)).astype(np.int32)


def write_random(directory: Path, auto_class: Any, variant: dict[str, Any]) -> dict[str, list[int]]:
    """Writes a model as transformers does, with weights drawn by name, and returns the shapes of its tensors.

    Args:
        directory: to write to.
        auto_class: of transformers.
        variant: model_type, and what differs from its defaults.
    """
    from safetensors.numpy import load_file, save_file
    from transformers import AutoConfig

    auto_class.from_config(AutoConfig.for_model(**variant)).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    shapes = {tensor: list(values.shape) for tensor, values in stored.items()}
    save_file(random_tensors(shapes), directory / "model.safetensors", metadata={"format": "pt"})
    return shapes


def read(directory: Path, auto_class: Any) -> Any:
    """Returns transformers' model of a directory, which must have the model's tensors and no others."""
    import torch

    model, info = auto_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def _logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return read(directory, AutoModelForCausalLM)(torch.from_numpy(tokens()).long()).logits.numpy()


def make() -> None:
    """Writes the golden files."""
    from transformers import AutoModelForCausalLM

    tensors, logits = {}, {}
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as made:
            tensors[name] = write_random(Path(made), AutoModelForCausalLM, variant)
            logits[name] = _logits(Path(made))
        # The weights matter: what is golden must not be nearly the same for all tokens.
        print(name, len(tensors[name]), f"{logits[name].std():.3f}")
    np.savez_compressed(GOLDEN / "families.npz", **logits)
    (GOLDEN / "families.json").write_text(json.dumps(tensors, indent=0, sort_keys=True) + "\n")


def reload(exports: Path) -> None:
    """Prints how far transformers' logits of our exports are from those of the originals."""
    golden = np.load(GOLDEN / "families.npz")
    worst = max((float(np.abs(_logits(exports / name) - golden[name]).max()), name) for name in VARIANTS)
    assert np.isfinite([golden[name] for name in VARIANTS]).all()
    print(f"{len(VARIANTS)} exports; largest difference {worst[0]:.2g} ({worst[1]})")


if __name__ == "__main__":
    make() if sys.argv[1] == "golden" else reload(Path(sys.argv[2]))
