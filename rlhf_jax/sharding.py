"""The device mesh, and what lies where on it, by the table of axes.py that is in force."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.axes import LOGICAL_AXES, MESH_AXES, WHOLE, Table, axis_problems, axis_table, collisions
from rlhf_jax.config import MeshConfig, StageConfig
from rlhf_jax.distributed import num_processes
from rlhf_jax.options import did_you_mean

Memory = Literal["device", "host"]
HOST_MEMORY = "pinned_host"
"""JAX's name of the host's memory that a device copies from."""

_TABLE: ContextVar[Table] = ContextVar("axis_table", default=LOGICAL_AXES)


@contextmanager
def axis_rules(overrides: Mapping[str, str | Sequence[str]]) -> Iterator[None]:
    """Within it, logical axes are divided as `mesh.axes` of a configuration says; else as in LOGICAL_AXES.

    Raises:
        ValueError: names that there are not, or that do not fit each other; all of them.
    """
    if problems := [f"mesh.axes.{name}: {problem}" for name, problem in axis_problems(overrides)]:
        raise ValueError("\n".join(problems))
    token = _TABLE.set(axis_table(overrides))
    try:
        yield
    finally:
        _TABLE.reset(token)


def traced_on[**P, R](mesh: Mesh, function: Callable[P, R]) -> Callable[P, R]:
    """Returns the function, within which models may name logical axes: of this mesh, by the rules of now."""
    table = _TABLE.get()

    def on_mesh(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _TABLE.set(table)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)
        finally:
            _TABLE.reset(token)

    return on_mesh


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of MESH_AXES over all devices; on TPUs the axis `slice` alone leaves a slice.

    Args:
        config: sizes; one may be -1, which takes what the others leave.
        devices: JAX devices; all of jax.devices() by default.
    Raises:
        ValueError: sizes that are not positive, several -1, a product that is not the number of devices, or a
            size of `slice` that is not the number of slices that the TPUs are in.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(config.sizes.values())
    text = (
        ", ".join(f"mesh.{axis}={size}" for axis, size in config.sizes.items() if size != 1) or "mesh.data=1"
    )
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
    types = (AxisType.Auto,) * len(shape)
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})  # not told where there is one
    if shape[0] != num_slices:
        raise ValueError(
            f"mesh.slice is {shape[0]}, but the {len(devices)} devices are in {num_slices} "
            f"slice{'s' if num_slices > 1 else ''}; set mesh.slice to {num_slices}"
        )
    # An axis may take a part of a dimension of the torus, as 8 of 4x4x4 does; few sizes fit otherwise.
    within, across = (1, *shape[1:]), (num_slices, *(1 for _ in shape[1:]))
    if num_slices == 1:
        placed = create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        placed = create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


def stage_meshes(stage: StageConfig, mesh: Mesh) -> tuple[Mesh, Mesh]:
    """Returns the mesh on which a stage trains, and that on which it samples, the same by default.

    With rollout.devices the last devices sample: divided by mesh.tensor they have rows. The others have the
    axes of the whole mesh, of which one takes what is left.

    Args:
        stage: reads mesh and rollout.devices.
        mesh: over all devices, as `make_mesh` gives it.
    Raises:
        ValueError: the devices cannot be parted so.
    """
    number, total = stage.rollout.devices, mesh.size
    if not stage.is_online or not number:
        return mesh, mesh
    known = math.prod(size for size in stage.mesh.sizes.values() if size != -1)
    if number >= total:
        raise ValueError(
            f"rollout.devices is {number}; it must be less than {total}, the number of devices, of which the "
            "others train"
        )
    if num_processes() > 1:
        raise ValueError(
            f"rollout.devices is {number}, but the run has {num_processes()} processes, and weights are "
            "copied between devices of one process alone; set it to 0"
        )
    if (total - number) % known:
        raise ValueError(
            f"rollout.devices is {number}; the other {total - number} of {total} devices must be a multiple "
            f"of {known}, the product of the mesh's sizes"
        )
    devices = mesh.devices.ravel()
    shape = [(total - number) // known if size == -1 else size for size in stage.mesh.sizes.values()]
    parts = {"data": number // stage.mesh.tensor, "tensor": stage.mesh.tensor}
    types = (AxisType.Auto,) * len(MESH_AXES)
    return (
        Mesh(devices[:-number].reshape(shape), MESH_AXES, axis_types=types),
        Mesh(
            devices[-number:].reshape([parts.get(axis, 1) for axis in MESH_AXES]),
            MESH_AXES,
            axis_types=types,
        ),
    )


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions have these logical names.

    Raises:
        ValueError: unknown names, or two dimensions on one mesh axis.
    """
    spec, problems = _spec(axes)
    if problems:
        raise ValueError(f"axes {_listed(axes)} on {spec}: {'; '.join(problems)}")
    return spec


