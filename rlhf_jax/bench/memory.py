"""Compares the memory of PPO's roles by model.sharing: separate models, a shared trunk, adapters on a base.

    python -m rlhf_jax.bench.memory --topology v5e:4x4 --shape 1b --mesh.data 1 --mesh.fsdp 16
    JAX_NUM_CPU_DEVICES=8 python -m rlhf_jax.bench.memory --shape tiny --rank 4 --mesh.data 1 --mesh.fsdp 8

Prints a JSON line for each way of sharing, in bytes per device: the train state and the frozen models, which
stay; what the compiler says that rollout, score and update need besides; `peak`, the former and the most of
the latter; and its share of the first line's. With --topology for TPUs that are not there, see `bench.aot`;
without it on the devices of this process, where an iteration is made too: `live_init` and `live_update` count
the buffers of all arrays that live before and after it, on the fullest device. Weights are zeros. Dotted
flags set further options.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct
from jax.sharding import Mesh

from rlhf_jax import config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params, Prompts, TrainState
from rlhf_jax.bench.aot import stage_of_shape
from rlhf_jax.bench.harness import NEVER, SHAPES, make_architecture
from rlhf_jax.bench.report import commit
from rlhf_jax.chips import described_devices, read_topology
from rlhf_jax.lowering import abstract_roles, lower_programs
from rlhf_jax.programs import Programs, build_programs
from rlhf_jax.role_parts import role_parts
from rlhf_jax.sharding import make_mesh, place_rows
from rlhf_jax.stage import stage_model
from rlhf_jax.stage_report import bytes_of_device

MODES = ("separate", "trunk", "hydra")
PROGRAMS = ("rollout", "score", "update")


def measure(
    stage: config.StageConfig, shape: str, length: int, mesh: Mesh, programs: Sequence[str] = PROGRAMS
) -> dict[str, int]:
    """Returns bytes per device of a PPO stage: what stays, what each program needs besides, and the peak."""
    algorithm = ALGORITHMS["ppo"]
    architecture = make_architecture(shape, length)
    model = stage_model(stage, architecture)
    new, num_rows = stage.rollout.max_new_tokens, stage.settings.batch_size
    shapes = ((num_rows, length - new), (num_rows,), (num_rows,))
    prompts = Prompts(*(cast(Array, ShapeDtypeStruct(x, jnp.int32)) for x in shapes))
    parts = role_parts(stage, algorithm)
    built = build_programs(stage, algorithm, model, mesh, new, NEVER, length - new)
    trained, frozen = abstract_roles(stage, parts, model, mesh)
    state = cast(Any, built.init_state).eval_shape(trained)
    found = {"state": bytes_of_device(state), "frozen": bytes_of_device(frozen)}
    most = 0
    for name, lowered in lower_programs(built, stage, parts, model, mesh, prompts).items():
        if (group := name.removesuffix("_start")) in programs:
            memory = cast(Any, lowered.compile().memory_analysis())
            returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
            # What a rollout is given, the policy's copy and the cache, is made for it alone.
            of_its_own = memory.argument_size_in_bytes if name == "rollout" else 0
            found[group] = max(found.get(group, 0), memory.temp_size_in_bytes + returned + of_its_own)
            most = max(most, found[group])
    found["peak"] = found["state"] + found["frozen"] + most
    if mesh.devices.flat[0] in jax.devices():
        found |= iterate(built, trained, frozen, prompts, mesh)
    return found


def iterate(built: Programs, trained: Params, frozen: Params, prompts: Prompts, mesh: Mesh) -> dict[str, int]:
    """Returns the bytes that live on the fullest device before and after an iteration."""
    made = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding))
    on_host = Prompts(*(cast(Any, np.ones(x.shape, np.int32)) for x in prompts))

    def iteration(state: TrainState) -> TrainState:
        batch = place_rows(mesh, on_host)
        rollout = built.rollout(state.params, models, batch, jax.random.key(0))
        scored, _ = built.score(state.params, models, rollout)
        learned, _ = built.advantages(scored, state.aux)
        return jax.block_until_ready(built.update(state, models, learned, jax.random.key(0)))[0]

    state, models = built.init_state(made(trained)), made(frozen)
    before = live_bytes()
    state = iteration(state)
    return {"live_init": before, "live_update": live_bytes()}


def live_bytes() -> int:
    """Returns the bytes of all live arrays on the device that has most of them."""
    of_device: Counter[Any] = Counter()
    # By their shardings: to look at a shard makes an array of it, which lives.
    for array in jax.live_arrays():
        of_device.update(dict.fromkeys(array.sharding.device_set, bytes_of_device(array)))
    return max(of_device.values(), default=0)


def main() -> None:
    """Prints a line for each way of sharing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="", help="such as v5e:4x4; empty: this process's devices")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rank", type=int, default=16, help="of hydra's adapters")
    parser.add_argument("--rows", type=int, default=64, help="batch_size")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row, prompt and completion")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--sharing", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=PROGRAMS)
    args, flags = parser.parse_known_args()
    args.algorithm = "ppo"
    devices = described_devices(read_topology(args.topology)) if args.topology else jax.devices()
    first = None
    for sharing in args.sharing:
        own = ["--model.sharing", sharing, *(["--lora.rank", str(args.rank)] if sharing == "hydra" else [])]
        stage = stage_of_shape(args, [*flags, *own])
        mesh = make_mesh(stage.mesh, devices)
        found = measure(stage, args.shape, args.length, mesh, args.programs)
        first = first or found["peak"]
        what = {name: getattr(args, name) for name in ("shape", "rows", "length", "completion", "rank")}
        line = {"bench": "memory", "commit": commit(), "sharing": sharing, **what}
        line |= {"device": args.topology or devices[0].device_kind, "devices": len(devices), "flags": flags}
        print(json.dumps(line | found | {"share": round(found["peak"] / first, 3)}), flush=True)


if __name__ == "__main__":
    main()
