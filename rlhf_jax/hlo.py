"""What the chips of a mesh send each other in a compiled program, read from its optimised HLO."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"\bbranch_computations=\{([^}]*)\}|\btrue_computation=(%?[\w.-]+), false_computation=(%?[\w.-]+)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_OF_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(?\[?([^\])]*)[\])]*)?\s*\{([^}]*)\}"
)
_SCATTER = "all-reduce-scatter"
_NAMED_SIZE = re.compile(r"'([^']+)'=(\d+)")
_KERNEL = re.compile(r'%([\w-]+?)(?:\.\d+)* = .* custom-call\(.*custom_call_target="tpu_custom_call"')


class Collective(NamedTuple):
    """Something that chips of a mesh do together, once or in a loop."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh, along which they are."""
    chips: int
    """That do it together."""
    size: int
    """Bytes of a chip: of an all-gather its whole result, of a reduce-scatter what it starts from."""
    count: int
    """How often it is done in a call; of what is in a loop of unknown length, in a pass of that."""
    loop: str = ""
    """The body of the innermost loop around it whose length the program alone does not tell."""

    @property
    def sent(self) -> int:
        """Returns the bytes that a chip sends in all, as a ring of chips would."""
        others = (self.chips - 1) / self.chips
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return round(self.count * share * self.size)


class _Operation(NamedTuple):
    name: str
    result: str
    kind: str
    rest: str


