"""What a compiled program computes, read from its optimised HLO: operations, and the arrays they make."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>\(.*?\)|\S+) (?P<name>[\w-]+)\(", re.MULTILINE)
_SHAPE = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")


class Made(NamedTuple):
    """An array that an operation makes, also within a fusion; on a mesh its size on one device."""

    operation: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)


def arrays(compiled: Any) -> Iterator[Made]:
    """Yields every array of a compiled program."""
    for operation in _OPERATION.finditer(compiled.as_text()):
        for dtype, dims in _SHAPE.findall(operation["type"]):
            yield Made(operation["name"], dtype, tuple(int(d) for d in dims.split(",") if d))


def communicated(compiled: Any) -> list[Made]:
    """Returns the arrays that devices send to each other."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return [made for made in arrays(compiled) if made.operation.startswith(kinds)]
