"""The decoder-only transformer: Flax NNX modules inside, pure functions of parameter trees outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rlhf_jax.batch import Params
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.attention import causal_attention, soft_capped
from rlhf_jax.models.experts import choose_experts, run_experts
from rlhf_jax.models.heads import SCORE_HEAD_AXES, zero_score_head
from rlhf_jax.models.rope import Rotation, rotate, rotation
from rlhf_jax.sharding import Peers, by_tokens, constrain

INIT_STD = 0.02
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}

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
        logits=partial(logits, architecture),
        policy_axes=policy_axes,
        score_axes={"trunk": trunk_axes, "score_head": SCORE_HEAD_AXES},
        policy_shapes=jax.eval_shape(init_policy, jax.random.key(0)),
        score_shapes=jax.eval_shape(init_scorer, jax.random.key(0)),
    )


def logits(architecture: Architecture, policy_params: Params, hidden: Array) -> Array:
    """Returns f32[..., V]: hidden [..., D] times the LM head, or the embeddings where tied; capped."""
    if "lm_head" in policy_params:
        equation, weights = "...d,dv->...v", policy_params["lm_head"]["kernel"]
    else:
        equation, weights = "...d,vd->...v", policy_params["trunk"]["embed"]["embedding"]
    products = jnp.einsum(equation, hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return soft_capped(products, architecture.final_softcap)


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
        self.final_norm = Norm(architecture, rngs)

    def __call__(
        self, tokens: Array, positions: Array, segments: Array | None, dtype: jnp.dtype, remat: str
    ) -> Array:
        # What is the same in all layers is static; the rest goes through the scan beside the weights.
        windows, ropes = zip(*self.architecture.layer_kinds, strict=True)
        distinct = list(dict.fromkeys(ropes))
        turns = [rotation(self.architecture, positions, rope) for rope in distinct]
        stacked_turns = jax.tree.map(lambda *parts: jnp.stack(parts), *turns)
        scale, softcap = self.architecture.score_scale, self.architecture.attention_softcap
        varying: dict[str, Array] = {}
        if len(set(windows)) > 1:
            varying["window"] = jnp.asarray(windows)
        if len(distinct) > 1:
            varying["turn"] = jnp.asarray([distinct.index(rope) for rope in ropes])
        graph, stacked = nnx.split(self.layers)

        def layer(x_BTD: Array, inputs: tuple[Any, dict[str, Array]]) -> tuple[Array, None]:
            weights, own = inputs
            block: Block = nnx.merge(graph, weights)
            turn = jax.tree.map(lambda part: part[own["turn"]], stacked_turns) if "turn" in own else turns[0]
            window = own["window"] if "window" in own else windows[0]

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
                return causal_attention(q, k, v, segments, scale=scale, window=window, softcap=softcap), None

            x_BTD, _ = block(x_BTD, turn, attend)
            return constrain(x_BTD, ("batch", "length", "width")), None

        if remat != "none":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
        x_BTD = constrain(self.embed(tokens, positions, dtype), ("batch", "length", "width"))
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (stacked, varying))
        return self.final_norm(x_BTD)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the norms may also stand behind, or on both sides."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        self.is_parallel = architecture.parallel_residual
        if architecture.norm_placement != "post":
            self.attention_norm = Norm(architecture, rngs)
            self.mlp_norm = Norm(architecture, rngs)
        if architecture.norm_placement != "pre":
            self.attention_post_norm = Norm(architecture, rngs)
            self.mlp_post_norm = Norm(architecture, rngs)
        self.attention = Attention(architecture, rngs)
        self.mlp = Experts(architecture, rngs) if architecture.num_experts else MLP(architecture, rngs)

    def __call__(self, x: Array, turn: Rotation, attend: Attend) -> tuple[Array, Any]:
        attended, kept = self.attention(self._norm("attention_norm", x), turn, attend)
        attended = self._norm("attention_post_norm", attended)
        written = x + attended
        read = x if self.is_parallel else written
        return written + self._norm("mlp_post_norm", self.mlp(self._norm("mlp_norm", read))), kept

    def _norm(self, name: str, x: Array) -> Array:
        return getattr(self, name)(x) if hasattr(self, name) else x


class Attention(nnx.Module):
    """Projections around `attend`, which alone knows where keys and values come from."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        width, head_dim = architecture.hidden_size, architecture.head_dim
        heads = {"q": architecture.num_heads, "k": architecture.num_kv_heads, "v": architecture.num_kv_heads}
        self.is_rotary = architecture.positions == "rotary"
        for name, num_heads in heads.items():
            axis = "heads" if name == "q" else "kv_heads"
            setattr(self, name, _weight(rngs, (width, num_heads, head_dim), ("embed", axis, "head_dim")))
            if architecture.qkv_bias:
                setattr(self, f"{name}_bias", _bias((num_heads, head_dim), (axis, "head_dim")))
            if name != "v" and architecture.qk_norm == "head":
                setattr(self, f"{name}_norm", Norm(architecture, rngs, (head_dim,), ("head_dim",)))
            if name != "v" and architecture.qk_norm == "all":
                setattr(
                    self, f"{name}_norm", Norm(architecture, rngs, (num_heads, head_dim), (axis, "head_dim"))
                )
        std = _residual_std(architecture)
        self.o = _weight(rngs, (heads["q"], head_dim, width), ("heads", "head_dim", "embed"), std)
        if architecture.o_bias:
            self.o_bias = _bias((width,), ("width",))

    def __call__(self, x: Array, turn: Rotation, attend: Attend) -> tuple[Array, Any]:
        q, k, v = (self._project(name, x) for name in "qkv")
        if self.is_rotary:
            q, k = rotate(q, turn), rotate(k, turn)
        attended, kept = attend(q, k, v)
        out = jnp.einsum("btnh,nhd->btd", attended, self.o[...].astype(x.dtype))
        return _plus(out, self, "o_bias"), kept

    def _project(self, name: str, x: Array) -> Array:
        heads = jnp.einsum("btd,dnh->btnh", x, getattr(self, name)[...].astype(x.dtype))
        heads = _plus(heads, self, f"{name}_bias")
        return getattr(self, f"{name}_norm")(heads) if hasattr(self, f"{name}_norm") else heads


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))). Source: arXiv:2002.05202."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        shape = (architecture.hidden_size, architecture.mlp_size)
        self.activation = architecture.activation
        self.is_gated = architecture.gated
        if architecture.gated:
            self.gate = _weight(rngs, shape, ("embed", "mlp"))
        self.up = _weight(rngs, shape, ("embed", "mlp"))
        self.down = _weight(rngs, shape[::-1], ("mlp", "embed"), _residual_std(architecture))
        if architecture.mlp_bias:
            if architecture.gated:
                self.gate_bias = _bias(shape[1:], ("mlp",))
            self.up_bias = _bias(shape[1:], ("mlp",))
            self.down_bias = _bias(shape[:1], ("width",))

    def __call__(self, x: Array) -> Array:
        def times(name: str, y: Array) -> Array:
            return _plus(y @ getattr(self, name)[...].astype(x.dtype), self, f"{name}_bias")

        act, up = _ACTIVATIONS[self.activation], times("up", x)
        return times("down", act(times("gate", x)) * up if self.is_gated else act(up))


