"""The decoder-only transformer: Flax NNX modules inside, pure functions of parameter trees outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rlhf_jax.batch import Params
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.attention import Rotation, causal_attention, rotate, rotation
from rlhf_jax.models.heads import SCORE_HEAD_AXES, zero_score_head
from rlhf_jax.sharding import constrain

INIT_STD = 0.02

# Of q, k, v: the attended values, shaped like q, and what the caller wants to keep.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Model(NamedTuple):
    """A transformer as pure functions, with what sharding needs to know of its parameters."""

    architecture: Architecture
    dtype: str
    """Of activations."""
    init_trunk: Callable[[Array], Params]
    """Of a key: fresh trunk parameters, float32."""
    init_policy: Callable[[Array], Params]
    """Of a key: a fresh trunk, and an LM head where embeddings are not tied."""
    hidden: Callable[..., Array]
    """hidden(trunk, tokens, positions=None, segments=None): final states [B, T, D] in the compute dtype.

    tokens i32[B, T], right-padded; positions i32[B, T] or [T], by default 0, 1, 2, ...; segments i32[B, T],
    where a row holds several sequences: a token sees only those of its own."""
    logits: Callable[[Params, Array], Array]
    """Of policy parameters and hidden states [..., D]: f32[..., V]."""
    policy_axes: Params
    """Logical axis names of each policy parameter, a tuple of strings in the parameters' tree."""
    score_axes: Params
    """The same for a trunk with a score head."""
    policy_shapes: Params
    """The policy's parameters as shape structs."""
    score_shapes: Params
    """The same for a trunk with a score head."""


@cache
def make_model(
    architecture: Architecture,
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Literal["none", "dots", "full"] = "none",
) -> Model:
    """Returns the pure functions of one architecture; for the same arguments the same functions.

    Args:
        architecture: sizes.
        dtype: of activations; parameters are float32 and are cast where they are used.
        remat: what the backward pass recomputes of a block: nothing, all but products with weights, all.
    """
    trunk_axes = _axes(_abstract(Trunk, architecture)[1])
    policy_axes = {"trunk": trunk_axes}
    if not architecture.tie_embeddings:
        policy_axes["lm_head"] = {"kernel": ("embed", "vocab")}

    def init_trunk(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Trunk(architecture, nnx.Rngs(params=key))))

    def init_policy(key: Array) -> Params:
        trunk_key, head_key = jax.random.split(key)
        params = {"trunk": init_trunk(trunk_key)}
        if not architecture.tie_embeddings:
            shape = (architecture.hidden_size, architecture.vocab_size)
            params["lm_head"] = {"kernel": INIT_STD * jax.random.normal(head_key, shape, jnp.float32)}
        return params

    def hidden(
        trunk: Params, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        if positions is None and tokens.shape[1] > architecture.context_length:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens do not fit the model's context length of "
                f"{architecture.context_length}; shorten prompts or completions"
            )
        positions = jnp.arange(tokens.shape[1]) if positions is None else positions
        return bind(Trunk, architecture, trunk)(tokens, positions, segments, jnp.dtype(dtype), remat)

    def init_scorer(key: Array) -> Params:
        return {"trunk": init_trunk(key), "score_head": zero_score_head(architecture.hidden_size)}

    return Model(
        architecture=architecture,
        dtype=dtype,
        init_trunk=init_trunk,
        init_policy=init_policy,
        hidden=hidden,
        logits=logits,
        policy_axes=policy_axes,
        score_axes={"trunk": trunk_axes, "score_head": SCORE_HEAD_AXES},
        policy_shapes=jax.eval_shape(init_policy, jax.random.key(0)),
        score_shapes=jax.eval_shape(init_scorer, jax.random.key(0)),
    )


def logits(policy_params: Params, hidden: Array) -> Array:
    """Returns f32[..., V]: hidden [..., D] times the LM head, or times the embeddings where they are tied."""
    if "lm_head" in policy_params:
        equation, weights = "...d,dv->...v", policy_params["lm_head"]["kernel"]
    else:
        equation, weights = "...d,vd->...v", policy_params["trunk"]["embed"]["embedding"]
    return jnp.einsum(equation, hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)


def bind[M: nnx.Module](module: type[M], architecture: Architecture, params: Params) -> M:
    """Returns a module of this architecture that computes with the given parameters."""
    return nnx.merge(_abstract(module, architecture)[0], params)


