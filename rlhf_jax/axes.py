"""The mesh's axes, the logical axes that models name, and the one table from these to those; without JAX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rlhf_jax.config import MeshConfig
from rlhf_jax.options import did_you_mean

Table = Mapping[str, tuple[str, ...]]
"""{logical axis: the mesh axes that divide it, the outermost first}; () where every device has it whole."""

MESH_AXES = tuple(MeshConfig().sizes)

LOGICAL_AXES: Table = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "length": ("sequence",),
    "whole_length": (),  # the tokens of a row, within attention
    "attention_heads": ("tensor", "sequence"),  # heads there
    "positions": (),
    "layers": (),
    "embed": ("fsdp",),  # the model's width, as a dimension of a matrix
    "width": (),  # the model's width, of activations and of vectors: these are too small to shard
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "vocab": ("tensor",),
    "rank": (),  # of adapters
    "score_heads": (),  # of an ensemble
}
"""What is in force where `mesh.axes` says nothing else."""

ACTIVATIONS = (
    ("batch", "length", "width"),
    ("batch", "length", "heads", "head_dim"),
    ("batch", "length", "kv_heads", "head_dim"),
)
"""The layouts that models ask for of activations."""

WHOLE = "none"
"""How `mesh.axes` writes that no mesh axis divides a logical one."""


def axis_table(overrides: Mapping[str, str | Sequence[str]]) -> Table:
    """Returns LOGICAL_AXES with other mesh axes for some of its names, as `mesh.axes` gives them."""
    return {**LOGICAL_AXES, **{name: _as_tuple(given) for name, given in overrides.items()}}


def axis_problems(overrides: Mapping[str, str | Sequence[str]]) -> list[tuple[str, str]]:
    """Returns (logical axis, what is wrong with what `mesh.axes` gives for it), each once and in order."""
    found = []
    for name, given in overrides.items():
        axes = _as_tuple(given)
        if name not in LOGICAL_AXES:
            near = did_you_mean(name, LOGICAL_AXES) or f"; known: {', '.join(LOGICAL_AXES)}"
            found.append((name, f"no logical axis of the models{near}"))
        found += [
            (
                name,
                f"must name axes of the mesh ({', '.join(MESH_AXES)}) or {WHOLE!r}, got {axis!r}"
                f"{did_you_mean(axis, (*MESH_AXES, WHOLE))}",
            )
            for axis in axes
            if axis not in MESH_AXES
        ]
        if len(set(axes)) < len(axes):
            found.append((name, f"must name each axis of the mesh once, got {list(axes)}"))
    table = axis_table(overrides)
    for names in ACTIVATIONS:
        for first, second, axis in collisions(table, names):
            owner = second if second in overrides else first
            both = f"activations have {first!r} and {second!r}, which would both be on mesh.{axis}"
            found.append((owner, both))
    return list(dict.fromkeys(found))


def collisions(table: Table, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (logical axis, another, the mesh axis that both are on) of the dimensions of one array."""
    for i, second in enumerate(names):
        for first in names[:i]:
            for axis in table[second]:
                if axis in table[first]:
                    yield first, second, axis


def _as_tuple(given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return () if given == WHOLE else (given,)
    return tuple(given)
