"""The device mesh, and the one table that maps the models' logical axes to its axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.config import MeshConfig

MESH_AXES = ("slice", "data", "fsdp", "expert", "sequence", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "length": "sequence",
    "positions": None,
    "layers": None,
    "embed": "fsdp",  # the model's width, as a dimension of a matrix
    "width": None,  # the model's width, of activations and of vectors: these are too small to shard
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": None,  # every device holds its part of every expert
    "vocab": "tensor",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of MESH_AXES over all devices.

    Args:
        config: sizes; one may be -1, which takes what the others leave.
        devices: JAX devices; all of jax.devices() by default.
    Raises:
        ValueError: sizes that are not positive, several -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"{text}: each size must be at least 1, and one alone may be -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        hint = (
            "give sizes that divide it"
            if -1 in sizes
            else "give sizes whose product it is, or -1 for one of them"
        )
        if devices[0].platform == "cpu":
            hint += f" (JAX_NUM_CPU_DEVICES={math.prod(abs(size) for size in sizes)} makes as many of a CPU)"
        raise ValueError(f"{text} does not fit the number of devices, {len(devices)}; {hint}")
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions have these logical names.

    Raises:
        ValueError: an unknown name, or two dimensions on one mesh axis.
    """
    unknown = [name for name in axes if name not in LOGICAL_AXES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown} in {tuple(axes)}; known: {sorted(LOGICAL_AXES)}")
    spec = PartitionSpec(*(LOGICAL_AXES[name] for name in axes))
    used = [axis for part in spec for axis in _mesh_axes(part)]
    if len(set(used)) < len(used):
        raise ValueError(
            f"two dimensions of {tuple(axes)} fall on one mesh axis: {spec}; an array may use it once"
        )
    return spec


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Returns the NamedSharding of each parameter.

    Args:
        mesh: as `make_mesh` gives it.
        axes: tree with a tuple of logical names for each parameter.
        shapes: the same tree with arrays or shape structs, for instance of `jax.eval_shape`.
    Raises:
        ValueError: every parameter that the mesh cannot hold, with its axes, its shape and the mesh's sizes.
    """
    problems = []

    def place(path: Any, names: tuple[str, ...], shape: Any) -> NamedSharding:
        parameter = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(names) != len(shape.shape):
            problems.append(f"{parameter}: {len(names)} logical axes {names} for the shape {shape.shape}")
            return replicated(mesh)
        spec = partition_spec(names)
        for name, part, size in zip(names, spec, shape.shape, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in _mesh_axes(part))
            if size % parts:
                problems.append(
                    f"{parameter} {shape.shape}, spec {spec}: {name!r} of size {size} is not a multiple of "
                    f"{parts}, the size of mesh.{part}"
                )
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map_with_path(place, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
    if problems:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError("the model does not fit the mesh ({}):\n  {}".format(sizes, "\n  ".join(problems)))
    return shardings


def decode_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Returns param_shardings over `tensor` alone, for decoding: no token then waits for a gather."""

    def whole(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(
            mesh, PartitionSpec(*(None if part == "fsdp" else part for part in sharding.spec))
        )

    return jax.tree.map(whole, param_shardings(mesh, axes, shapes))


def place_rows(mesh: Mesh, batch: Any) -> Any:
    """Returns host arrays whose leading axis is rows, on the devices of the mesh that they belong to."""
    return jax.device_put(batch, batch_sharding(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose leading axis is rows of a batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, size: int, name: str) -> None:
    """Raises ValueError where `size` rows, called `name` by the user, do not divide over the mesh."""
    axes = _mesh_axes(LOGICAL_AXES["batch"])
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
        raise ValueError(
            f"{name} is {size}; it must be a multiple of {parts}, the devices over which rows are divided "
            f"({' times '.join(f'mesh.{axis}={mesh.shape[axis]}' for axis in axes)})"
        )


def constrain(x: Array, axes: Sequence[str]) -> Array:
    """Returns x, laid out as its logical axes say; x as it is where no mesh is set (`use_abstract_mesh`).

    Without it XLA may divide activations like the parameters they meet, each device then holding the whole
    batch: six times the temporary memory of a gradient with fsdp=8.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def by_rows(function: Callable[..., Array], rows: Array, *whole: Array) -> Array:
    """Returns function(rows, *whole), each device computing its own rows; plain where no mesh is set.

    For what XLA does not divide by itself: it gathers the rows of all devices on each.

    Args:
        function: gives rows of those it gets; what it does with one depends on no other.
        rows: a leading axis of rows, which is divided as batches are.
        whole: not divided over the devices that divide rows; other mesh axes divide these as ever.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(rows, *whole)
    spec, axes = partition_spec(("batch",)), _mesh_axes(LOGICAL_AXES["batch"])

    def on_device(rows: Array, *whole: Array) -> Array:
        # Said first of all, so that gradients are summed over devices in the type that `whole` comes in.
        return function(rows, *(jax.lax.pcast(x, axes, to="varying") for x in whole))

    in_specs = (spec, *(PartitionSpec() for _ in whole))
    return jax.shard_map(on_device, in_specs=in_specs, out_specs=spec, axis_names=set(axes))(rows, *whole)


def _mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else part
