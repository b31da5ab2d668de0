"""A Google Cloud on this machine: state in a directory, hosts as directories; fake_gcloud.py is its command.

What it plays is in plot.json there: `waits`, how many looks at a new queued resource find it waiting;
`create_errors`, what the next attempts to create are answered; `errors`, pairs of words and what the next
call with these is answered; `fails`, why it fails instead of becoming active; `unreachable`, for how many
calls a host does not answer ssh; `outages`, how many looks get no answer.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

COMMAND = Path(__file__).with_name("fake_gcloud.py")


class Cloud:
    """Queued resources, instance groups and their hosts below a directory."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = directory = Path(directory)
        self.hosts = directory / "hosts"
        self.calls_file = directory / "calls.txt"
        self.state_file = directory / "state.json"
        self.plot_file = directory / "plot.json"

    def install(self, workers: int, bin_dir: Path, env: dict[str, str] | None = None, **plot: Any) -> None:
        """Puts gcloud into `bin_dir`, and what hosts find first on their PATH beside their homes.

        A minute is half a second there.

        Args:
            workers: hosts of a slice.
            bin_dir: comes first on PATH.
            env: variables of every host; {index} in them becomes its number.
            plot: see above.
        """
        self.hosts.mkdir(parents=True)
        bin_dir.mkdir(parents=True, exist_ok=True)
        words = shlex.join([sys.executable, "-S", "-E", str(COMMAND)])
        script(bin_dir / "gcloud", f'FAKE_CLOUD={shlex.quote(str(self.directory))} exec {words} "$@"')
        script(self.directory / "bin" / "hostname", 'echo "$FAKE_HOST"')
        script(self.directory / "bin" / "sleep", '[[ $1 != 60 ]] || set -- 0.5; exec /bin/sleep "$1"')
        self.plot_file.write_text(json.dumps({"workers": workers, "env": env or {}, **plot}))
        self.state_file.write_text(json.dumps({"queued": {}, "groups": {}, "templates": [], "policies": []}))
        self.calls_file.touch()

    def calls(self, *words: str) -> list[list[str]]:
        """Returns the calls so far whose words include all of these."""
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [call for call in calls if all(word in call for word in words)]

    def state(self) -> dict[str, Any]:
        return json.loads(self.state_file.read_text())

    def plot(self, **changes: Any) -> dict[str, Any]:
        """Returns the plot, changed."""
        plot = json.loads(self.plot_file.read_text()) | changes
        if changes:
            replace(self.plot_file, plot)
        return plot

    def preempt(self, node: str, worker: int = 0) -> None:
        """Takes a host away, as a preemption does: its processes are killed, its disk is gone."""
        state = self.state()
        for queued in state["queued"].values():
            if node in queued["nodes"]:
                queued["nodes"][node] = "PREEMPTED"
        replace(self.state_file, state)
        self.remove(f"{node}-w-{worker}")

    def remove(self, host: str) -> None:
        """Kills the processes of a host, and deletes its home."""
        while pids := self.processes(host):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        shutil.rmtree(self.hosts / host, ignore_errors=True)

    def remove_all(self) -> None:
        for home in self.hosts.iterdir():
            self.remove(home.name)

    def processes(self, host: str) -> list[int]:
        """Returns the processes on a host that live: they have its home in their environment."""
        marker = f"HOME={self.hosts / host}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def script(path: Path, text: str) -> None:
    """Writes an executable of bash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def replace(path: Path, value: Any) -> None:
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(value))
    os.replace(new, path)