class Experts(nnx.Module):
    """Gated feed-forwards, of which a router chooses a few for each token. Source: arXiv:2401.04088."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        num_experts = architecture.num_experts
        shape = (num_experts, architecture.hidden_size, architecture.mlp_size)
        self.architecture = architecture
        self.router = _weight(rngs, (architecture.hidden_size, num_experts), ("embed", "expert"))
        self.gate = _weight(rngs, shape, ("expert", "embed", "mlp"))
        self.up = _weight(rngs, shape, ("expert", "embed", "mlp"))
        std = _residual_std(architecture)
        self.down = _weight(rngs, (num_experts, *shape[:0:-1]), ("expert", "mlp", "embed"), std)

    def __call__(self, x: Array) -> Array:
        return by_tokens(
            self._feed, x, [self.router[...]], [w[...] for w in (self.gate, self.up, self.down)], "expert"
        )

    def _feed(self, peers: Peers, x: Array, *params: Array) -> Array:
        router, gate, up, down = (w.astype(x.dtype) for w in params)  # here: gradients are summed in float32
        architecture, flat = self.architecture, x.reshape(-1, x.shape[-1])
        experts, weights = choose_experts(
            flat,
            router,
            architecture.experts_per_token,
            normalize=architecture.normalize_expert_weights,
        )
        act = _ACTIVATIONS[architecture.activation]
        flat, experts, weights = (peers.gather(each) for each in (flat, experts, weights))
        fed = run_experts(flat, experts - peers.index() * gate.shape[0], weights, gate, up, down, act)
        return peers.sum(fed).reshape(x.shape)


class Norm(nnx.Module):
    """scale * x / sqrt(mean(x^2) + eps), in float32; a LayerNorm takes off the mean first and adds a bias.

    Sources: arXiv:1910.07467, arXiv:1607.06450.
    """

    def __init__(
        self,
        architecture: Architecture,
        rngs: nnx.Rngs,
        shape: tuple[int, ...] = (),
        axes: tuple[str, ...] = ("width",),
    ) -> None:
        shape = shape or (architecture.hidden_size,)
        self.eps, self.offset = architecture.norm_eps, float(architecture.norm_offset)
        self.dimensions = tuple(range(-len(shape), 0))
        self.scale = nnx.Param(jnp.full(shape, 1.0 - self.offset, jnp.float32), axes=axes)
        if architecture.norm == "layer":
            self.bias = _bias(shape, axes)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        if hasattr(self, "bias"):
            wide = wide - jnp.mean(wide, axis=self.dimensions, keepdims=True)
        wide = wide * jax.lax.rsqrt(
            jnp.mean(jnp.square(wide), axis=self.dimensions, keepdims=True) + self.eps
        )
        wide = wide * (self.scale[...] + self.offset if self.offset else self.scale[...])
        return _plus(wide, self, "bias").astype(x.dtype)


class Embed(nnx.Module):
    """A vector for each token, and one for each position where positions are learned."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        width = architecture.hidden_size
        self.scale = architecture.embedding_scale
        self.embedding = _weight(rngs, (architecture.vocab_size, width), ("vocab", "embed"))
        if architecture.positions == "learned":
            self.position = _weight(rngs, (architecture.context_length, width), ("positions", "embed"))

    def __call__(self, tokens: Array, positions: Array, dtype: jnp.dtype) -> Array:
        x = self.embedding[...][tokens].astype(dtype)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, dtype)
        return x + self.position[...][positions].astype(dtype) if hasattr(self, "position") else x


def _weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float = INIT_STD
) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def _plus(x: Array, module: nnx.Module, name: str) -> Array:
    """Returns x plus the module's bias of that name, where it has one."""
    return x + getattr(module, name)[...].astype(x.dtype) if hasattr(module, name) else x


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
