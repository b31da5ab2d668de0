"""Score heads: one number from a hidden state, of every column (values) or of the last real one (rewards)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.batch import Params
from rlhf_jax.ops.logprobs import gather_columns

Combine = Literal["mean", "minimum", "mean_minus_std"]


class Ensemble(NamedTuple):
    """Reward heads on one trunk, which differ by their first weights, and the one score that they give.

    Source: arXiv:2310.02743 (mean, worst case, and a mean less uncertainty; several whole models there). Its
    third, UWO, subtracts a multiple of the variance over the members; mean_minus_std one of the deviation,
    which is in the scores' own unit.
    """

    num_heads: int = 1
    combine: Combine = "mean"
    num_stds: float = 1.0
    """Of mean_minus_std: the deviations, over the heads and biased, that are taken from their mean."""


SINGLE = Ensemble()


def score_head_axes(num_heads: int = 1) -> Params:
    """Returns the logical axes of a head, or of an ensemble's heads."""
    if num_heads == 1:
        return {"kernel": ("width",), "bias": ()}
    return {"kernel": ("score_heads", "width"), "bias": ("score_heads",)}


def init_score_head(key: Array, hidden_size: int, num_heads: int = 1) -> Params:
    """Returns a reward head: kernel f32[D] from N(0, 1/(D + 1)), bias f32[] zero; of an ensemble [H, D], [H].

    Source: arXiv:1909.08593 and its code: standard deviation 1/sqrt(D + 1).
    """
    shape = _several(num_heads)
    kernel = jax.random.normal(key, (*shape, hidden_size), jnp.float32) * (hidden_size + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros(shape, jnp.float32)}


def zero_score_head(hidden_size: int, num_heads: int = 1) -> Params:
    """Returns a head, or an ensemble of heads, that says 0 of everything."""
    shape = _several(num_heads)
    return {"kernel": jnp.zeros((*shape, hidden_size), jnp.float32), "bias": jnp.zeros(shape, jnp.float32)}


def _several(num_heads: int) -> tuple[int, ...]:
    return () if num_heads == 1 else (num_heads,)


def values(head: Params, hidden: Array) -> Array:
    """Returns kernel . hidden + bias, float32.

    Args:
        head: kernel f32[D], bias f32[].
        hidden: [..., D], after the final norm, in any float type.
    """
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def scores(head: Params, hidden: Array, lengths: Array) -> Array:
    """Returns the value at the last real token of each sequence, f32[B] or, of packed rows, f32[B * S].

    Of an ensemble it is f32[H, B] or f32[H, B * S].

    Where there is no sequence it is a finite number. The bias gets no gradient: a ranking loss cannot see it.
    It is the normaliser's shift.

    Args:
        head: kernel f32[D], bias f32[]; of an ensemble f32[H, D], f32[H].
        hidden: [B, T, D], after the final norm.
        lengths: i32[B] or i32[B, S], prompt and completion.
    """
    ends = jnp.cumsum(lengths, axis=1) if lengths.ndim == 2 else lengths[:, None]
    last = gather_columns(hidden, ends - 1).reshape(-1, hidden.shape[-1])
    said = jax.vmap(values, in_axes=(0, None)) if head["kernel"].ndim == 2 else values
    return said({"kernel": head["kernel"], "bias": jax.lax.stop_gradient(head["bias"])}, last)


def combined(scores: Array, ensemble: Ensemble) -> Array:
    """Returns one score of an ensemble's, f32[B] of f32[H, B]."""
    match ensemble.combine:
        case "mean":
            return jnp.mean(scores, axis=0)
        case "minimum":
            return jnp.min(scores, axis=0)
        case "mean_minus_std":
            return jnp.mean(scores, axis=0) - ensemble.num_stds * jnp.std(scores, axis=0)


def average(heads: Params) -> Params:
    """Returns the one head whose scores are the mean of an ensemble's."""
    return {name: jnp.mean(of_heads, axis=0) for name, of_heads in heads.items()}


def last_hidden(hidden: Array, lengths: Array) -> Array:
    """Returns the hidden state of the last real token of each row, [B, D]; column 0 where a row has none."""
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def fold_normalizer(head: Params, mean: ArrayLike, std: ArrayLike = 1.0) -> Params:
    """Returns the head whose scores are (score - mean) / std; of an ensemble each has its own, f32[H]."""
    return {"kernel": head["kernel"] / jnp.asarray(std)[..., None], "bias": (head["bias"] - mean) / std}
