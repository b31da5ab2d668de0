"""How the mesh divides a stage's parameters and optimiser state, and what of it a device holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Mesh

from rlhf_jax.lowering import abstract_roles
from rlhf_jax.models.transformer import SCORER, make_model
from rlhf_jax.plan import Plan
from rlhf_jax.role_parts import part_structs
from rlhf_jax.sharding import HOST_MEMORY
from rlhf_jax.stage import stage_programs, teacher_model

HEADER = ("role", "parameter", "shape", "type", "axes", "on the mesh", "bytes", "a device")


class Bytes(NamedTuple):
    """What arrays need in all if each is counted once, on a device, and in the host's memory of a device."""

    whole: int
    device: int
    host: int


class Layout(NamedTuple):
    """Where a stage's arrays lie."""

    roles: Mapping[str, tuple[Any, Any]]
    """By role: the tree of the parameters' logical axes, and that of their shape structs with shardings."""
    optimizer: Mapping[str, Any]
    """By trained role: the tree of the optimiser's state, as shape structs with shardings."""


def layout(plan: Plan, mesh: Mesh) -> Layout:
    """Returns where the roles of a stage and the state of their optimisers are going to lie."""
    model, programs = stage_programs(plan, mesh)
    parts = plan.parts()
    teacher = teacher_model(plan)
    trained, frozen = abstract_roles(plan.stage, parts, model, mesh, teacher)
    state = cast(Any, programs.init_state).eval_shape(trained)
    models = {} if teacher is None else {"teacher": teacher}
    roles = {role: (models.get(role, model).axes_of(of), of) for role, of in (state.params | frozen).items()}
    if plan.external is not None:
        other = make_model(plan.external.architecture, ensemble=plan.external.ensemble)
        cfg = plan.stage.model
        structs = part_structs(other, mesh, SCORER, cfg.role_dtype, cfg.frozen_memory)
        roles["reward model"] = (other.axes_of(structs), structs)
    return Layout(roles, state.opt_state)


def sharding_table(plan: Plan, mesh: Mesh) -> str:
    """Returns a line for each parameter of each role of a stage, and what the roles need in all."""
    of = layout(plan, mesh)
    rows = [
        HEADER,
        *(row for role, (axes, structs) in of.roles.items() for row in _rows(role, axes, structs)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (len(HEADER) - 2, len(HEADER) - 1)
    lines = [
        "  ".join(
            cell.rjust(width) if place in numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    totals = [f"{role}: {_needs(of, role)}" for role in of.roles]
    return "\n".join([sharding_line(plan, mesh), "", *lines, "", *totals])


def sharding_line(plan: Plan, mesh: Mesh) -> str:
    """Returns in one line how many parameters a stage has, and the bytes of each device."""
    of = layout(plan, mesh)
    counts = {
        role: sum(math.prod(struct.shape) for struct in jax.tree.leaves(structs))
        for role, (_, structs) in of.roles.items()
    }
    trained = sum(count for role, count in counts.items() if role in of.optimizer)
    frozen = sum(counts.values()) - trained
    needs = _bytes([of.optimizer, *(structs for _, structs in of.roles.values())])
    beside = f", {readable(needs.host)} in the host's memory of each" if needs.host else ""
    over = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    return (
        f"[{plan.stage.name}] {trained:,} parameters are trained, {frozen:,} only read; with the optimiser's "
        f"state {readable(needs.device)} on each device ({over}){beside}"
    )


def readable(number: int) -> str:
    """Returns bytes in words, such as 1.5 MiB."""
    size, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def _rows(role: str, axes: Any, structs: Any) -> Iterator[tuple[str, ...]]:
    paths, _ = jax.tree.flatten_with_path(structs)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, struct), logical in zip(paths, names, strict=True):
        of = _bytes(struct)
        yield (
            role,
            jax.tree_util.keystr(path, simple=True, separator="/"),
            " x ".join(map(str, struct.shape)),
            str(struct.dtype),
            ", ".join(logical),
            ", ".join(map(_part, struct.sharding.spec)),
            readable(of.whole),
            "host" if of.host else readable(of.device),
        )


def _part(part: str | tuple[str, ...] | None) -> str:
    """Returns the mesh axes of one dimension; - where it is whole."""
    return "-" if not part else part if isinstance(part, str) else "+".join(part)


def _needs(of: Layout, role: str) -> str:
    needs = _bytes(of.roles[role][1])
    if needs.host:
        return f"parameters {readable(needs.whole)}, {readable(needs.host)} of each device on the host"
    text = f"parameters {readable(needs.whole)}, {readable(needs.device)} on each device"
    if role in of.optimizer:
        needs = _bytes(of.optimizer[role])
        text += f"; optimiser {readable(needs.whole)}, {readable(needs.device)} on each device"
    return text


def _bytes(tree: Any) -> Bytes:
    whole = device = host = 0
    for leaf in jax.tree.leaves(tree):
        whole += math.prod(leaf.shape) * leaf.dtype.itemsize
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        is_on_host = leaf.sharding.memory_kind == HOST_MEMORY
        device, host = device + (not is_on_host) * part, host + is_on_host * part
    return Bytes(whole, device, host)
