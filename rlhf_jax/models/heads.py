"""Score heads: one number from a hidden state, of every column (values) or of the last real one (rewards)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.batch import Params
from rlhf_jax.ops.logprobs import gather_columns

SCORE_HEAD_AXES = {"kernel": ("width",), "bias": ()}


def init_score_head(key: Array, hidden_size: int) -> Params:
    """Returns a reward head: kernel f32[D] from N(0, 1/(D + 1)), bias f32[] zero.

    Source: arXiv:1909.08593 and its code: standard deviation 1/sqrt(D + 1).
    """
    kernel = jax.random.normal(key, (hidden_size,), jnp.float32) * (hidden_size + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}


def zero_score_head(hidden_size: int) -> Params:
    """Returns a head that says 0 of everything."""
    return {"kernel": jnp.zeros((hidden_size,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def values(head: Params, hidden: Array) -> Array:
    """Returns kernel . hidden + bias, float32.

    Args:
        head: kernel f32[D], bias f32[].
        hidden: [..., D], after the final norm, in any float type.
    """
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def scores(head: Params, hidden: Array, lengths: Array) -> Array:
    """Returns the value at the last real token of each sequence, f32[B] or, of packed rows, f32[B * S].

    Where there is no sequence it is a finite number. The bias gets no gradient: a ranking loss cannot see it.
    It is the normaliser's shift.

    Args:
        head: kernel f32[D], bias f32[].
        hidden: [B, T, D], after the final norm.
        lengths: i32[B] or i32[B, S], prompt and completion.
    """
    ends = jnp.cumsum(lengths, axis=1) if lengths.ndim == 2 else lengths[:, None]
    last = gather_columns(hidden, ends - 1).reshape(-1, hidden.shape[-1])
    return values({"kernel": head["kernel"], "bias": jax.lax.stop_gradient(head["bias"])}, last)


def last_hidden(hidden: Array, lengths: Array) -> Array:
    """Returns the hidden state of the last real token of each row, [B, D]; column 0 where a row has none."""
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def fold_normalizer(head: Params, mean: ArrayLike, std: ArrayLike = 1.0) -> Params:
    """Returns the head whose scores are (score - mean) / std."""
    return {"kernel": head["kernel"] / std, "bias": (head["bias"] - mean) / std}