def _spec(axes: Sequence[str]) -> tuple[PartitionSpec, list[str]]:
    """Returns the mesh axes of an array, and what is wrong with its logical axes."""
    table = _TABLE.get()
    problems = [
        f"{name!r} is no logical axis{did_you_mean(name, table) or f'; known: {_listed(table)}'}"
        for name in axes
        if name not in table
    ]
    known = [name for name in axes if name in table]
    problems += [
        f"{first!r} and {second!r} are both on mesh.{axis}, which an array may use once"
        for first, second, axis in collisions(table, known)
    ]
    return PartitionSpec(*(table.get(name, ()) for name in axes)), problems


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Returns the NamedSharding of each parameter.

    Args:
        mesh: as `make_mesh` gives it.
        axes: tree with a tuple of logical names for each parameter.
        shapes: the same tree with arrays or shape structs, for instance of `jax.eval_shape`.
    Raises:
        ValueError: every parameter that the mesh cannot hold, with its shape, its logical axes, the mesh axes
            that they are on, and the mesh's sizes.
    """
    problems: list[str] = []
    odd: set[str] = set()

    def place(path: Any, names: tuple[str, ...], shape: Any) -> NamedSharding:
        parameter = f"{jax.tree_util.keystr(path, simple=True, separator='/')} {shape.shape}"
        if len(names) != len(shape.shape):
            problems.append(f"{parameter}: {len(names)} logical axes, {_listed(names)}")
            return replicated(mesh)
        spec, wrong = _spec(names)
        for name, part, size in zip(names, spec, shape.shape, strict=True):
            parts = _num_parts(mesh, part)
            if size % parts:
                over = _product(mesh, part)
                odd.add(name)
                wrong.append(f"{name!r} of size {size} is not a multiple of {parts}, the size of {over}")
        if wrong:
            problems.append(f"{parameter}, axes {_listed(names)} on {spec}: {'; '.join(wrong)}")
            return replicated(mesh)
        return NamedSharding(mesh, spec)

    shardings = jax.tree.map_with_path(place, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
    if problems:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        if odd:
            whole = ", ".join(f"{name}: {WHOLE}" for name in sorted(odd))
            problems.append(f"what does not divide can be whole on every device: mesh.axes: {{{whole}}}")
        raise ValueError("the model does not fit the mesh ({}):\n  {}".format(sizes, "\n  ".join(problems)))
    return shardings


DECODE_AXES = ("tensor", "expert")
"""What divides parameters while decoding: devices that divide them otherwise would gather them per token."""


def decode_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Returns param_shardings over DECODE_AXES alone: no token then waits for a gather."""

    def kept(sharding: NamedSharding) -> NamedSharding:
        parts = [tuple(axis for axis in mesh_axes(part) if axis in DECODE_AXES) for part in sharding.spec]
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree.map(kept, param_shardings(mesh, axes, shapes))


def place(tree: Any, shardings: Any) -> Any:
    """Returns host arrays on devices; each process reads of its own arrays what its devices hold.

    Unlike jax.device_put it asks no other process whether it has the same arrays.

    Args:
        tree: host arrays or numbers of the global shape.
        shardings: of each, or one for all.
    """

    def on_devices(sharding: NamedSharding, array: Any) -> Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__, dtype=host.dtype)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda array: on_devices(shardings, array), tree)
    return jax.tree.map(on_devices, shardings, tree)


