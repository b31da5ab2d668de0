"""Makes a step of a stage on a CPU: `python -m tests.contract.live_memory CONFIG STAGE [FLAG VALUE ...]`.

Prints a line of JSON: the bytes that preflight says its update needs, and those that the process then had
more than before: the arrays, and what the program needs while it runs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.chips import CHIPS
from rlhf_jax.command_line import read_config
from rlhf_jax.lowering import stage_calls
from rlhf_jax.preflight import chosen_plans
from rlhf_jax.sharding import make_mesh
from rlhf_jax.stage_report import report_stage


def resident(name: str) -> int:
    """Returns the bytes of memory of this process: now (VmRSS), or at most since the last reset (VmHWM)."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def filled(x: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.ones(x.shape, x.dtype)


def main(config: str, stage: str, flags: list[str]) -> None:
    """Prints both numbers."""
    (plan,) = chosen_plans(read_config(["--config", config, *flags], runs=False), stage)
    mesh = make_mesh(plan.stage.mesh, jax.devices()[:1])
    report = report_stage(plan, mesh, CHIPS["v5e"], wanted=lambda name: name == "update")
    call = stage_calls(plan, mesh).calls["update"]
    program = call.lower().compile()
    before = resident("VmRSS")
    arguments = jax.block_until_ready(jax.tree.map(filled, (*call.resident, *call.own)))
    Path("/proc/self/clear_refs").write_text("5")
    jax.block_until_ready(program(*arguments))
    memory = report.programs[0].memory
    print(json.dumps({"told": memory.peak - memory.code, "live": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
