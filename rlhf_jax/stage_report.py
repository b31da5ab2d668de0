"""What a stage needs of the chips that it is compiled for: memory, what they send each other, time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Mesh

from rlhf_jax.batch import Params, Rows
from rlhf_jax.chips import Chip
from rlhf_jax.hlo import Collective, Program
from rlhf_jax.lowering import Call, stage_calls
from rlhf_jax.models.transformer import SCORER, make_model
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.plan import Plan
from rlhf_jax.programs import reward_program
from rlhf_jax.role_parts import part_structs
from rlhf_jax.roofline import Phase, phase_works, phases_of
from rlhf_jax.sharding import HOST_MEMORY, batch_sharding, stage_meshes

_LACK = re.compile(r"(HLO temporaries \(|Used (?=\S+ of \S+ hbm))([\d.]+)([KMGT])")


class Memory(NamedTuple):
    """Bytes on a chip while a program runs."""

    resident: int
    """What lives all the while: parameters, optimiser state, frozen models."""
    arguments: int
    """What is made for this program: a batch; of a rollout the decoding weights and the cache."""
    outputs: int
    """What it returns, other than in the place of an argument."""
    temporaries: int
    code: int
    host: int
    """In the host's memory of the chip."""

    @property
    def peak(self) -> int:
        """Returns the bytes on the chip in all."""
        return self.resident + self.arguments + self.outputs + self.temporaries + self.code


class ProgramReport(NamedTuple):
    """A program of a stage, compiled."""

    name: str
    seconds: float
    """To compile."""
    memory: Memory
    aliased: int
    """Bytes of arguments whose place outputs take."""
    collectives: list[Collective]
    kernels: dict[str, int]
    has_failed: bool = False
    """The compiler found that it cannot fit: temporaries are what it said of them."""


class StageReport(NamedTuple):
    """A stage on a mesh."""

    name: str
    mesh: dict[str, int]
    resident: dict[str, int]
    """Bytes on a chip of what lives all the while, by name."""
    programs: list[ProgramReport]
    phases: dict[str, Phase]

    @property
    def peak(self) -> int:
        """Returns the most bytes of a chip while any program runs."""
        return max(program.memory.peak for program in self.programs)

    @property
    def fullest(self) -> ProgramReport:
        """Returns the program with the most."""
        return max(self.programs, key=lambda program: program.memory.peak)


def bytes_of_device(tree: Any, *, on_host: bool = False) -> int:
    """Returns the bytes that each device has of arrays or shape structs with shardings.

    Args:
        tree: of them.
        on_host: those that wait in the host's memory for the device; otherwise the others alone.
    """
    there = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == HOST_MEMORY) == on_host]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in there)


def report_stage(
    plan: Plan,
    every_device: Mesh,
    chip: Chip,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    told: Callable[[ProgramReport], None] = lambda program: None,
    order: Sequence[str] = (),
) -> StageReport:
    """Returns what a stage needs; compiles its programs.

    Args:
        plan: of the stage.
        every_device: mesh over all devices, which need not be there.
        chip: what they are.
        wanted: whether a program is to be compiled, by its name.
        told: called with each program when it is compiled.
        order: programs that are compiled before the others.
    """
    mesh, _ = stage_meshes(plan.stage, every_device)
    of = stage_calls(plan, mesh)
    calls, external = dict(of.calls), _external(plan, mesh)
    if external is not None:
        calls["reward"] = external[0]
    frozen = of.frozen | ({"reward model": external[1]} if external else {})
    resident = dict(_resident(of.state.params, of.state.opt_state, frozen))
    total, on_host = sum(resident.values()), bytes_of_device(frozen, on_host=True)
    programs = []
    for name in sorted(calls, key=lambda name: order.index(name) if name in order else len(order)):
        if wanted(name):
            programs.append(_compiled(name, calls[name], mesh, total, on_host))
            told(programs[-1])
    collectives = {program.name: program.collectives for program in programs}
    sizes = dict(mesh.shape)
    stepped = {
        role: tree for role, tree in of.state.params.items() if role not in plan.algorithm.without_optimizer
    }
    stepped_bytes = bytes_of_device((stepped, of.state.opt_state))
    works = phase_works(plan, sizes, stepped_bytes)
    return StageReport(
        plan.stage.name, sizes, resident, programs, phases_of(works, chip, collectives, plan.stage)
    )


