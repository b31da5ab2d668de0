"""The decoder-only transformer: Flax NNX modules inside, pure functions of parameter trees outside."""

from __future__ import annotations

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
from rlhf_jax.models.blocks import INIT_STD, Block, Embed, Norm, abstract_module, bind
from rlhf_jax.models.heads import SINGLE, Ensemble, score_head_axes, zero_score_head
from rlhf_jax.models.lora import Lora, adapter_of
from rlhf_jax.models.rope import rotation
from rlhf_jax.models.row_attention import Implementation, row_attention
from rlhf_jax.sharding import HOST_MEMORY, constrain, device_platform, num_parts

POLICY = ("trunk", "lm_head")
"""The parts of a whole policy; with tied embeddings there is no LM head."""
SCORER = ("trunk", "score_head")
"""The parts of a whole reward or value model."""

Remat = Literal["none", "dots", "full", "offload"]
MOST_UNROLLED = 16  # blocks that are unrolled where it is not said
RESIDUAL = "residual"  # what goes into a block
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}


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
    ensemble: Ensemble
    """What its reward heads are like."""

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
    ensemble: Ensemble = SINGLE,
    unroll: int = 0,
) -> Model:
    """Returns the pure functions of one architecture; for the same arguments the same functions.

    Args:
        architecture: sizes.
        dtype: of activations; parameters are float32 and are cast where they are used.
        remat: what the backward pass recomputes of a block: nothing, all but products with weights, all, or
            all with what goes into the block kept in the host's memory.
        attention: see `row_attention`.
        lora: the adapters that roles may have.
        ensemble: the heads of a reward model; a model with several has no other role.
        unroll: how many blocks one turn of the loop over them computes; 0: see `blocks_per_turn`.
    """
    axes = {
        "trunk": _axes(abstract_module(Trunk, architecture)[1]),
        "score_head": score_head_axes(ensemble.num_heads),
    }
    if not architecture.tie_embeddings:
        axes["lm_head"] = {"kernel": ("embed", "vocab")}
    if lora is not None:
        axes["adapter"] = adapter_of(_axes(abstract_module(Trunk, architecture, lora)[1]))

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
        of = (tokens, positions, segments)
        return module(*of, jnp.dtype(dtype), remat, attention, tuple(adapters), lora, unroll)

    def hidden(trunk: Params, tokens: Array, *rows: Array | None, **options: Array | None) -> Array:
        return hidden_of_roles(trunk, (None,), tokens, *rows, **options)[0]

    def init_parts(key: Array) -> Params:
        head = zero_score_head(architecture.hidden_size, ensemble.num_heads)
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
        ensemble=ensemble,
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
        unroll: int = 0,
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

        num_layers = self.architecture.num_layers
        unroll = unroll or blocks_per_turn(num_layers, remat)
        if remat != "none":
            layer = jax.checkpoint(
                layer, policy=_REMAT_POLICIES[remat], prevent_cse=is_outside(unroll, num_layers)
            )
        x_BTD = constrain(self.embed(tokens, positions, dtype), ("batch", "length", "width"))
        of_layers = (stacked, stacked_adapters, varying)
        states, _ = jax.lax.scan(layer, (x_BTD,) * len(adapters), of_layers, unroll=unroll)
        return tuple(self.final_norm(x_BTD)[:, :length] for x_BTD in states)


def blocks_per_turn(num_layers: int, remat: Remat) -> int:
    """Returns how many blocks one turn of the loop over them computes where that is not said.

    All on a CPU, where a loop copies each block's weights, residuals and gradients, unless they are very many
    and compile long, or recomputed, for the sake of memory; else one.
    """
    is_unrolled = device_platform() == "cpu" and remat == "none" and num_layers <= MOST_UNROLLED
    return num_layers if is_unrolled else 1


def is_outside(unroll: int, num_layers: int) -> bool:
    """Returns whether a loop that computes so many blocks in a turn leaves some outside.

    There the backward pass stands beside the forward pass, and what it computes again could be taken for what
    that has computed.
    """
    return unroll >= num_layers or num_layers % unroll > 0


def _filled(tokens: Array, positions: Array, segments: Array | None) -> tuple[Array, Array, Array | None]:
    """Returns rows whose tokens divide over the devices; what is added stands behind, where none sees it."""
    missing = -tokens.shape[1] % num_parts("length")

    def fill(x: Array) -> Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), mode="edge")

    if not missing:
        return tokens, positions, segments
    return fill(tokens), fill(positions), None if segments is None else fill(segments)


def _axes(abstract: Any) -> Params:
    """Returns the logical axes in the parameters' metadata; stacked layers have one more in front."""
    axes = nnx.to_pure_dict(abstract, lambda variable: variable.get_metadata()["axes"])
    stacked = jax.tree.map(
        lambda names: ("layers", *names), axes["layers"], is_leaf=lambda x: isinstance(x, tuple)
    )
    return axes | {"layers": stacked}