@cache
def _abstract(
    module: Callable[[Architecture, nnx.Rngs], nnx.Module], architecture: Architecture
) -> tuple[Any, Any]:
    """Returns the graph of a module, and its state without the arrays."""
    return nnx.split(nnx.eval_shape(lambda: module(architecture, nnx.Rngs(params=jax.random.key(0)))))


class Trunk(nnx.Module):
    """Embedding, blocks stacked along a leading axis, final norm."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        make_blocks = nnx.vmap(lambda rngs: Block(architecture, rngs), in_axes=0, out_axes=0)
        self.architecture = architecture
        self.embed = Embed(architecture, rngs)
        self.layers = make_blocks(rngs.split(architecture.num_layers))
        self.final_norm = RMSNorm(architecture, rngs)

    def __call__(
        self, tokens: Array, positions: Array, segments: Array | None, dtype: jnp.dtype, remat: str
    ) -> Array:
        turn = rotation(positions, self.architecture.head_dim, self.architecture.rope_theta)
        graph, stacked = nnx.split(self.layers)

        def layer(x_BTD: Array, weights: Any) -> tuple[Array, None]:
            block: Block = nnx.merge(graph, weights)
            x_BTD, _ = block(x_BTD, turn, lambda q, k, v: (causal_attention(q, k, v, segments), None))
            return constrain(x_BTD, ("batch", "length", "width")), None

        if remat != "none":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
        x_BTD = constrain(self.embed(tokens, dtype), ("batch", "length", "width"))
        x_BTD, _ = jax.lax.scan(layer, x_BTD, stacked)
        return self.final_norm(x_BTD)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(architecture, rngs)
        self.attention = Attention(architecture, rngs)
        self.mlp_norm = RMSNorm(architecture, rngs)
        self.mlp = SwiGLU(architecture, rngs)

    def __call__(self, x: Array, turn: Rotation, attend: Attend) -> tuple[Array, Any]:
        attended, kept = self.attention(self.attention_norm(x), turn, attend)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kept


class Attention(nnx.Module):
    """Projections around `attend`, which alone knows where keys and values come from."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        width, head_dim = architecture.hidden_size, architecture.head_dim
        num_heads, num_kv_heads = architecture.num_heads, architecture.num_kv_heads
        self.q = _weight(rngs, (width, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.k = _weight(rngs, (width, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.v = _weight(rngs, (width, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        std = _residual_std(architecture)
        self.o = _weight(rngs, (num_heads, head_dim, width), ("heads", "head_dim", "embed"), std)

    def __call__(self, x: Array, turn: Rotation, attend: Attend) -> tuple[Array, Any]:
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", x, weight[...].astype(x.dtype)) for weight in (self.q, self.k, self.v)
        )
        attended, kept = attend(rotate(q, turn), rotate(k, turn), v)
        return jnp.einsum("btnh,nhd->btd", attended, self.o[...].astype(x.dtype)), kept


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        shape = (architecture.hidden_size, architecture.mlp_size)
        self.gate = _weight(rngs, shape, ("embed", "mlp"))
        self.up = _weight(rngs, shape, ("embed", "mlp"))
        self.down = _weight(rngs, shape[::-1], ("mlp", "embed"), _residual_std(architecture))

    def __call__(self, x: Array) -> Array:
        gate, up, down = (weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class RMSNorm(nnx.Module):
    """scale * x / sqrt(mean(x^2) + eps), in float32. Source: arXiv:1910.07467."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        self.eps = architecture.norm_eps
        self.scale = nnx.Param(jnp.ones((architecture.hidden_size,), jnp.float32), axes=("width",))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


class Embed(nnx.Module):
    """A vector for each token."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        self.embedding = _weight(
            rngs, (architecture.vocab_size, architecture.hidden_size), ("vocab", "embed")
        )

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        return self.embedding[...][tokens].astype(dtype)


def _weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float = INIT_STD
) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _residual_std(architecture: Architecture) -> float:
    """Returns the deviation of what writes to the residual stream, whose variance then is that of any depth.

    Source: Radford 2019 (GPT-2), section 2.3.
    """
    return INIT_STD * (2 * architecture.num_layers) ** -0.5


def _axes(abstract: Any) -> Params:
    """Returns the logical axes in the parameters' metadata; stacked layers have one more in front."""
    axes = nnx.to_pure_dict(abstract, lambda variable: variable.get_metadata()["axes"])
    stacked = jax.tree.map(
        lambda names: ("layers", *names), axes["layers"], is_leaf=lambda x: isinstance(x, tuple)
    )
    return axes | {"layers": stacked}
