"""Whether a configuration fits a TPU slice, without having it.

    python -m rlhf_jax.preflight --config FILE --topology v5p:4x4x4 [--slices N] [--stage NAME] [--json]
                                 [--suggest [--compiles N]] [--section.option VALUE ...]

Compiles the programs of its stages for that slice with the libtpu package (pip install
'rlhf_jax[preflight]'), from shapes alone: no weights and no data are read; of a model, its config.json. Rows
have the greatest lengths that the options allow. Prints memory per chip, what chips send each other, and the
least time of a step.
Exit codes: 0 it fits; 3 it does not, and what is missing is said; 2 the configuration is wrong, or is none
for this slice; 1 the compiler refuses a program for another reason than its memory, which it says.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rlhf_jax.chips import Chip, Slices, described_devices, read_topology
from rlhf_jax.command_line import ConfigError, read_config
from rlhf_jax.config import Config
from rlhf_jax.files import to_json
from rlhf_jax.hlo import sent_by
from rlhf_jax.mesh_checks import check_mesh
from rlhf_jax.options import did_you_mean
from rlhf_jax.plan import Plan
from rlhf_jax.shape_plan import shape_plans
from rlhf_jax.sharding import axis_rules, make_mesh
from rlhf_jax.sharding_table import readable
from rlhf_jax.stage_report import Memory, ProgramReport, StageReport, as_dict, report_stage
from rlhf_jax.suggest import suggest

DOES_NOT_FIT = 3


def main(argv: list[str] | None = None) -> int:
    """Prints what the stages of a configuration need; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_jax.preflight",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--topology", required=True, help="of a slice, such as v5p:4x4x4 or v5e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="so many of it; mesh.slice has to say so too")
    parser.add_argument("--stage", default="", help="this stage alone; by default all")
    parser.add_argument("--programs", nargs="*", default=[], help="these alone, such as update")
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="find the fastest mesh, microbatches, remat and sharing that fit",
    )
    parser.add_argument("--compiles", type=int, help="the most that --suggest tries; by default 8")
    parser.add_argument("--json", action="store_true", help="print one line of JSON on stdout instead")
    args, others = parser.parse_known_args(argv)
    try:
        if args.suggest and args.programs:
            raise ValueError("--programs would be ignored: --suggest looks at all of them; leave it out")
        if args.compiles is not None and not args.suggest:
            raise ValueError("--compiles would be ignored: it is of --suggest; leave it out, or give both")
        slices = read_topology(args.topology, args.slices)
        config = read_config(others, runs=False)
        plans = chosen_plans(config, args.stage)
        check_hosts(plans, slices)
        devices = described_devices(slices)
        if args.suggest:
            read = partial(read_plans, stage=args.stage)
            found = suggest(
                read,
                others,
                devices,
                slices.chip,
                limit=8 if args.compiles is None else args.compiles,
                told=tell,
            )
            reports, flags = ([], []) if found is None else (found.reports, found.flags)
        else:
            reports, flags = compiled_stages(plans, devices, slices.chip, args.programs), []
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"rlhf_jax: {error}", file=sys.stderr)
        return 2
    if not reports and args.suggest:
        print(f"rlhf_jax: nothing that was tried fits {slices.text}", file=sys.stderr)
        return DOES_NOT_FIT
    if not reports:
        print(f"rlhf_jax: no stage has a program {' or '.join(args.programs)}", file=sys.stderr)
        return 2
    fits = all(is_fitting(report, slices.chip) for report in reports)
    if args.json:
        suggested = {"suggested_flags": flags} if args.suggest else {}
        print(to_json(in_json(reports, slices) | {"fits": fits} | suggested))
    else:
        print(slices.text)
        for report in reports:
            print(*report_lines(report, slices.chip), sep="\n")
        if flags:
            print(f"\nthe fastest of those that were tried and fit:\n  {' '.join(flags)}")
    return 0 if fits else DOES_NOT_FIT


def compiled_stages(
    plans: Sequence[Plan], devices: Sequence[Any], chip: Chip, programs: Sequence[str]
) -> list[StageReport]:
    """Returns the report of each stage that has one of these programs; none are named: of all."""
    mesh_config = plans[0].stage.mesh
    reports = []
    with axis_rules(mesh_config.axes):
        mesh = make_mesh(mesh_config, devices)
        check_mesh(plans, mesh)
        for plan in plans:

            def told(program: ProgramReport, stage: str = plan.stage.name) -> None:
                how = "does not fit" if program.has_failed else f"compiled in {program.seconds:.0f} s"
                tell(f"[{stage}] {program.name}: {how}")

            report = report_stage(
                plan, mesh, chip, wanted=lambda name: not programs or name in programs, told=told
            )
            reports += [report] if report.programs else []
    return reports


def read_plans(argv: Sequence[str], stage: str) -> list[Plan]:
    """Returns the plans that flags ask for, see `chosen_plans`."""
    return chosen_plans(read_config(list(argv), runs=False), stage)


def chosen_plans(config: Config, stage: str) -> list[Plan]:
    """Returns the plans of all stages, or of one by name; ValueError where there is no such stage."""
    plans = {plan.stage.name: plan for plan in shape_plans(config)}
    if stage and stage not in plans:
        hint = did_you_mean(stage, plans) or f"; stages: {', '.join(plans)}"
        raise ValueError(f"--stage: there is no stage {stage!r}{hint}")
    return [plans[stage]] if stage else list(plans.values())


