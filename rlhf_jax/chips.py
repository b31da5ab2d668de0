"""The TPU chips, and their slices by the names that libtpu and Google Cloud have for them.

| chip | bf16 TFLOP/s | HBM | its GB/s | links x GB/s, one way | data-centre network | hosts have |
|---|---|---|---|---|---|---|
| v4  | 275  | 32 GiB  | 1228 | 6 x 50  | 6.25 GB/s | 4 |
| v5e | 197  | 16 GiB  | 819  | 4 x 50  | 3.1 GB/s  | 8, in larger slices 4 |
| v5p | 459  | 96 GiB  | 2765 | 6 x 100 | 6.25 GB/s | 4 |
| v6e | 918  | 32 GiB  | 1638 | 4 x 100 | 12.5 GB/s | 8, in larger slices 4 |
| 7x  | 2307 | 192 GiB | 7380 | 6 x 100 | 12.5 GB/s | 4 |

Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x (peaks, HBM, interconnect of a chip in
both directions over its ports, network of a host or pod over its chips); v4's links and memory:
arXiv:2304.01433 table 4; v5p's memory, v4's network: jax-ml.github.io/scaling-book/tpus. What
programs can have of HBM is what the compiler of libtpu 0.0.52 says of one that needs more.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf_jax.options import did_you_mean

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip has; rates are per second."""

    name: str
    """As topologies of libtpu begin."""
    kinds: tuple[str, ...]
    """What JAX may call the kind of its devices: jax/_src/tpu_info.py."""
    accelerator: str
    """As accelerator types of Google Cloud begin."""
    counts_cores: bool
    """The number of an accelerator type is that of TensorCores, two of a chip, and not that of chips."""
    devices: int = 1
    """What JAX sees of a chip; each has its part of all the rest."""
    hbm: int
    """Bytes."""
    usable_hbm: int
    """Bytes that libtpu's compiler lets programs have of it: it says so of one that needs more."""
    hbm_rate: float
    bf16_flops: float
    links: int
    link_rate: float
    """Bytes, one way."""
    network_rate: float
    """Bytes to other slices."""
    host_chips: int
    """Of a host in a slice of several hosts."""
    one_host: int
    """The most chips of a slice that is one host."""

    @property
    def device_memory(self) -> int:
        """Returns the bytes that programs can have of what JAX sees as a device."""
        return self.usable_hbm // self.devices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kinds=("TPU v4",), accelerator="v4", counts_cores=True, hbm=32 * GIB,
            usable_hbm=int(30.75 * GIB), hbm_rate=1228e9, bf16_flops=275e12, links=6, link_rate=50e9,
            network_rate=6.25e9, host_chips=4, one_host=4,
        ),
        Chip(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"), accelerator="v5litepod", counts_cores=False,
            hbm=16 * GIB, usable_hbm=int(15.75 * GIB), hbm_rate=819e9, bf16_flops=197e12, links=4,
            link_rate=50e9, network_rate=3.125e9, host_chips=4, one_host=8,
        ),
        Chip(
            name="v5p", kinds=("TPU v5", "TPU v5p"), accelerator="v5p", counts_cores=True, hbm=96 * GIB,
            usable_hbm=int(95.73 * GIB), hbm_rate=2765e9, bf16_flops=459e12, links=6, link_rate=100e9,
            network_rate=6.25e9, host_chips=4, one_host=4,
        ),
        Chip(
            name="v6e", kinds=("TPU v6 lite", "TPU v6e"), accelerator="v6e", counts_cores=False, hbm=32 * GIB,
            usable_hbm=int(31.24 * GIB), hbm_rate=1638e9, bf16_flops=918e12, links=4, link_rate=100e9,
            network_rate=12.5e9, host_chips=4, one_host=8,
        ),
        Chip(
            name="tpu7x", kinds=("TPU7x",), accelerator="tpu7x", counts_cores=True, devices=2, hbm=192 * GIB,
            usable_hbm=int(189.48 * GIB), hbm_rate=7380e9, bf16_flops=2307e12, links=6,
            link_rate=100e9, network_rate=12.5e9, host_chips=4, one_host=4,
        ),
    )
}  # fmt: skip


class Peak(NamedTuple):
    """The most that a device does in a second."""

    flops: float
    """Of products in bfloat16."""
    bytes: float
    """Of its memory, read and written."""


