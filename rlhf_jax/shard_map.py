"""What each device computes of its own rows, tokens and words, where XLA would gather or cannot divide.

All of it is plain computation where no mesh is set, or none of the axes is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rlhf_jax.sharding import DECODE_AXES, automatic_spec, dividing_spec, mesh_axes, partition_spec


def row_axes() -> tuple[str, ...]:
    """Returns the mesh axes of size above 1 that divide rows, and parameters not while decoding."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else mesh_axes(partition_spec(("batch",))[0])
    return tuple(axis for axis in axes if mesh.shape[axis] > 1 and axis not in DECODE_AXES)


def num_row_parts() -> int:
    """Returns into how many parts `by_rows` divides rows."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in row_axes())


def by_rows(function: Callable[..., Any], rows: Any, whole: Any) -> Any:
    """Returns function(rows, whole), which each device, or group of them, computes of its own rows.

    Args:
        function: gives a tree like `rows`. Within it, `any_device` tells what holds on any of them.
        rows: tree of arrays; those with dimensions have rows first, of which each gets its part.
        whole: tree of arrays that all get, though axes that do not divide rows may divide them.
    """
    axes = row_axes()
    if not axes:
        return function(rows, whole)
    specs = jax.tree.map(lambda x: PartitionSpec(axes) if x.ndim else PartitionSpec(), rows)
    return jax.shard_map(function, in_specs=(specs, PartitionSpec()), out_specs=specs, axis_names=set(axes))(
        rows, whole
    )


def any_device(condition: Array) -> Array:
    """Returns bool[...]: whether it holds on any device, within `by_rows`; elsewhere the condition itself."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else tuple(axis for axis in row_axes() if axis in mesh.manual_axes)
    return jax.lax.psum(condition.astype(jnp.int32), axes) > 0 if axes else condition


def lookup(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """Returns table[tokens] in a dtype, [B, T, D]; no device gets words of the vocabulary that others have.

    Each looks up the words that it has and the devices add up what they found. XLA alone gathers the whole
    table where the width is divided too.

    Args:
        table: [V, D], of the logical axes vocab, embed.
        tokens: i32[B, T].
        dtype: of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    vocab = () if mesh.empty else mesh_axes(automatic_spec(mesh, ("vocab",))[0])
    if all(mesh.shape[axis] == 1 for axis in vocab):
        return table[tokens].astype(dtype)
    spec = dividing_spec(mesh, automatic_spec(mesh, ("batch", "length")), tokens.shape)
    over_tokens = tuple(axis for part in spec for axis in mesh_axes(part))

    def on_device(table: Array, tokens: Array) -> Array:
        # Said first of all, so that gradients are summed over devices in the type that the table comes in.
        table = jax.lax.pcast(table, over_tokens, to="varying")
        words = tokens - jax.lax.axis_index(vocab) * table.shape[0]
        is_here = (words >= 0) & (words < table.shape[0])
        found = table[jnp.clip(words, 0, table.shape[0] - 1)].astype(dtype)
        return jax.lax.psum(jnp.where(is_here[..., None], found, 0), vocab)

    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(vocab), spec),
        out_specs=spec,
        axis_names={*over_tokens, *vocab},
    )(table, tokens)


def on_shards(
    function: Callable[..., Array], arguments: Sequence[Sequence[str]], result: Sequence[str]
) -> Callable[..., Array]:
    """Returns the function, each device running it on its part of the arrays; for what XLA cannot divide.

    Args:
        function: a part of its result depends on no more than the same part of its arguments, of which some
            may be None.
        arguments: the logical axes of each.
        result: those of the result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    in_specs = tuple(map(partition_spec, arguments))
    # check_vma: a kernel does not say over which axes its results vary.
    return jax.shard_map(function, in_specs=in_specs, out_specs=partition_spec(result), check_vma=False)


class Peers(NamedTuple):
    """The devices among which an axis of parameters is divided; none where it is whole."""

    axes: tuple[str, ...] = ()
    of_tokens: tuple[str, ...] = ()
    """Those of the axes that divide tokens too; along the others, devices have the same tokens."""

    def index(self) -> Array | int:
        """Returns which part of the parameters this device has."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def gather(self, rows: Array) -> Array:
        """Returns the rows of all peers."""
        return jax.lax.all_gather(rows, self.of_tokens, axis=0, tiled=True) if self.of_tokens else rows

    def sum(self, rows: Array) -> Array:
        """Returns this device's rows of what `gather` gave, each summed over the peers."""
        if self.of_tokens:
            rows = jax.lax.psum_scatter(rows, self.of_tokens, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in self.axes if axis not in self.of_tokens)
        return jax.lax.psum(rows, others) if others else rows


def by_tokens(
    function: Callable[..., Array],
    x: Array,
    whole: Sequence[Array],
    divided: Sequence[Array],
    axis: str,
) -> Array:
    """Returns function(peers, x, *whole, *divided), each device computing its own tokens of x.

    For what XLA does not divide by itself: it gathers the tokens of all devices on each.

    Args:
        function: gives tokens of those it gets; what it does with one depends on no other. Of `divided` it
            gets this device's part, and peers that have the others.
        x: [B, T, ...], divided as activations are; plain on one device where no mesh is set.
        whole: arrays that are not divided over the devices that divide tokens.
        divided: arrays whose first dimension has this logical axis. Other dimensions are whole, but
            for mesh axes that do not divide tokens: these divide them as ever.
        axis: the logical axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(Peers(), x, *whole, *divided)
    spec = dividing_spec(mesh, automatic_spec(mesh, ("batch", "length")), x.shape)
    divided_by = tuple(name for name in mesh_axes(automatic_spec(mesh, (axis,))[0]) if mesh.shape[name] > 1)
    of_tokens = tuple(name for part in spec for name in mesh_axes(part))
    peers = Peers(divided_by, tuple(name for name in divided_by if name in of_tokens))
    manual = (*of_tokens, *(name for name in divided_by if name not in of_tokens))

    def varying(array: Array, over: tuple[str, ...] = ()) -> Array:
        return jax.lax.pcast(array, tuple(name for name in manual if name not in over), to="varying")

    def on_device(x: Array, whole: Sequence[Array], divided: Sequence[Array]) -> Array:
        # Said first of all, so that gradients are summed over devices in the type that the arrays come in.
        x = varying(x, of_tokens)
        whole = [varying(array) for array in whole]
        return function(peers, x, *whole, *(varying(array, divided_by) for array in divided))

    return jax.shard_map(
        on_device,
        in_specs=(spec, PartitionSpec(), PartitionSpec(divided_by)),
        out_specs=spec,
        axis_names=set(manual),
    )(x, whole, divided)