def needed_bytes(error: str, arguments: int) -> int | None:
    """Returns the bytes of HBM that a program needs beside its arguments, as the compiler's error says.

    Args:
        error: its message. What it calls HLO temporaries has the arguments in it.
        arguments: their bytes.

    Returns:
        None where it is another error.
    """
    lack = _LACK.search(error)
    if "RESOURCE_EXHAUSTED" not in error or lack is None:
        return None
    needed = round(float(lack[2]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[lack[3]])
    return max(needed - arguments, 0) if lack[1].startswith("HLO") else needed


def _resident(params: Params, opt_state: Params, frozen: Params) -> Iterator[tuple[str, int]]:
    """Yields names and bytes on a chip of what lives all the while."""
    for role, tree in params.items():
        yield role, bytes_of_device(tree)
    yield "optimizer", bytes_of_device(opt_state)
    for role, tree in frozen.items():
        if size := bytes_of_device(tree):
            yield f"frozen {role}", size


def _compiled(name: str, call: Call, mesh: Mesh, resident: int, on_host: int) -> ProgramReport:
    lowered, start = call.lower(), time.perf_counter()
    own = bytes_of_device(call.own)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error), bytes_of_device(call.resident) + own)
        if needed is None:
            raise
        memory = Memory(resident, own, 0, needed, 0, on_host)
        return ProgramReport(name, time.perf_counter() - start, memory, 0, [], {}, has_failed=True)
    seconds = time.perf_counter() - start
    found = cast(Any, compiled.memory_analysis())
    program = Program(compiled.as_text() or "", dict(mesh.shape))
    memory = Memory(
        resident=resident,
        # Laid out as the compiler does where nothing else is among them.
        arguments=own if call.resident else max(own, found.argument_size_in_bytes),
        outputs=max(found.output_size_in_bytes - found.alias_size_in_bytes, 0),
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        host=on_host + found.host_temp_size_in_bytes,
    )
    return ProgramReport(
        name, seconds, memory, found.alias_size_in_bytes, program.collectives, program.kernels
    )


def _external(plan: Plan, mesh: Mesh) -> tuple[Call, Params] | None:
    """Returns the program of a reward model of its own kind, and its weights; None where there is none."""
    if plan.external is None:
        return None
    options, stage = plan.stage.model, plan.stage
    _, architecture, reader, ensemble = plan.external
    model = make_model(
        architecture, options.dtype, attention=options.attention, ensemble=ensemble, unroll=options.unroll
    )
    weights = part_structs(model, mesh, SCORER, options.role_dtype, options.frozen_memory)
    length = reader.row_length(stage.data.max_prompt_length + stage.rollout.max_new_tokens)
    assert isinstance(stage.settings, OnlineConfig)
    count = stage.settings.rows_per_rollout
    rows = Rows(
        *(
            cast(Any, jax.ShapeDtypeStruct(shape, "int32", sharding=batch_sharding(mesh)))
            for shape in ((count, length), (count,), (count,))
        )
    )
    program = reward_program(model, mesh, options.frozen_memory)
    return Call(program, ({}, {"reward": weights}), (rows,)), weights


def as_dict(report: StageReport) -> dict[str, Any]:
    """Returns a report, fit for JSON."""
    return {
        "mesh": {axis: size for axis, size in report.mesh.items() if size > 1},
        "resident_bytes": report.resident,
        "peak_bytes": report.peak,
        "programs": {
            of.name: {
                "compile_s": round(of.seconds, 1),
                **{f"{part}_bytes": getattr(of.memory, part) for part in (*Memory._fields, "peak")},
                "aliased_bytes": of.aliased,
                "fits_the_compiler": not of.has_failed,
                "collectives": [
                    {"kind": one.kind, "axes": list(one.axes), "chips": one.chips, "bytes": one.size}
                    | {"count": one.count, "sent_bytes": one.sent, "in_open_loop": bool(one.loop)}
                    for one in of.collectives
                ],
                "kernels": of.kernels,
            }
            for of in report.programs
        },
        "phases": {
            name: {"flops": of.work.flops, "bytes": of.work.bytes, "sent_bytes": of.sent}
            | {f"{what}_s": getattr(of, what) for what in ("matrix", "memory", "network")}
            | {"seconds": of.seconds, "bound": of.bound}
            for name, of in report.phases.items()
        },
    }
