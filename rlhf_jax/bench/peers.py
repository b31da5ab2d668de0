"""Other libraries beside ours: each in a process of its own, which waits while another one is timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.models.architecture import Architecture

AGAINST = {
    "against": {
        "nargs": "*",
        "default": [],
        "metavar": "PEER=PYTHON[:PYTHONPATH]",
        "help": "libraries that do the same in turn with ours, and the interpreters that have them",
    }
}
"""The option of benchmarks that compare."""


class Peer:
    """The process of another library."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self._name = name
        self._process = process

    def __call__(self) -> None:
        """Returns when the library has done its job once more."""
        self.tell("go")

    def tell(self, line: str) -> None:
        """Returns when the library has answered a line."""
        to_peer, from_peer = self._process.stdin, self._process.stdout
        assert to_peer is not None and from_peer is not None
        print(line, file=to_peer, flush=True)
        while not (said := from_peer.readline()).startswith("peer: "):
            if not said:
                raise SystemExit(f"{self._name} ended; its messages are above")

    def peak_rss_mib(self) -> int:
        """Returns the process's peak memory so far; on Linux.

        Not what getrusage says of it, which began with the memory of the process that started it.
        """
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        return round(int(peak) / 1024)


def start_peers(
    against: Sequence[str], script: str, job: Mapping[str, Any], architecture: Architecture
) -> dict[str, Peer]:
    """Returns, for each library by its name, what makes it do its job once.

    Args:
        against: of the command line, PEER=PYTHON or PEER=PYTHON:PYTHONPATH.
        script: in this directory; reads the job as a line of JSON, and does it once for each further line.
        job: what the script is to know besides the sizes of the model.
        architecture: has these.
    Raises:
        SystemExit: where a peer ends before it is told to.
    """
    sizes = ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads")
    whole = {size: getattr(architecture, size) for size in sizes} | {"threads": os.cpu_count()} | dict(job)
    peers = [peer.partition("=") for peer in against]
    return {name: _started(name, interpreter, script, whole) for name, _, interpreter in peers}


def _started(name: str, interpreter: str, script: str, job: Mapping[str, Any]) -> Peer:
    python, _, path = interpreter.partition(":")
    environment = {variable: value for variable, value in os.environ.items() if variable != "PYTHONPATH"}
    environment |= {"PYTHONPATH": path} if path else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [python, str(Path(__file__).parent / script), name]
    peer = Peer(name, subprocess.Popen(command, env=environment, **pipes))
    peer.tell(json.dumps(job))
    return peer


def in_turn(
    ways: Mapping[str, Callable[[int], Any]], warmup: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of each way's steps, and of its first step alone.

    Args:
        ways: each makes the i-th step and returns when it is done.
        warmup: steps of each that do not count.
        steps: that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(warmup + steps):
        for name, way in ways.items():
            start = time.perf_counter()
            way(i)
            seconds[name].append(time.perf_counter() - start)
    return {name: of[warmup:] for name, of in seconds.items()}, {name: of[0] for name, of in seconds.items()}
