"""Makes golden/export.npz: what transformers generates greedily from a directory that rlhf_jax exported.

Two environments, for the project has no torch:

    python -m tests.parity.make_export_golden export DIRECTORY     # the project's: writes it with save_policy
    python -m tests.parity.make_export_golden generate DIRECTORY   # with torch: reads it, writes the golden

RLHF_JAX_TEST_DATA must hold tinystories656k. The golden keeps a digest of the exported tensors: the test
then tells that what transformers loaded is what is exported now.
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "export.npz"
PROMPTS = (
    "One day, a little girl named Lily",
    "Tom had a big red ball. He",
    "The sun was shining and the",
    "Once upon a time, there was a",
)
NEW_TOKENS = 48


def digest(tensors: dict[str, np.ndarray]) -> str:
    """Returns a digest of names, shapes and bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].shape} {tensors[name].dtype}".encode())
        state.update(np.ascontiguousarray(tensors[name]).tobytes())
    return state.hexdigest()


def export(directory: Path) -> None:
    """Writes tinystories656k again, through our parameters, as float32."""
    import jax
    from transformers import AutoTokenizer

    from rlhf_jax.config import MeshConfig
    from rlhf_jax.models import hf
    from rlhf_jax.models.transformer import make_model
    from rlhf_jax.sharding import make_mesh, param_shardings

    source = Path(os.environ["RLHF_JAX_TEST_DATA"]) / "tinystories656k"
    architecture = hf.read_architecture(source)
    model = make_model(architecture)
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    shardings = param_shardings(mesh, model.policy_axes, model.policy_shapes)
    params = hf.load_policy(source, architecture, shardings)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    hf.save_policy(directory, architecture, params, token_ids=ids)
    tokenizer.save_pretrained(directory)


def generate(directory: Path) -> None:
    """Completes the prompts with transformers and writes the golden."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    completions = np.full((len(PROMPTS), NEW_TOKENS), -1, np.int32)
    for row, prompt in enumerate(PROMPTS):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        out = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0][len(ids) :]
        completions[row, : len(out)] = out.numpy()
    np.savez(GOLDEN, completions=completions, digest=digest(load_file(directory / "model.safetensors")))


if __name__ == "__main__":
    {"export": export, "generate": generate}[sys.argv[1]](Path(sys.argv[2]))
