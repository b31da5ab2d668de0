"""Writes golden/llama.npz: logits of transformers' Llama in float32, for test_llama.py.

Run with torch and transformers installed: RLHF_JAX_TEST_DATA=... python tests/parity/make_llama_golden.py
Seen with torch 2.13.0, transformers 5.23.0.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

# An untied Llama with grouped queries and a head_dim that is not hidden_size / heads.
RANDOM = {
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


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns the weights of the random model: drawn in the order of their names."""
    rng = np.random.default_rng(7)
    return {name: rng.normal(0.0, 0.3, shapes[name]).astype(np.float32) for name in sorted(shapes)}


def main() -> None:
    """Writes the file."""
    import torch  # here, since test_llama.py imports this module where there is no torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**RANDOM)).eval()
    state = random_tensors({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    tokens = np.random.default_rng(8).integers(0, RANDOM["vocab_size"], (2, 20))

    directory = Path(os.environ["RLHF_JAX_TEST_DATA"]) / "tinystories656k"
    story = "Once upon a time there was a little girl. She had a red ball and she liked to play in the park."
    story_tokens = np.asarray([AutoTokenizer.from_pretrained(directory)(story).input_ids])
    stories = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    columns = np.sort(np.random.default_rng(9).choice(stories.config.vocab_size, 64, replace=False))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
        story_logits = stories(torch.from_numpy(story_tokens)).logits.numpy()

    np.savez_compressed(
        Path(__file__).parent / "golden" / "llama.npz",
        tokens=tokens.astype(np.int32),
        logits=logits,
        story_tokens=story_tokens.astype(np.int32),
        story_columns=columns,
        story_logits=story_logits[0][:, columns],
        story_argmax=story_logits[0].argmax(-1),
    )


if __name__ == "__main__":
    main()