def check_hosts(plans: Sequence[Plan], slices: Slices) -> None:
    """Raises ValueError where a stage can only run on one host, and there are several."""
    for plan in plans:
        if plan.stage.rollout.devices and slices.hosts > 1:
            raise ValueError(
                f"stage {plan.stage.name}: rollout.devices is {plan.stage.rollout.devices}, but "
                f"{slices.topology} has {slices.hosts} hosts, and weights are copied between devices of one "
                "process alone; set it to 0"
            )


def is_fitting(report: StageReport, chip: Chip) -> bool:
    """Returns whether every program of a stage has the memory that it needs."""
    return report.peak <= chip.device_memory and not any(of.has_failed for of in report.programs)


def verdict(report: StageReport, chip: Chip) -> str:
    """Returns whether a stage fits, by how much, and where it does not, what takes most."""
    most, usable = report.fullest, chip.device_memory
    if is_fitting(report, chip):
        return (
            f"fits: {most.name} needs {readable(report.peak)} of {readable(usable)}, "
            f"{readable(usable - report.peak)} are left"
        )
    parts = report.resident | {
        f"{most.name}: temporaries": most.memory.temporaries,
        f"{most.name}: arguments of its own": most.memory.arguments,
        f"{most.name}: outputs": most.memory.outputs,
    }
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    most_of_it = ", ".join(f"{name} {readable(parts[name])}" for name in largest)
    return (
        f"does not fit: {most.name} needs {readable(report.peak)} of {readable(usable)}, "
        f"{readable(report.peak - usable)} too many; the largest parts: {most_of_it}. {advice(largest[0])}"
    )


def advice(largest: str) -> str:
    """Returns which options make the largest part smaller.

    Args:
        largest: a role, such as "frozen base", or a program and what it needs, "update: temporaries".
    """
    program, is_of_program, _ = largest.partition(": ")
    if is_of_program and "rollout" in program:
        return "Set or lower rollout.slots, or divide weights and cache by more chips (mesh.tensor)"
    if program == "update":
        return (
            "Set or lower microbatch_size or model.logprob_chunk, set model.remat to full or offload, or "
            "divide rows and tokens by more chips (mesh.fsdp, mesh.sequence)"
        )
    if is_of_program:
        chunk = ", set or lower model.logprob_chunk" if program in ("score", "evaluate") else ""
        return f"Lower batch_size{chunk}, or divide rows and tokens by more chips (mesh.fsdp, mesh.sequence)"
    if largest == "frozen base":
        return "Divide it by more chips (mesh.fsdp, mesh.tensor), or take a smaller model"
    if largest == "frozen teacher":  # which each step needs
        return (
            "Store it in bfloat16 (model.frozen_dtype), divide it by more chips (mesh.fsdp, mesh.tensor), or "
            "take a smaller one"
        )
    if largest.startswith("frozen"):
        return (
            "Store it in bfloat16 or in the host's memory (model.frozen_dtype, model.frozen_memory), or "
            "divide it by more chips (mesh.fsdp)"
        )
    return (
        "Divide it by more chips (mesh.fsdp, mesh.tensor), store moments in bfloat16 (optimizer.state_dtype)"
        ", or train adapters (lora.rank, model.sharing: hydra)"
    )


def tell(line: str) -> None:
    """Prints a line on stderr: how far it has come."""
    print(line, file=sys.stderr, flush=True)


def report_lines(report: StageReport, chip: Chip) -> Iterator[str]:
    """Yields tables of a stage's memory, collectives and phases."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    yield f"\n== stage {report.name} on {sizes}: {verdict(report, chip)}"
    yield f"   all the while: {', '.join(f'{name} {readable(of)}' for name, of in report.resident.items())}"
    yield ""
    yield from columns(
        ("program", "compiled in", "own arguments", "outputs", "temporaries", "code", "peak", "on the host"),
        [(of.name, f"{of.seconds:.1f} s", *map(readable, _sizes(of.memory))) for of in report.programs],
    )
    sent = [
        (of.name, kind, axes, readable(total) + " a pass of a loop" * is_open)
        for of in report.programs
        for is_open in (False, True)
        for (kind, axes), total in sent_by(one for one in of.collectives if bool(one.loop) == is_open).items()
    ]
    if sent:
        yield ""
        yield from columns(("program", "chips together", "along", "each sends in a call"), sent)
    yield ""
    yield from columns(
        ("phase", "TFLOP", "GB of memory", "GB sent", "matrix", "memory", "network", "bound"),
        [
            (
                name,
                *(f"{x:.3g}" for x in (of.work.flops / 1e12, of.work.bytes / 1e9, of.sent / 1e9)),
                *(f"{x:.3g} s" for x in (of.matrix, of.memory, of.network)),
                of.bound,
            )
            for name, of in report.phases.items()
        ],
    )
    yield f"   a step takes {sum(of.seconds for of in report.phases.values()):.3g} s at least"


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a table of texts, of which the first of a row stands on the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *others = zip(row, widths, strict=True)
        yield "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])


def _sizes(memory: Memory) -> tuple[int, ...]:
    return memory.arguments, memory.outputs, memory.temporaries, memory.code, memory.peak, memory.host


def in_json(reports: Sequence[StageReport], slices: Slices) -> dict:
    """Returns the reports, fit for JSON."""
    return {
        "topology": slices.topology,
        "slices": slices.number,
        "accelerator_type": slices.accelerator_type,
        "chips": slices.chips,
        "hosts": slices.hosts,
        "hbm_bytes": slices.chip.hbm // slices.chip.devices,
        "usable_bytes": slices.chip.device_memory,
        "stages": {
            report.name: as_dict(report)
            | {"fits": is_fitting(report, slices.chip), "verdict": verdict(report, slices.chip)}
            for report in reports
        },
    }


if __name__ == "__main__":
    sys.exit(main())
