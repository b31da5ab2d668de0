"""Compiles a stage of a benchmark's shape for TPUs that are not there, and prints what each chip needs.

    python -m rlhf_jax.bench.aot --topology v5e:4x4 --shape 1b --algorithm sft --rows 32 --length 2048
        --mesh.fsdp 16 --model.dtype bfloat16 --model.remat full

The compiler is that of the libtpu package. Needs no TPU, and leaves one that is there alone. A JSON line for
each program: bytes of arguments (and of those the ones whose memory the outputs take over), of outputs and of
temporaries, per chip; collectives, with the largest array of each kind, and Pallas kernels, each counted once
where it stands in a loop.

Dotted flags set options of the stage's sections. rlhf_jax.preflight does it for configurations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jax.sharding import Mesh
from jax.stages import Lowered

from rlhf_jax import algo_config, config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Prompts, Rows, UnpairedRows
from rlhf_jax.bench.harness import NEVER, SHAPES, make_architecture, make_stage
from rlhf_jax.bench.report import commit
from rlhf_jax.chips import described_devices, read_topology
from rlhf_jax.lowering import lower_programs
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.programs import build_programs, rows_per_unit
from rlhf_jax.role_parts import role_parts
from rlhf_jax.sharding import make_mesh
from rlhf_jax.stage import stage_model

COLLECTIVES = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(?:-start)?\("
)
ARRAY = re.compile(r"[a-z]+(\d+)\w*\[([\d,]*)\]")  # such as bf16[8,128]
KERNELS = re.compile(r'%([\w-]+?)(?:\.\d+)* = .* custom-call\(.*custom_call_target="tpu_custom_call"')
MEMORY = ("argument", "alias", "output", "temp", "host_argument", "host_output", "host_temp")


def figures(lowered: Lowered) -> dict[str, Any]:
    """Returns what the compiler says of a program: seconds, bytes per chip, collectives, kernels."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    sizes = {f"{part}_bytes": getattr(memory, f"{part}_size_in_bytes") for part in MEMORY}
    return {
        "compile_s": round(seconds, 1),
        **{name: size for name, size in sizes.items() if size or not name.startswith("host")},
        "collectives": dict(sorted(Counter(kind for _, kind in COLLECTIVES.findall(text)).items())),
        "largest_collective_bytes": _largest_collectives(text),
        "kernels": dict(sorted(Counter(KERNELS.findall(text)).items())),
    }


def _largest_collectives(text: str) -> dict[str, int]:
    """Returns the bytes on a chip of the largest array that a collective of each kind gives."""
    largest: Counter[str] = Counter()
    for result, kind in COLLECTIVES.findall(text):
        for bits, sizes in ARRAY.findall(result):
            count = math.prod(int(size) for size in sizes.split(",") if size)
            largest[kind] = max(largest[kind], count * int(bits) // 8)
    return dict(sorted(largest.items()))


def stage_of_shape(args: argparse.Namespace, flags: Sequence[str]) -> config.StageConfig:
    """Returns a stage with the options of the flags, --section.option VALUE."""
    names = dict(zip(flags[::2], flags[1::2], strict=True))
    sections: dict[str, dict[str, Any]] = {
        section: {} for section in ("model", "lora", "mesh", "rollout", "optimizer")
    }
    sections[args.algorithm] = {"batch_size": args.rows}
    for name, value in names.items():
        section, option = name.removeprefix("--").split(".")
        sections[section][option] = int(value) if re.fullmatch(r"-?\d+", value) else value
    sections["rollout"].setdefault("max_new_tokens", args.completion)
    settings = algo_config.ALGORITHM_SECTIONS[args.algorithm](**sections.pop(args.algorithm))
    made = {name: getattr(config, f"{name.title()}Config")(**fields) for name, fields in sections.items()}
    return make_stage(args.algorithm, settings=settings, **made)


def lower_shape(
    stage: config.StageConfig, architecture: Architecture, length: int, mesh: Mesh
) -> dict[str, Lowered]:
    """Returns the programs of a stage on random weights, for rows of `length` tokens."""
    algorithm = ALGORITHMS[stage.algorithm]
    model = stage_model(stage, architecture)
    new = stage.rollout.max_new_tokens
    num_rows = rows_per_unit(stage, algorithm) * stage.settings.batch_size
    is_online = stage.is_online
    tokens, lengths = ((num_rows, length - new if is_online else length), (num_rows,))
    make_batch = Prompts if is_online else Rows
    batch = make_batch(*(cast(Array, ShapeDtypeStruct(x, jnp.int32)) for x in (tokens, lengths, lengths)))
    if isinstance(batch, Rows) and stage.settings.records == "unpaired":
        batch = UnpairedRows(batch, batch, cast(Array, ShapeDtypeStruct(lengths, jnp.bool_)))
    num_completion = new if is_online else length
    programs = build_programs(stage, algorithm, model, mesh, num_completion, NEVER, length - new)
    return lower_programs(programs, stage, role_parts(stage, algorithm), model, mesh, batch)


def main() -> None:
    """Prints a line for each program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, help="such as v5p:4x4x2 (of each slice)")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=0, help="0: those of the shape")
    without_teacher = [name for name in ALGORITHMS if name != "distill"]
    parser.add_argument("--algorithm", choices=without_teacher, default="sft")
    parser.add_argument("--rows", type=int, default=32, help="batch_size")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, prompt and completion")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion, of ppo")
    parser.add_argument("--programs", nargs="*", default=[], help="these alone, such as update")
    args, flags = parser.parse_known_args()
    stage = stage_of_shape(args, flags)
    mesh = make_mesh(stage.mesh, described_devices(read_topology(args.topology, args.slices)))
    architecture = make_architecture(args.shape, args.length)
    if args.layers:
        architecture = dataclasses.replace(architecture, num_layers=args.layers)
    what = {"shape": args.shape, "layers": architecture.num_layers, "rows": args.rows, "length": args.length}
    what |= {"topology": args.topology, "flags": flags}
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    for program, lowered in lower_shape(stage, architecture, args.length, mesh).items():
        if not args.programs or program in args.programs:
            line = {"bench": "aot", "commit": commit(), **what, "mesh": sizes, "stage": stage.name}
            print(json.dumps(line | {"program": program} | figures(lowered)), flush=True)


if __name__ == "__main__":
    main()