GPUS = {
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3350e9),
    "NVIDIA H200": Peak(989e12, 4800e9),
}
"""By what JAX calls them, without sparsity: NVIDIA's data sheets of A100, H100 and H200 (SXM)."""


def chip_of(kind: str) -> Chip | None:
    """Returns the TPU chip that devices of a kind, as JAX calls it, are or are parts of; None: of none."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def peak_of(kind: str) -> Peak | None:
    """Returns the most that a device of a kind does in a second; None where that is not known."""
    if (chip := chip_of(kind)) is None:
        return GPUS.get(kind)
    return Peak(chip.bf16_flops / chip.devices, chip.hbm_rate / chip.devices)


class Slices(NamedTuple):
    """So many slices of a shape."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips of each dimension of a slice."""
    number: int = 1

    @property
    def topology(self) -> str:
        """Returns libtpu's name of a slice, such as v5p:4x4x2."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Returns the chips of all slices."""
        return math.prod(self.shape) * self.number

    @property
    def accelerator_type(self) -> str:
        """Returns Google Cloud's name of a slice.

        v5p-32 has 32 cores, which are 16 chips; v5litepod-16 has 16 chips.
        """
        chips = math.prod(self.shape)
        return f"{self.chip.accelerator}-{2 * chips if self.chip.counts_cores else chips}"

    @property
    def hosts(self) -> int:
        """Returns the hosts of all slices."""
        chips = math.prod(self.shape)
        is_one = chips <= self.chip.one_host
        return (1 if is_one else -(-chips // self.chip.host_chips)) * self.number

    @property
    def text(self) -> str:
        """Returns in words what is rented: chips, hosts, HBM, and both names."""
        chip, several = self.chip, f"{self.number} slices of " if self.number > 1 else ""
        cores = " (the number counts TensorCores, 2 of a chip)" if chip.counts_cores else ""
        return (
            f"{several}{self.topology} = {self.accelerator_type}{cores}: {self.chips} "
            f"chip{'s' if self.chips > 1 else ''} on {self.hosts} host{'s' if self.hosts > 1 else ''}, "
            f"{self.chips * chip.hbm / GIB:,.0f} GiB of HBM"
        )


def read_topology(name: str, number: int = 1) -> Slices:
    """Returns so many slices of a topology, such as v5p:4x4x2.

    Raises:
        ValueError: a chip that is not known, or a shape that it has not; the message says what is allowed.
    """
    chip_name, _, shape = name.partition(":")
    known = ", ".join(CHIPS)
    if chip_name not in CHIPS:
        by_type = {chip.accelerator: chip.name for chip in CHIPS.values()}
        meant = by_type.get(chip_name.split("-")[0])
        hint = f"; topologies of {meant} read {meant}:{_EXAMPLES[meant]}" if meant else ""
        hint = hint or did_you_mean(chip_name, CHIPS) or f"; known: {known}"
        raise ValueError(f"--topology {name}: {chip_name!r} is no TPU chip{hint}")
    chip = CHIPS[chip_name]
    dimensions = chip.links // 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != dimensions - 1:
        raise ValueError(
            f"--topology {name}: a slice of {chip_name} has {dimensions} dimensions: write it as "
            f"{chip_name}:{_EXAMPLES[chip_name]}"
        )
    if number < 1:
        raise ValueError(f"--slices {number}: must be at least 1")
    return Slices(chip, tuple(map(int, shape.split("x"))), number)


_EXAMPLES = {name: "4x4x4" if chip.links == 6 else "4x4" for name, chip in CHIPS.items()}


def described_devices(slices: Slices) -> Sequence[Any]:
    """Returns descriptions of the devices of slices that need not be there, to make a mesh of.

    JAX then computes on the CPU in this process, whatever else there is.

    Raises:
        ValueError: libtpu is not installed, or knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several such processes at once
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {"num_slices": slices.number} if slices.number > 1 else {}
    if slices.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores are a device, as on the machine
    if math.prod(slices.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=slices.topology, **options).devices
    except RuntimeError as error:
        raise ValueError(
            f"--topology {slices.topology}: libtpu does not describe it: {str(error).splitlines()[0]} "
            "(pip install 'rlhf_jax[preflight]' brings libtpu, for Linux on x86-64)"
        ) from None
