"""Writes golden/llama.npz: logits of transformers' Llama in float32, for test_llama.py.

Run with torch and transformers installed: RLHF_JAX_TEST_DATA=... python -m tests.parity.make_llama_golden
Seen with torch 2.13.0, transformers 5.24.0.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.random_llama import CONFIG, random_tensors


def main() -> None:
    """Writes the file."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).eval()
    state = random_tensors({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    tokens = np.random.default_rng(8).integers(0, CONFIG["vocab_size"], (2, 20))

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
