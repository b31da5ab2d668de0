"""The decoder-only transformer: Flax NNX modules inside, pure functions of parameter trees outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.batch import Params
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.attention import soft_capped
from rlhf_jax.models.experts import choose_experts, run_experts
from rlhf_jax.models.heads import SCORE_HEAD_AXES, zero_score_head
from rlhf_jax.models.lora import SUFFIX, Lora, adapter_of, with_adapter
from rlhf_jax.models.rope import Rotation, rotate, rotation
from rlhf_jax.models.row_attention import Implementation, row_attention
from rlhf_jax.sharding import Peers, by_tokens, constrain, lookup, num_parts

INIT_STD = 0.02
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}

POLICY = ("trunk", "lm_head")
"""The parts of a whole policy; with tied embeddings there is no LM head."""
SCORER = ("trunk", "score_head")
"""The parts of a whole reward or value model."""

Remat = Literal["none", "dots", "full", "offload"]
RESIDUAL = "residual"  # what goes into a block
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
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
    hidden_of_roles: Callable[..., tuple[Array, ...]]
    """hidden_of_roles(trunk, adapters, tokens, positions=None, segments=None): those of several roles on one
    trunk, in one scan over its layers: a layer's weights, gathered once, serve all roles in turn. An adapter
    is None where a role is the trunk alone."""
    logits: Callable[[Params, Array], Array]
    """Of policy parameters and hidden states [..., D]: f32[..., V]."""
    lora: Lora | None
    """What its adapters are like; None where it has none."""
    init_adapter: Callable[[Array], Params]
    """Of a key: an adapter that changes nothing yet: a uniform in +-1/sqrt(inputs), b zero, float32."""
    axes: Params
    """Logical axis names of the parameters of each part: trunk, lm_head where embeddings are not tied,
    score_head, adapter where there is a `lora`. Tuples of strings in the parameters' tree."""
    shapes: Params
    """The same parameters as shape structs."""

    def axes_of(self, parts: Iterable[str]) -> Params:
        """Returns the axes of those parts that the model has."""
        return {part: self.axes[part] for part in parts if part in self.axes}

    def shapes_of(self, parts: Iterable[str]) -> Params:
        """Returns the shapes of those parts that the model has."""
        return {part: self.shapes[part] for part in parts if part in self.shapes}

    @property
    def policy_axes(self) -> Params:
        """Returns the axes of a whole policy."""
        return self.axes_of(POLICY)

    @property
    def policy_shapes(self) -> Params:
        """Returns the shapes of a whole policy."""
        return self.shapes_of(POLICY)

    @property
    def score_axes(self) -> Params:
        """Returns the axes of a trunk with a score head."""
        return self.axes_of(SCORER)

    @property
    def score_shapes(self) -> Params:
        """Returns the shapes of a trunk with a score head."""
        return self.shapes_of(SCORER)


@cache
def make_model(
    architecture: Architecture,
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Remat = "none",
    attention: Implementation = "auto",
    lora: Lora | None = None,
) -> Model:
    """Returns the pure functions of one architecture; for the same arguments the same functions.

    Args:
        architecture: sizes.
        dtype: of activations; parameters are float32 and are cast where they are used.
        remat: what the backward pass recomputes of a block: nothing, all but products with weights, all, or
            all with what goes into the block kept in the host's memory.
        attention: see `row_attention`.
        lora: the adapters that roles may have.
    """
    axes = {"trunk": _axes(_abstract(Trunk, architecture)[1]), "score_head": SCORE_HEAD_AXES}
    if not architecture.tie_embeddings:
        axes["lm_head"] = {"kernel": ("embed", "vocab")}
    if lora is not None:
        axes["adapter"] = adapter_of(_axes(_abstract(Trunk, architecture, lora)[1]))

    def init_trunk(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Trunk(architecture, nnx.Rngs(params=key))))

    def init_policy(key: Array) -> Params:
        trunk_key, head_key = jax.random.split(key)
        params = {"trunk": init_trunk(trunk_key)}
        if not architecture.tie_embeddings:
            shape = (architecture.hidden_size, architecture.vocab_size)
            params["lm_head"] = {"kernel": INIT_STD * jax.random.normal(head_key, shape, jnp.float32)}
        return params

    def init_adapter(key: Array) -> Params:
        assert lora is not None
        return adapter_of(nnx.to_pure_dict(nnx.state(Trunk(architecture, nnx.Rngs(params=key), lora))))

    def hidden_of_roles(
        trunk: Params,
        adapters: Sequence[Params | None],
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, ...]:
        if positions is None and tokens.shape[1] > architecture.context_length:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens do not fit the model's context length of "
                f"{architecture.context_length}; shorten prompts or completions"
            )
        positions = jnp.arange(tokens.shape[1]) if positions is None else positions
        module = bind(Trunk, architecture, trunk)
        return module(tokens, positions, segments, jnp.dtype(dtype), remat, attention, tuple(adapters), lora)

    def hidden(trunk: Params, tokens: Array, *rows: Array | None, **options: Array | None) -> Array:
        return hidden_of_roles(trunk, (None,), tokens, *rows, **options)[0]

    def init_parts(key: Array) -> Params:
        head = zero_score_head(architecture.hidden_size)
        adapter = {} if lora is None else {"adapter": init_adapter(key)}
        return init_policy(key) | {"score_head": head} | adapter

    return Model(
        architecture=architecture,
        dtype=dtype,
        init_trunk=init_trunk,
        init_policy=init_policy,
        hidden=hidden,
        hidden_of_roles=hidden_of_roles,
        logits=partial(logits, architecture),
        lora=lora,
        init_adapter=init_adapter,
        axes=axes,
        shapes=jax.eval_shape(init_parts, jax.random.key(0)),
    )


