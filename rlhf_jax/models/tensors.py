"""Which tensor of a Hugging Face checkpoint is which parameter, and how it lies there.

Theirs may be transposed, with heads and head_dim as one, several parameters in one tensor, one tensor for
each layer; ours are stacked over the layers. Reading, checking and writing all go by the one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.architecture import Architecture

EMBEDDING, LM_HEAD = "trunk/embed/embedding", "lm_head/kernel"

Slices = tuple[slice, ...]


class Layout(NamedTuple):
    """How the dimensions of a parameter (of one layer), inputs ... outputs ..., lie in its tensor.

    A tensor is [outputs, inputs], each of the two one dimension.
    """

    num_inputs: int  # leading dimensions of the parameter that a product sums over; 0: tensor is [outputs]
    inputs_first: bool = False  # the tensor is [inputs, outputs]


VECTOR, LINEAR, FROM_HEADS, ROWS = Layout(0), Layout(1), Layout(2), Layout(1, inputs_first=True)

# Parameter: (tensor, layout). Parameters of one tensor lie one after the other in its outputs.
_TENSORS = {
    EMBEDDING: ("model.embed_tokens.weight", ROWS),
    "trunk/layers/attention_norm/scale": ("model.layers.{layer}.input_layernorm.weight", VECTOR),
    "trunk/layers/attention/q": ("model.layers.{layer}.self_attn.q_proj.weight", LINEAR),
    "trunk/layers/attention/k": ("model.layers.{layer}.self_attn.k_proj.weight", LINEAR),
    "trunk/layers/attention/v": ("model.layers.{layer}.self_attn.v_proj.weight", LINEAR),
    "trunk/layers/attention/o": ("model.layers.{layer}.self_attn.o_proj.weight", FROM_HEADS),
    "trunk/layers/mlp_norm/scale": ("model.layers.{layer}.post_attention_layernorm.weight", VECTOR),
    "trunk/layers/mlp/gate": ("model.layers.{layer}.mlp.gate_proj.weight", LINEAR),
    "trunk/layers/mlp/up": ("model.layers.{layer}.mlp.up_proj.weight", LINEAR),
    "trunk/layers/mlp/down": ("model.layers.{layer}.mlp.down_proj.weight", LINEAR),
    "trunk/final_norm/scale": ("model.norm.weight", VECTOR),
    LM_HEAD: ("lm_head.weight", LINEAR),
}
_LEADING = ("layer",)  # leading dimensions of parameters that a tensor has one element of


class Piece(NamedTuple):
    """One tensor of a checkpoint, or some of its outputs, and the part of a parameter that it is."""

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor
    parameter: str
    at: tuple[int, ...]  # which part of the parameter: parameter[at]; () is all of it
    ours: tuple[int, ...]  # the shape of that part
    layout: Layout
    start: int  # in the tensor's outputs

    def read(self, tensor: Any, index: Slices) -> np.ndarray:
        """Returns the slices `index` of the part, in the tensor's type, reading no more of it than that.

        Args:
            tensor: what is stored, or a slice object of safetensors.
            index: one slice for each dimension of `ours`.
        """
        outputs, inputs = self._cut(index)
        sizes = [len(range(*s.indices(size))) for s, size in zip(index, self.ours, strict=True)]
        if inputs is None:
            part = tensor[outputs]
        else:
            part = tensor[inputs, outputs] if self.layout.inputs_first else tensor[outputs, inputs].T
        return part.reshape(sizes)

    def write(self, into: np.ndarray, part: np.ndarray) -> None:
        """Writes the part into its place in a tensor of `shape`."""
        outputs, inputs = self._cut((slice(None),) * len(self.ours))
        if inputs is None:
            into[outputs] = part.reshape(-1)
        else:
            matrix = part.reshape(prod(self.ours[: self.layout.num_inputs]), -1)
            (into if self.layout.inputs_first else into.T)[:, outputs] = matrix

    def _cut(self, index: Slices) -> tuple[slice, slice | None]:
        """Returns the slices of the tensor's outputs and of its inputs."""
        n = self.layout.num_inputs
        outputs = _merge(index[n:], self.ours[n:])
        moved = slice(outputs.start + self.start, outputs.stop + self.start)
        return moved, _merge(index[:n], self.ours[:n]) if n else None


def pieces(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Returns the tensors of a checkpoint, as the parts of the parameters that they are.

    Args:
        architecture: of the policy.
        shapes: of its parameters, by their paths.
    """
    return [piece for parameter, shape in shapes.items() for piece in _pieces(parameter, shape)]


def tied_tensors(architecture: Architecture) -> tuple[str, str]:
    """Returns the names of the embedding and of the LM head: either may hold the matrix of a tied model."""
    return _TENSORS[EMBEDDING][0], _TENSORS[LM_HEAD][0]


def _pieces(parameter: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    name, layout = _TENSORS[parameter]
    num_leading = sum(f"{{{axis}}}" in name for axis in _LEADING)
    ours = shape[num_leading:]
    outputs, inputs = prod(ours[layout.num_inputs :]), prod(ours[: layout.num_inputs])
    whole = (outputs,) if layout.num_inputs == 0 else (outputs, inputs)
    for at in np.ndindex(*shape[:num_leading]):
        tensor = name.format(**dict(zip(_LEADING, at, strict=False)))
        yield Piece(tensor, whole[::-1] if layout.inputs_first else whole, parameter, at, ours, layout, 0)


def _merge(index: Slices, sizes: tuple[int, ...]) -> slice:
    """Returns the slice of several dimensions made one, of which only the first may be divided."""
    inner = prod(sizes[1:])
    if any(part.indices(size) != (0, size, 1) for part, size in zip(index[1:], sizes[1:], strict=True)):
        raise ValueError(f"a sharding divides the inner part of heads: {index} of {sizes}; shard whole heads")
    start, stop, _ = index[0].indices(sizes[0])
    return slice(start * inner, stop * inner)
