"""What a run computes on and with: hosts, devices, memory, mesh, and the versions and files of its code."""

from __future__ import annotations

import hashlib
import platform
import socket
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.agreement import exchanged
from rlhf_jax.chips import GIB, chip_of, peak_of
from rlhf_jax.distributed import num_processes

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "transformers",
)
"""Whose versions have to be the same on all processes."""
SHOWN = ("jax", "jaxlib", "libtpu")
"""Those of the first line of a run."""
_PACKAGE = Path(__file__).parent


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that are installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # libtpu, where there is no TPU
            continue
    return found


def code_sums(directory: Path = _PACKAGE) -> dict[str, str]:
    """Returns a checksum of each Python file of the program, by its path in the package."""
    return {path.relative_to(directory).as_posix(): _sum(path) for path in sorted(directory.rglob("*.py"))}


def module_sums(names: Iterable[str]) -> dict[str, str]:
    """Returns a checksum of the file of each imported module, by its name; of those without one, nothing."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: _sum(Path(file)) for name, file in files.items() if file}


def code_version(directory: Path = _PACKAGE) -> str:
    """Returns eight digits that change with any Python file of the program."""
    return hashlib.sha256(repr(code_sums(directory)).encode()).hexdigest()[:8]


def num_chips(devices: int, kind: str) -> float:
    """Returns of how many chips so many devices of a kind are; a device that is no TPU counts as one."""
    chip = chip_of(kind)
    return devices / (chip.devices if chip else 1)


def machine_lines(mesh: Mesh) -> list[str]:
    """Returns in two lines what the run computes on, and with what; all processes call it.

    Args:
        mesh: over all devices.
    """
    hosts, device = len(set(exchanged(socket.gethostname()))), jax.local_devices()[0]
    of_kind = f"{mesh.size} x {device.device_kind}"
    if (chips := num_chips(mesh.size, device.device_kind)) != mesh.size:
        of_kind += f" ({chips:g} chips)"
    if memory := device_memory(device):
        of_kind += f" of {memory / GIB:.1f} GiB"
    over = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    is_unknown = device.platform != "cpu" and peak_of(device.device_kind) is None
    without_peak = "; its peak is not known: no MFU, no MBU" if is_unknown else ""
    found = versions()
    shown = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
    return [
        f"machine: {_counted(hosts, 'host')}, {_counted(num_processes(), 'process')}, {of_kind}, "
        f"mesh {over or 'of one device'}{without_peak}",
        f"code: rlhf_jax {code_version()}, {shown}, Python {found['Python']}",
    ]


def device_memory(device: Any) -> int:
    """Returns the bytes that programs can have of a device, as it says itself or its kind is known to have.

    0 where neither is known, as of a CPU.
    """
    stats = device.memory_stats() or {}
    chip = chip_of(device.device_kind)
    return int(stats.get("bytes_limit") or (chip.device_memory if chip else 0))


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _counted(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number} {what if number == 1 else plural}"