def logits(architecture: Architecture, policy_params: Params, hidden: Array) -> Array:
    """Returns f32[..., V]: hidden [..., D] times the LM head, or the embeddings where tied; capped."""
    if "lm_head" in policy_params:
        equation, weights = "...d,dv->...v", policy_params["lm_head"]["kernel"]
    else:
        equation, weights = "...d,vd->...v", policy_params["trunk"]["embed"]["embedding"]
    products = jnp.einsum(equation, hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # Said of the products, and so of their gradient: else XLA gathers this over the devices that divide rows.
    products = constrain(products, ("batch", *("length",) * (products.ndim - 2), "vocab"))
    return soft_capped(products, architecture.final_softcap)


def bind[M: nnx.Module](
    module: type[M],
    architecture: Architecture,
    params: Params,
    adapter: Params | None = None,
    lora: Lora | None = None,
) -> M:
    """Returns a module of this architecture that computes with the given parameters, and an adapter."""
    if not adapter:
        return nnx.merge(_abstract(module, architecture)[0], params)
    return nnx.merge(_abstract(module, architecture, lora)[0], with_adapter(params, adapter))


@cache
def _abstract(module: Callable[..., nnx.Module], *sizes: Architecture | Lora | None) -> tuple[Any, Any]:
    """Returns the graph of a module, and its state without the arrays.

    Args:
        module: its class.
        sizes: the architecture, and the adapters where it has some.
    """

    def make() -> nnx.Module:
        architecture, *lora = sizes
        return module(architecture, nnx.Rngs(params=jax.random.key(0)), *lora)

    return nnx.split(nnx.eval_shape(make))


class Trunk(nnx.Module):
    """Embedding, blocks stacked along a leading axis, final norm."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
        make_blocks = nnx.vmap(lambda rngs: Block(architecture, rngs, lora), in_axes=0, out_axes=0)
        self.architecture = architecture
        self.embed = Embed(architecture, rngs)
        self.layers = make_blocks(rngs.split(architecture.num_layers))
        self.final_norm = Norm(architecture, rngs)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        segments: Array | None,
        dtype: jnp.dtype,
        remat: Remat,
        attention: Implementation,
        adapters: tuple[Params | None, ...] = (None,),
        lora: Lora | None = None,
    ) -> tuple[Array, ...]:
        length = tokens.shape[1]
        tokens, positions, segments = _filled(tokens, positions, segments)
        # What is the same in all layers is static; the rest goes through the scan beside the weights.
        windows, ropes = zip(*self.architecture.layer_kinds, strict=True)
        distinct, distinct_windows = list(dict.fromkeys(ropes)), list(dict.fromkeys(windows))
        turns = [rotation(self.architecture, positions, rope) for rope in distinct]
        stacked_turns = jax.tree.map(lambda *parts: jnp.stack(parts), *turns)
        varying: dict[str, Array] = {}
        if len(distinct_windows) > 1:
            varying["window"] = jnp.asarray([distinct_windows.index(window) for window in windows])
        if len(distinct) > 1:
            varying["turn"] = jnp.asarray([distinct.index(rope) for rope in ropes])
        stacked = nnx.to_pure_dict(nnx.state(self.layers))
        stacked_adapters = tuple(adapter and adapter["layers"] for adapter in adapters)

        def layer(states: tuple[Array, ...], inputs: Any) -> tuple[tuple[Array, ...], None]:
            weights, of_roles, own = inputs
            turn = jax.tree.map(lambda part: part[own["turn"]], stacked_turns) if "turn" in own else turns[0]
            attend_row = partial(
                row_attention,
                segments=segments,
                scale=self.architecture.score_scale,
                windows=distinct_windows,
                which=own.get("window"),
                softcap=self.architecture.attention_softcap,
                implementation=attention,
            )

            def through(x_BTD: Array, adapter: Params | None) -> Array:
                block = bind(Block, self.architecture, weights, adapter, lora)
                x_BTD = checkpoint_name(x_BTD, RESIDUAL)
                x_BTD, _ = block(x_BTD, turn, lambda q, k, v: (attend_row(q, k, v), None))
                return constrain(x_BTD, ("batch", "length", "width"))

            return tuple(map(through, states, of_roles)), None

        if remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[remat], prevent_cse=False)
        x_BTD = constrain(self.embed(tokens, positions, dtype), ("batch", "length", "width"))
        states, _ = jax.lax.scan(layer, (x_BTD,) * len(adapters), (stacked, stacked_adapters, varying))
        return tuple(self.final_norm(x_BTD)[:, :length] for x_BTD in states)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the norms may also stand behind, or on both sides."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
        self.is_parallel = architecture.parallel_residual
        if architecture.norm_placement != "post":
            self.attention_norm = Norm(architecture, rngs)
            self.mlp_norm = Norm(architecture, rngs)
        if architecture.norm_placement != "pre":
            self.attention_post_norm = Norm(architecture, rngs)
            self.mlp_post_norm = Norm(architecture, rngs)
        self.attention = Attention(architecture, rngs, lora)
        self.mlp = Experts(architecture, rngs) if architecture.num_experts else MLP(architecture, rngs, lora)

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

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
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
        _add_adapters(self, rngs, lora, dict.fromkeys("qkv", 1) | {"o": 2})

    def __call__(self, x: Array, turn: Rotation, attend: Attend) -> tuple[Array, Any]:
        q, k, v = (self._project(name, x) for name in "qkv")
        if self.is_rotary:
            q, k = rotate(q, turn), rotate(k, turn)
        attended, kept = attend(q, k, v)
        out = jnp.einsum("btnh,nhd->btd", attended, self.o[...].astype(x.dtype))
        return _plus(_adapted(out, self, "o", attended), self, "o_bias"), kept

    def _project(self, name: str, x: Array) -> Array:
        heads = jnp.einsum("btd,dnh->btnh", x, getattr(self, name)[...].astype(x.dtype))
        heads = _plus(_adapted(heads, self, name, x), self, f"{name}_bias")
        return getattr(self, f"{name}_norm")(heads) if hasattr(self, f"{name}_norm") else heads


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))). Source: arXiv:2002.05202."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs, lora: Lora | None = None) -> None:
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
        _add_adapters(self, rngs, lora, {name: 1 for name in ("gate", "up", "down") if hasattr(self, name)})

    def __call__(self, x: Array) -> Array:
        def times(name: str, y: Array) -> Array:
            out = y @ getattr(self, name)[...].astype(x.dtype)
            return _plus(_adapted(out, self, name, y), self, f"{name}_bias")

        act, up = _ACTIVATIONS[self.activation], times("up", x)
        return times("down", act(times("gate", x)) * up if self.is_gated else act(up))


class Adapter(nnx.Module):
    """s (x A) B, zero to start with: what is learned beside a weight. Source: arXiv:2106.09685.

    A starts as PEFT starts it, Kaiming-uniform with slope sqrt(5).
    """

    def __init__(self, weight: nnx.Param, num_inputs: int, lora: Lora, rngs: nnx.Rngs) -> None:
        axes, split = weight.get_metadata()["axes"], num_inputs
        inputs, outputs = weight.shape[:split], weight.shape[split:]
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(rngs.params(), (*inputs, lora.rank), jnp.float32, -bound, bound)
        self.scale = lora.scale
        self.a = nnx.Param(a, axes=(*axes[:split], "rank"))
        self.b = nnx.Param(jnp.zeros((lora.rank, *outputs), jnp.float32), axes=("rank", *axes[split:]))

    def __call__(self, x: Array) -> Array:
        a, b = (part[...].astype(x.dtype) for part in (self.a, self.b))
        return self.scale * jnp.tensordot(jnp.tensordot(x, a, axes=a.ndim - 1), b, axes=1)


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
        x = lookup(self.embedding[...], tokens, dtype)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, dtype)
        return x + self.position[...][positions].astype(dtype) if hasattr(self, "position") else x


def _filled(tokens: Array, positions: Array, segments: Array | None) -> tuple[Array, Array, Array | None]:
    """Returns rows whose tokens divide over the devices; what is added stands behind, where none sees it."""
    missing = -tokens.shape[1] % num_parts("length")

    def fill(x: Array) -> Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), mode="edge")

    if not missing:
        return tokens, positions, segments
    return fill(tokens), fill(positions), None if segments is None else fill(segments)


def _weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float = INIT_STD
) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def _add_adapters(module: nnx.Module, rngs: nnx.Rngs, lora: Lora | None, num_inputs: dict[str, int]) -> None:
    """Puts adapters beside those of the module's weights that are targets; how many dimensions are inputs."""
    for name, count in num_inputs.items():
        if lora is not None and name in lora.targets:
            setattr(module, f"{name}{SUFFIX}", Adapter(getattr(module, name), count, lora, rngs))


def _adapted(out: Array, module: nnx.Module, name: str, x: Array) -> Array:
    """Returns a weight's products with x plus its adapter's, where it has one."""
    adapter = getattr(module, f"{name}{SUFFIX}", None)
    return out if adapter is None else out + adapter(x)


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