class Program:
    """A compiled program as text."""

    def __init__(self, text: str, mesh_shape: Mapping[str, int]) -> None:
        """Parses it.

        Args:
            text: of the optimised module, of a TPU or another device.
            mesh_shape: sizes of the axes of the mesh, whose devices in their order are the program's.
        """
        self._text = text
        self._mesh_shape = mesh_shape
        self._computations: dict[str, list[_Operation]] = defaultdict(list)
        self._entry = name = ""
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                name = match[2]
                self._entry = name if match[1] else self._entry
            elif name and (match := _OPERATION.match(line)):
                self._computations[name].append(_Operation(*match.groups()))

    @cached_property
    def collectives(self) -> list[Collective]:
        """Returns what chips do together; what is done alike in several places is one entry."""
        counts: Counter[Collective] = Counter()
        for one in self._of(self._entry):
            counts[one._replace(count=1)] += one.count
        return [one._replace(count=count) for one, count in counts.items()]

    @property
    def kernels(self) -> dict[str, int]:
        """Returns how often each Pallas kernel stands in the program."""
        return dict(sorted(Counter(_KERNEL.findall(self._text)).items()))

    def _of(self, name: str) -> list[Collective]:
        """Returns the collectives of a call of a computation.

        On a TPU one may be spread over several fusions, in which other work is done beside it: it is told by
        its channel, which outside of fusions others may have as well. A reduce-scatter is written there as an
        all-reduce and a slice of it; the fusion's name alone tells that the chips need not send the rest.
        """
        found: list[Collective] = []
        fused: set[tuple[str, str]] = set()

        def go_through(name: str, *, is_fused: bool = False) -> None:
            for operation in self._computations[name]:
                kind = operation.kind.removesuffix("-start")
                if kind in KINDS:
                    channel = _CHANNEL.search(operation.rest)
                    if is_fused and channel is not None:
                        if (part := (kind, channel[1])) in fused:
                            continue
                        fused.add(part)
                    one = self._collective(operation, kind)
                    is_scatter = kind == "all-reduce" and name.startswith(_SCATTER)
                    found.append(one._replace(kind="reduce-scatter") if is_scatter else one)
                elif operation.kind == "while":
                    trips, (body, *_) = self._trips(operation), _CALLED.findall(operation.rest)
                    found.extend(
                        one._replace(count=one.count * (trips or 1), loop=one.loop or ("" if trips else body))
                        for one in self._of(body)
                    )
                elif operation.kind == "conditional":
                    branches = [self._of(branch) for branch in _branches(operation.rest)]
                    found.extend(max(branches, key=lambda of: sum(one.sent for one in of), default=[]))
                elif operation.kind in ("fusion", "call", "async-start"):
                    for called in _CALLED.findall(operation.rest):
                        go_through(called, is_fused=is_fused or operation.kind == "fusion")

        go_through(name)
        return found

    def _trips(self, operation: _Operation) -> int | None:
        """Returns the passes of a loop; None where they depend on what is computed."""
        if known := _TRIPS.search(operation.rest):
            return int(known[1])
        match = _CONDITION.search(operation.rest)
        condition = self._computations[match[1]] if match else []
        constants = {
            of.name: int(number[1])
            for of in condition
            if of.kind == "constant" and (number := re.match(r"(\d+)\)", of.rest))
        }
        root = condition[-1] if condition else None
        if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
            return None
        # A counter from 0 on, as scans have: it is compared with a constant.
        operands = re.findall(r"%([\w.-]+)", root.rest.partition("), ")[0])
        bounds = [constants[name] for name in operands[1:2] if name in constants]
        return bounds[0] if bounds else None

    def _collective(self, operation: _Operation, kind: str) -> Collective:
        groups = _groups(operation.rest, math.prod(self._mesh_shape.values()))
        number = len(groups[0])
        arrays = [_bytes(dtype, bits, sizes) for dtype, bits, sizes in _ARRAY.findall(operation.result)]
        if operation.kind.endswith("-start") and kind != "all-reduce":
            arrays = [max(arrays)]  # beside the operand and what it waits for
        size = sum(arrays) * (number if kind == "reduce-scatter" else 1)
        if kind == "collective-permute":
            number = 2
        return Collective(kind, self._axes(groups), number, size, 1)

    def _axes(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Returns the axes along which the positions within groups differ."""
        coordinates = np.stack(
            [
                np.unravel_index([position for position, *_ in groups], self._shape),
                *(
                    np.unravel_index([group[k] for group in groups], self._shape)
                    for k in range(1, len(groups[0]))
                ),
            ]
        )  # [members, axes, groups]
        varies = (coordinates != coordinates[:1]).any(axis=(0, 2))
        return tuple(name for name, of in zip(self._mesh_shape, varies, strict=True) if of)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self._mesh_shape.values())


def _branches(rest: str) -> list[str]:
    match = _BRANCHES.search(rest)
    names = [] if match is None else (match[1] or f"{match[2]},{match[3]}").split(",")
    return [name.strip().lstrip("%") for name in names]


def _bytes(dtype: str, bits: str, sizes: str) -> int:
    count = math.prod(int(size) for size in sizes.split(",") if size)
    return count if dtype == "pred" else count * int(bits) // 8


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _groups(rest: str, total: int) -> list[list[int]]:
    """Returns the positions in the mesh of the devices of each group; of a permutation, of each pair."""
    if (match := _LISTED.search(rest)) and match[1]:
        return [_ints(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
    if match := _IOTA.search(rest):
        sizes, dims = _ints(match[1]), _ints(match[2])
        order = np.arange(math.prod(dims)).reshape(dims)
        order = order.transpose(_ints(match[3])) if match[3] else order
        return order.reshape(sizes).tolist()
    if match := _OF_MESH.search(rest):
        sizes = {name: int(size) for name, size in _NAMED_SIZE.findall(match[1])}
        within = re.findall(r"'([^']+)'", match[3])
        order = np.array(_ints(match[2])) if match[2] else np.arange(math.prod(sizes.values()))
        order = order.reshape(tuple(sizes.values()))
        order = np.moveaxis(order, [list(sizes).index(name) for name in within], range(-len(within), 0))
        return order.reshape(-1, math.prod(sizes[name] for name in within)).tolist()
    return [list(range(total))]


def sent_by(collectives: Iterable[Collective]) -> dict[tuple[str, str], int]:
    """Returns the bytes that a chip sends by kind and axes, such as ("all-gather", "fsdp")."""
    sums: Counter[tuple[str, str]] = Counter()
    for one in collectives:
        sums[one.kind, "+".join(one.axes)] += one.sent
    return dict(sorted(sums.items()))
