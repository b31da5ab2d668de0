"""Several processes of one run on this machine: started, waited for, and what each of them said."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("-m", "rlhf_jax.train")


_started: list[subprocess.Popen[str]] = []


@atexit.register
def kill_all() -> None:
    """Kills what is left of all processes: a test that fails does not wait for its own."""
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


class Result(NamedTuple):
    """How one process ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    """From the start of all of them to its end."""


class Ranks:
    """Processes of one run that are under way."""

    def __init__(
        self,
        count: int,
        args: Sequence[str | Path],
        *,
        devices: int = 2,
        env: Mapping[str, str] | Sequence[Mapping[str, str]] = (),
        flags: Sequence[Sequence[str | Path]] = (),
    ) -> None:
        """Starts them.

        Args:
            count: number of processes.
            args: of Python, such as [*TRAIN, "--config", path].
            devices: CPU devices of each.
            env: further variables, of all or of each.
            flags: further arguments, of each.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        own = [env] * count if isinstance(env, Mapping) else list(env) or [{}] * count
        more = list(flags) or [()] * count
        self.started = time.monotonic()
        self.processes: list[subprocess.Popen[str]] = []
        self._files: list[tuple[IO[str], IO[str]]] = []
        for rank in range(count):
            files = (tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))  # noqa: SIM115
            variables = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
                "RLHF_JAX_COORDINATOR": f"localhost:{port}",
                "RLHF_JAX_NUM_PROCESSES": str(count),
                "RLHF_JAX_PROCESS_ID": str(rank),
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, args), *map(str, more[rank])],
                    env=os.environ | variables | own[rank],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=files[0],
                    stderr=files[1],
                    text=True,
                )
            )
            self._files.append(files)
            _started.append(self.processes[-1])

    def said(self, rank: int) -> str:
        """Returns what a process has written to stderr until now."""
        return _text(self._files[rank][1])

    def wait(self, timeout: float = 300) -> list[Result]:
        """Returns how each of them ended; those that have not by then are killed, and it is an error."""
        seconds: dict[int, float] = {}
        while len(seconds) < len(self.processes):
            now = time.monotonic() - self.started
            seconds |= {
                rank: now
                for rank, process in enumerate(self.processes)
                if rank not in seconds and process.poll() is not None
            }
            if now > timeout:
                kill_all()
                told = "\n".join(f"--- rank {rank}:\n{self.said(rank)}" for rank in range(len(self._files)))
                raise AssertionError(f"only ranks {sorted(seconds)} ended within {timeout} s\n{told}")
            time.sleep(0.02)
        return [
            Result(process.returncode, _text(out), _text(err), seconds[rank])
            for rank, (process, (out, err)) in enumerate(zip(self.processes, self._files, strict=True))
        ]


def launch(
    count: int,
    args: Sequence[str | Path],
    *,
    devices: int = 2,
    env: Mapping[str, str] | Sequence[Mapping[str, str]] = (),
    flags: Sequence[Sequence[str | Path]] = (),
    timeout: float = 300,
) -> list[Result]:
    """Returns how each process of a run ended; see `Ranks`."""
    return Ranks(count, args, devices=devices, env=env, flags=flags).wait(timeout)


def _text(file: IO[str]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
