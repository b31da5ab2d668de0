"""Makes golden/scorer.npz: logits of transformers' sequence classification, for test_scorer.py.

Two environments, for the project has no torch:

    python -m tests.parity.make_scorer_golden export DIRECTORY     # the project's: writes with save_scorer
    python -m tests.parity.make_scorer_golden score DIRECTORY      # with torch: reads it, writes the golden

The golden also has the config.json that transformers writes of a random reward model, and the logits of that.
Seen with torch 2.13.0, transformers 5.24.0.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests import random_llama
from tests.parity.make_export_golden import digest
from tests.parity.make_family_golden import VARIANTS, read, write_random

GOLDEN = Path(__file__).parent / "golden" / "scorer.npz"
PAD = 5
IDS = {"pad_token_id": PAD, "bos_token_id": 3, "eos_token_id": 7}
# One of each way to name trunk and class: Gemma 3's has a "Text" that its language model has not.
SCORERS = {
    name: variant | IDS | {"num_labels": 1}
    for name, variant in {
        "llama": random_llama.CONFIG,
        **{name: VARIANTS[name] for name in ("gpt2", "gpt_neox", "qwen2", "gemma2", "gemma3")},
    }.items()
}
MEAN, STD = 0.7, 2.5  # of the exported reward model's normaliser


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [4, 12], padded with PAD on the right, and lengths [4]; one text has a PAD within."""
    rng = np.random.default_rng(18)
    tokens = rng.integers(8, 48, (4, 12))
    lengths = np.asarray([12, 7, 1, 9])
    tokens[np.arange(12) >= lengths[:, None]] = PAD
    tokens[3, 4] = PAD
    return tokens, lengths


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns a directory's tensors, however they are split into files."""
    from safetensors.numpy import load_file

    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


def export(name: str, directory: Path) -> None:
    """Writes a fresh reward model with a normaliser, in several files."""
    import jax

    from rlhf_jax.models.families import from_hf
    from rlhf_jax.models.scorers import Normalizer, save_scorer
    from rlhf_jax.models.transformer import make_model

    architecture = from_hf(SCORERS[name])
    shapes = make_model(architecture).score_shapes
    rng = np.random.default_rng(19)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
    params["score_head"]["bias"] = np.float32(0)
    normalizer = Normalizer(MEAN, STD)
    save_scorer(directory, architecture, params, "reward", normalizer, token_ids=IDS, shard_bytes=4_000)


def score(exports: Path) -> None:
    """Scores the texts with transformers' models and writes the golden."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokens, lengths = texts()
    mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])

    def logits(directory: Path) -> np.ndarray:
        model = read(directory, AutoModelForSequenceClassification)
        with torch.no_grad():
            return model(torch.from_numpy(tokens), attention_mask=mask).logits[:, 0].numpy()

    golden = {}
    for name, variant in SCORERS.items():
        with tempfile.TemporaryDirectory() as made:
            theirs = Path(made)
            shapes = write_random(theirs, AutoModelForSequenceClassification, variant)
            golden |= {
                f"{name}/config": (theirs / "config.json").read_text(),
                f"{name}/shapes": json.dumps(shapes),
                f"{name}/logits": logits(theirs),
                f"{name}/exported_logits": logits(exports / name),
                f"{name}/digest": digest(tensors(exports / name)),
            }
        print(name, golden[f"{name}/logits"], golden[f"{name}/exported_logits"])
    np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    if sys.argv[1] == "export":
        for each in SCORERS:
            export(each, Path(sys.argv[2]) / each)
    else:
        score(Path(sys.argv[2]))
