"""Makes golden/scorer.npz: logits of transformers' sequence classification, for test_scorer.py.

Two environments, for the project has no torch:

    python -m tests.parity.make_scorer_golden export DIRECTORY     # the project's: writes it with save_scorer
    python tests/parity/make_scorer_golden.py score DIRECTORY      # with torch: reads it, writes the golden

The golden also has the config.json that transformers writes of a random reward model, and the logits of that.
Seen with torch 2.13.0, transformers 5.24.0.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "scorer.npz"
PAD = 5
CONFIG = {
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
    "num_labels": 1,
    "pad_token_id": PAD,
    "bos_token_id": 3,
    "eos_token_id": 7,
}
MEAN, STD = 0.7, 2.5  # of the exported reward model's normaliser


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random weights, drawn in the order of their names."""
    rng = np.random.default_rng(17)
    return {name: rng.normal(0.0, 0.3, shapes[name]).astype(np.float32) for name in sorted(shapes)}


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [4, 12], padded with PAD on the right, and lengths [4]; one text has a PAD within."""
    rng = np.random.default_rng(18)
    tokens = rng.integers(8, CONFIG["vocab_size"], (4, 12))
    lengths = np.asarray([12, 7, 1, 9])
    tokens[np.arange(12) >= lengths[:, None]] = PAD
    tokens[3, 4] = PAD
    return tokens, lengths


def digest(directory: Path) -> str:
    """Returns a digest of a directory's tensors, however they are split into files."""
    from safetensors.numpy import load_file

    tensors = {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].shape} {tensors[name].dtype}".encode() + tensors[name].tobytes())
    return state.hexdigest()


def export(directory: Path) -> None:
    """Writes a fresh reward model with a normaliser, in several files."""
    import jax

    from rlhf_jax.models.families import from_hf
    from rlhf_jax.models.scorers import Normalizer, save_scorer
    from rlhf_jax.models.transformer import make_model

    architecture = from_hf(CONFIG | {"model_type": "llama"})
    shapes = make_model(architecture).score_shapes
    rng = np.random.default_rng(19)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
    params["score_head"]["bias"] = np.float32(0)
    ids = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    save_scorer(
        directory,
        architecture,
        params,
        "reward",
        Normalizer(MEAN, STD),
        token_ids=ids,
        shard_bytes=16_000,
    )


def score(directory: Path) -> None:
    """Scores the texts with transformers' models and writes the golden."""
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    tokens, lengths = texts()

    def logits(model: torch.nn.Module) -> np.ndarray:
        mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])
        with torch.no_grad():
            return model.eval()(torch.from_numpy(tokens), attention_mask=mask).logits[:, 0].numpy()

    theirs = AutoModelForSequenceClassification.from_config(LlamaConfig(**CONFIG))
    state = random_tensors({name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()})
    theirs.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    theirs.config.architectures = [type(theirs).__name__]
    ours, report = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    np.savez(
        GOLDEN,
        config=theirs.config.to_json_string(use_diff=False),
        names=sorted(state),
        logits=logits(theirs),
        exported_logits=logits(ours),
        digest=digest(directory),
    )


if __name__ == "__main__":
    {"export": export, "score": score}[sys.argv[1]](Path(sys.argv[2]))
