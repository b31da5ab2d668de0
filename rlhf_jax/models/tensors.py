"""The tensors of a Hugging Face checkpoint as parts of parameters, by the tables in tensor_tables.py.

Theirs may be transposed, with heads and head_dim as one, several parameters in one tensor, one tensor for
each layer or expert; ours are stacked. Reading, checking and writing all go by the same pieces.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.tensor_tables import EMBEDDING, LM_HEAD, Layout

Slices = tuple[slice, ...]
_LEADING = ("layer", "expert")  # leading dimensions of parameters that a tensor has one element of
# What transformers once stored beside the parameters: masks, and frequencies that follow from config.json.
_BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")


class Piece(NamedTuple):
    """One tensor of a checkpoint, or some of its outputs, and the part of a parameter that it is."""

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor
    parameter: str
    at: tuple[int, ...]  # which part of the parameter: parameter[at]; () is all of it
    ours: tuple[int, ...]  # the shape of that part
    layout: Layout
    num_groups: int  # the tensor's outputs are so many groups of equal size; the part has some of each
    start: int  # the part's first output in a group

    def read(self, tensor: Any, index: Slices) -> np.ndarray:
        """Returns the slices `index` of the part, in the tensor's type, reading no more of it than that.

        Args:
            tensor: what is stored, or a slice object of safetensors.
            index: one slice for each dimension of `ours`.
        """
        n = self.layout.num_inputs
        inputs = (_merge(index[:n], self.ours[:n]),) if n else ()
        found = []
        for outputs in self._outputs(_merge(index[n:], self.ours[n:])):
            if self.layout.inputs_first:
                found.append(tensor[(*inputs, outputs)])
            else:
                found.append(tensor[(outputs, *inputs)].T)
        part = found[0] if len(found) == 1 else np.concatenate(found, axis=-1)
        return part.reshape([len(range(*s.indices(size))) for s, size in zip(index, self.ours, strict=True)])

    def write(self, into: np.ndarray, part: np.ndarray) -> None:
        """Writes the part into its place in a tensor of `shape`."""
        n = self.layout.num_inputs
        values = part.reshape(([prod(self.ours[:n])] if n else []) + [-1])
        written = 0
        for outputs in self._outputs(slice(0, values.shape[-1])):
            stop = written + outputs.stop - outputs.start
            if self.layout.inputs_first:
                into[:, outputs] = values[..., written:stop]
            else:
                into[outputs] = values[..., written:stop].T
            written = stop

    def _outputs(self, ours: slice) -> Iterator[slice]:
        """Yields where the part's outputs ours.start .. ours.stop lie among the tensor's."""
        size = prod(self.ours[self.layout.num_inputs :]) // self.num_groups
        group_size = self.shape[-1 if self.layout.inputs_first else 0] // self.num_groups
        for group in range(ours.start // size, -(-ours.stop // size)):
            offset = group * group_size + self.start - group * size
            yield slice(max(ours.start, group * size) + offset, min(ours.stop, (group + 1) * size) + offset)


def pieces(
    architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], stored: Collection[str] = ()
) -> list[Piece]:
    """Returns the tensors of a checkpoint, as the parts of the parameters that they are.

    Args:
        architecture: of the policy.
        shapes: of its parameters, by their paths.
        stored: names of the tensors in a checkpoint to read: one of a model without LM head has no prefix.
    """
    table = FAMILIES[architecture.family].tensors
    assert set(shapes) <= set(table), f"{architecture.family} has no tensors for {set(shapes) - set(table)}"
    sharing: dict[str, list[str]] = {}
    for parameter, (tensor, _) in table.items():
        if parameter in shapes:
            sharing.setdefault(tensor, []).append(parameter)
    prefix = _lacking_prefix(architecture, stored)
    return [
        piece
        for tensor, parameters in sharing.items()
        for piece in _pieces(tensor.removeprefix(prefix), {p: (shapes[p], table[p][1]) for p in parameters})
    ]


def tied_tensors(architecture: Architecture, stored: Collection[str] = ()) -> tuple[str, str]:
    """Returns the names of the embedding and of the LM head: either may hold the matrix of a tied model."""
    table, prefix = FAMILIES[architecture.family].tensors, _lacking_prefix(architecture, stored)
    return table[EMBEDDING][0].removeprefix(prefix), table[LM_HEAD][0]


def is_buffer(tensor: str) -> bool:
    """Returns whether a tensor in a checkpoint is no parameter, and can be passed over."""
    return _BUFFER.search(tensor) is not None


def _lacking_prefix(architecture: Architecture, stored: Collection[str]) -> str:
    base = FAMILIES[architecture.family].base
    return base if stored and not any(name.startswith(base) for name in stored) else ""


def _pieces(tensor: str, sharing: Mapping[str, tuple[tuple[int, ...], Layout]]) -> Iterator[Piece]:
    """Yields the pieces of the parameters, given as (shape, layout), that share a tensor."""
    num_leading = sum(f"{{{axis}}}" in tensor for axis in _LEADING)
    sizes = {
        name: prod(shape[num_leading + layout.num_inputs :]) for name, (shape, layout) in sharing.items()
    }
    start = 0
    for name, (shape, layout) in sharing.items():
        ours = shape[num_leading:]
        num_groups = ours[layout.num_inputs] if layout.by_head else 1
        whole = (prod(ours[: layout.num_inputs]), sum(sizes.values()))[0 if layout.num_inputs else 1 :]
        for at in np.ndindex(*shape[:num_leading]):
            yield Piece(
                tensor.format(**dict(zip(_LEADING, at, strict=False))),
                whole if layout.inputs_first else whole[::-1],
                name,
                at,
                ours,
                layout,
                num_groups,
                start,
            )
        start += sizes[name] // num_groups


def _merge(index: Slices, sizes: tuple[int, ...]) -> slice:
    """Returns the slice of several dimensions made one, of which only the first may be divided."""
    inner = prod(sizes[1:])
    if any(part.indices(size) != (0, size, 1) for part, size in zip(index[1:], sizes[1:], strict=True)):
        raise ValueError(f"a sharding divides the inner part of heads: {index} of {sizes}; shard whole heads")
    start, stop, _ = index[0].indices(sizes[0])
    return slice(start * inner, stop * inner)
