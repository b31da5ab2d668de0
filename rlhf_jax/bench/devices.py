"""Runs a configuration on one and on several CPU devices and compares: `python -m rlhf_jax.bench.devices`.

With --processes N the devices are divided over so many processes, and one process of all devices is what they
are compared with.

A JSON line per stage: over all steps the largest difference of any figure, relative to max(1, |figure|),
and that of each loss and evaluation alone. Flags that are not its own go to the program. A stage that samples
parts at the first token that falls on a tie, and is another run from there on.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_jax.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID

Figures = dict[str, dict[int, dict[str, float]]]  # stage -> step -> name -> value
UNCOMPARED = ("stage", "step", "time")


def main() -> None:
    """Runs the configuration once in each way, in processes and directories of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    args, flags = parser.parse_known_args()
    ways = ((args.devices if args.processes > 1 else 1, 1), (args.devices, args.processes))
    with tempfile.TemporaryDirectory() as directory:
        expected, found = (
            run(args.config, Path(directory) / str(number), flags, *way) for number, way in enumerate(ways)
        )
    for stage, steps in expected.items():
        worst = differences(found[stage], steps)
        shown = {name: worst[name] for name in sorted(worst) if name.startswith(("loss/", "eval/"))}
        way = {"devices": args.devices, "processes": args.processes}
        line = {"bench": "devices", **way, "stage": stage, "steps": len(steps)}
        print(json.dumps(line | {"any": max(worst.values())} | shown), flush=True)


def run(config: str, directory: Path, flags: list[str], num_devices: int, num_processes: int) -> Figures:
    """Returns what a run logs, its devices divided over processes on this machine."""
    command = [
        sys.executable,
        "-m",
        "rlhf_jax.train",
        "--config",
        config,
        "--run.dir",
        str(directory),
        *flags,
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices // num_processes),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        run = {COORDINATOR: f"localhost:{free.getsockname()[1]}", NUM_PROCESSES: str(num_processes)}
    ranks = [run | {PROCESS_ID: str(rank)} for rank in range(num_processes)] if num_processes > 1 else [{}]
    started = [subprocess.Popen(command, env=environment | rank) for rank in ranks]
    for process in started:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    figures: Figures = {}
    with (directory / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            compared = {
                name: x for name, x in line.items() if name not in UNCOMPARED and not name.startswith("perf/")
            }
            figures.setdefault(line["stage"], {})[line["step"]] = compared
    return figures


def differences(
    found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]
) -> dict[str, float]:
    """Returns the largest difference of each figure over the steps, relative to max(1, |expected|)."""
    worst: dict[str, float] = {}
    for step, figures in expected.items():
        for name, value in figures.items():
            difference = abs(found[step][name] - value) / max(1.0, abs(value))
            worst[name] = max(worst.get(name, 0.0), float(f"{difference:.2g}"))
    return worst


if __name__ == "__main__":
    main()