def place_rows(mesh: Mesh, batch: Any) -> Any:
    """Returns host arrays whose leading axis is rows, on the devices of the mesh that they belong to."""
    return place(batch, batch_sharding(mesh))


def row_holders(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Returns bool[processes, num_rows]: which rows of a batch lie on devices of which process.

    Where an axis that does not divide rows crosses processes, several of them hold a row.
    """
    holders = np.zeros((num_processes(), num_rows), bool)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((num_rows,)).items():
        holders[device.process_index, rows] = True
    return holders


def gathered(tree: Any) -> Any:
    """Returns arrays of the whole mesh on the host, on every process; all processes call it."""
    if num_processes() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def in_memory(shardings: Any, memory: Memory) -> Any:
    """Returns the shardings of a tree, on the devices as they are, or of the host's memory of each."""
    if memory == "device":
        return shardings
    return jax.tree.map(lambda at: at.with_memory_kind(HOST_MEMORY), shardings)


def placed_structs(shapes: Any, shardings: Any) -> Any:
    """Returns the shape structs of a tree with the shardings of another."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose leading axis is rows of a batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, size: int, name: str) -> None:
    """Raises ValueError where `size` rows, called `name` by the user, do not divide over the mesh."""
    (part,) = partition_spec(("batch",))
    parts = _num_parts(mesh, part)
    if size % parts:
        raise ValueError(
            f"{name} is {size}; it must be a multiple of {parts}, the devices over which rows are divided "
            f"({_product(mesh, part)})"
        )


def constrain(x: Array, axes: Sequence[str]) -> Array:
    """Returns x, laid out as its logical axes say; x as it is where no mesh is set (`use_abstract_mesh`).

    Without it XLA may divide activations like the parameters they meet, each device then holding the whole
    batch: six times the temporary memory of a gradient with fsdp=8. A dimension that the mesh does not divide
    stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = dividing_spec(mesh, automatic_spec(mesh, axes), x.shape)
    return jax.lax.with_sharding_constraint(x, spec)


def dividing_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Returns how `constrain` lays out an array: a dimension that the mesh does not divide stays whole."""
    return NamedSharding(mesh, dividing_spec(mesh.abstract_mesh, partition_spec(axes), shape))


def num_parts(axis: str) -> int:
    """Returns into how many parts the mesh divides a logical axis; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _num_parts(mesh, automatic_spec(mesh, (axis,))[0])


def device_platform() -> str:
    """Returns cpu, gpu or tpu: of the mesh that is set, else of JAX's first device.

    A program for a mesh of described devices is traced where other devices are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def compute_capability() -> tuple[int, ...]:
    """Returns the compute capability of this process's GPUs, such as (9, 0); () where it has none of CUDA."""
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return ()
    return tuple(map(int, device.compute_capability.split(".")))


def automatic_spec(mesh: AbstractMesh, axes: Sequence[str]) -> PartitionSpec:
    """Returns partition_spec(axes) without the mesh axes of the `shard_map` that this is within."""
    parts = partition_spec(axes)
    return PartitionSpec(*(tuple(a for a in mesh_axes(part) if a not in mesh.manual_axes) for part in parts))


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one dimension of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else part


def _num_parts(mesh: Mesh | AbstractMesh, part: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes(part))


def dividing_spec(mesh: AbstractMesh, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """Returns the spec, without the axes of dimensions that the mesh does not divide evenly."""
    sizes = zip(spec, shape, strict=False)
    return PartitionSpec(*(part if size % _num_parts(mesh, part) == 0 else None for part, size in sizes))


def _product(mesh: Mesh, part: str | tuple[str, ...] | None) -> str:
    """Returns the mesh axes of a dimension with their sizes, without those of size 1."""
    return " * ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in mesh_axes(part) if mesh.shape[axis] > 1)


def _listed(names: Iterable[str]) -> str:
    return f"({', '.join(names)})"
