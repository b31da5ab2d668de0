"""The modules of which the transformer is made: a block, what is in it, and what stands around the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rlhf_jax.batch import ADAPTER, Params
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.experts import choose_experts, run_experts
from rlhf_jax.models.lora import Lora, with_adapter
from rlhf_jax.models.products import times
from rlhf_jax.models.rope import Rotation, rotate
from rlhf_jax.shard_map import Peers, by_tokens, lookup

INIT_STD = 0.02
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}

# Of q, k, v: the attended values, shaped like q, and what the caller wants to keep.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def bind[M: nnx.Module](
    module: type[M],
    architecture: Architecture,
    params: Params,
    adapter: Params | None = None,
    lora: Lora | None = None,
) -> M:
    """Returns a module of this architecture that computes with the given parameters, and an adapter."""
    if not adapter:
        return nnx.merge(abstract_module(module, architecture)[0], params)
    return nnx.merge(abstract_module(module, architecture, lora)[0], with_adapter(params, adapter))


@cache
def abstract_module(module: Callable[..., nnx.Module], *sizes: Architecture | Lora | None) -> tuple[Any, Any]:
    """Returns the graph of a module, and its state without the arrays.

    Args:
        module: its class.
        sizes: the architecture, and the adapters where it has some.
    """

    def make() -> nnx.Module:
        architecture, *lora = sizes
        return module(architecture, nnx.Rngs(params=jax.random.key(0)), *lora)

    return nnx.split(nnx.eval_shape(make))


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
        out = times(attended, self.o[...].astype(x.dtype), 2)
        return _plus(_adapted(out, self, "o", attended), self, "o_bias"), kept

    def _project(self, name: str, x: Array) -> Array:
        heads = times(x, getattr(self, name)[...].astype(x.dtype))
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
        def through(name: str, y: Array) -> Array:
            out = times(y, getattr(self, name)[...].astype(x.dtype))
            return _plus(_adapted(out, self, name, y), self, f"{name}_bias")

        act, up = _ACTIVATIONS[self.activation], through("up", x)
        return through("down", act(through("gate", x)) * up if self.is_gated else act(up))


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
            setattr(module, f"{name}{ADAPTER}", Adapter(getattr(module, name), count, lora, rngs))


def _adapted(out: Array, module: nnx.Module, name: str, x: Array) -> Array:
    """Returns a weight's products with x plus its adapter's, where it has one."""
    adapter = getattr(module, f"{name}{ADAPTER}", None)
    return out if adapter is None else out + adapter(x)


def _plus(x: Array, module: nnx.Module, name: str) -> Array:
    """Returns x plus the module's bias of that name, where it has one."""
    return x + getattr(module, name)[...].astype(x.dtype) if hasattr(module, name) else x


def _residual_std(architecture: Architecture) -> float:
    """Returns the deviation of what writes to the residual stream, whose variance then is that of any depth.

    Source: Radford 2019 (GPT-2), section 2.3.
    """
    return INIT_STD * (2 * architecture.num_layers) ** -0.5
