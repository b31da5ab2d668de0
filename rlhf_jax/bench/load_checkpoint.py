"""Measures the host's memory while a checkpoint is loaded: `python -m rlhf_jax.bench.load_checkpoint`.

A random Llama in several files, 1 GiB of float32, is written to a temporary directory and read in a process
of its own, on one device, in float32 or (--kept) as the base of adapters is. On a CPU device the parameters
themselves are in the memory that is measured. The files were just written, so that the rate is one of memory,
not of a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from rlhf_jax.bench.report import commit
from rlhf_jax.config import MeshConfig
from rlhf_jax.models import hf
from rlhf_jax.models.families import from_hf
from rlhf_jax.models.transformer import make_model
from rlhf_jax.role_parts import role_shardings
from rlhf_jax.sharding import make_mesh

MIB = 2**20
LAYERS = 12  # 16 Mi parameters each, beside 64 Mi of embedding and LM head: 256 Mi, and the norms


def main() -> None:
    """Writes the checkpoint, and has it measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=get_args(hf.Dtype), default="float32", help="of the files")
    parser.add_argument("--kept", choices=get_args(hf.Dtype), default="float32", help="type in memory")
    parser.add_argument("--shard_mib", type=int, default=300, help="size of a file")
    parser.add_argument("--read", default="", help=argparse.SUPPRESS)  # what the process of its own is given
    args = parser.parse_args()
    if args.read:
        print(json.dumps(measure(Path(args.read), args.kept)), flush=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), args)
        command = [sys.executable, "-m", "rlhf_jax.bench.load_checkpoint", "--read", directory]
        command += ["--kept", args.kept]
        sys.exit(subprocess.run(command, check=False).returncode)


def write(directory: Path, args: argparse.Namespace) -> None:
    """Writes a random checkpoint."""
    architecture = from_hf(
        {
            "model_type": "llama",
            "vocab_size": 32 * args.width,
            "hidden_size": args.width,
            "intermediate_size": 4 * args.width,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.width // 64,
            "tie_word_embeddings": False,
        }
    )
    rng = np.random.default_rng(0)
    shapes = make_model(architecture).policy_shapes
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    hf.save_policy(directory, architecture, params, args.dtype, shard_bytes=args.shard_mib * MIB)


def measure(directory: Path, kept: hf.Dtype) -> dict[str, object]:
    """Returns the JSON line of loading a directory.

    `baseline_mib` is the process with JAX and a mesh before it loads, `growth_mib` the peak above that,
    `peak_mib` both together.
    """
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    architecture = hf.read_architecture(directory)
    shardings = role_shardings(make_model(architecture), mesh, "policy")
    baseline = memory_mib("VmRSS")
    start = time.perf_counter()
    params = jax.block_until_ready(hf.load_policy(directory, architecture, shardings, kept))
    seconds = time.perf_counter() - start
    peak = memory_mib("VmHWM")
    files = [path.stat().st_size for path in directory.glob("*.safetensors")]
    return {
        "bench": "load_checkpoint",
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "files": len(files),
        "files_mib": round(sum(files) / MIB),
        "kept": kept,
        "parameters_mib": round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / MIB),
        "baseline_mib": round(baseline),
        "growth_mib": round(peak - baseline),
        "peak_mib": round(peak),
        "seconds": round(seconds, 2),
        "gib_per_s": round(sum(files) / 2**30 / seconds, 2),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def memory_mib(name: str) -> float:
    """Returns VmRSS, the memory that this process has now, or VmHWM, the most that it had; of Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


if __name__ == "__main__":
    main()
