"""What a decoder-only transformer looks like, as facts; families.py reads them from a config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from rlhf_jax.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of rotary positions are changed for rows longer than those of pretraining.

    Each kind reads the fields that its function in rope.py names.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_context: int = 0
    """Longest row of pretraining."""
    amplitude: float = 1.0
    """Multiplies cosines and sines."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    """Of longrope, one for each frequency; for rows up to original_context."""
    long_factors: tuple[float, ...] = ()
    """The same for longer rows, which are not computed here; kept for writing config.json."""
    long_context: int = 0
    """Longest row of the long factors."""


Rope = Literal["global", "local", "none"]


class LayerKind(NamedTuple):
    """In what a layer may differ from its neighbours, besides its parameters."""

    window: int
    """Tokens that a token sees, itself included; 0: all before it."""
    rope: Rope
    """Which base its rotary positions have; none: it knows no positions."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer; the defaults are a Llama's.

    That is: pre-norm blocks of rotary grouped-query attention and SwiGLU, RMSNorm, no biases.

    Raises:
        ValueError: numbers that do not fit together; all of them in one message.
    """

    family: str = "llama"
    """The model_type in config.json: whose names the tensors have."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    """Of one expert where there are experts."""
    context_length: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool

    norm: Literal["rms", "layer"] = "rms"
    norm_offset: bool = False
    """Norms multiply by 1 + scale."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Before attention and feed-forward, behind them, or both."""
    parallel_residual: bool = False
    """The feed-forward reads what attention reads, not what it wrote."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys before they are rotated: of each head, or of all heads as one vector."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    """down(activation(gate(x)) * up(x)), else down(activation(up(x)))."""

    positions: Literal["rotary", "learned"] = "rotary"
    rotary_fraction: float = 1.0
    """Of the dimensions of a head, how many turn: the first ones."""
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float = 0.0
    """Base in layers with a window, without scaling; 0: as in the others."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers without positions."""
    windows: tuple[int, ...] = ()
    """Of each layer, the tokens that a token sees, itself included; 0, or empty: all before it."""

    attention_scale: float = 0.0
    """Multiplies the products of queries and keys; 0: head_dim^-0.5."""
    attention_softcap: float = 0.0
    """Scores become cap * tanh(score / cap); 0: they stay."""
    final_softcap: float = 0.0
    """The same for logits."""
    embedding_scale: float = 1.0

    num_experts: int = 0
    """0: each block has one feed-forward."""
    experts_per_token: int = 0
    normalize_expert_weights: bool = True
    """The weights of a token's experts sum to 1."""

    def __post_init__(self) -> None:
        problems = _wrong_types(self) or _wrong_numbers(self)
        if problems:
            raise ValueError("impossible architecture: " + "; ".join(problems))

    @property
    def rotary_size(self) -> int:
        """Returns how many dimensions of a head turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def score_scale(self) -> float:
        """Returns what multiplies the products of queries and keys."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Returns in what each layer may differ from its neighbours."""

        def rope(layer: int, window: int) -> Rope:
            if self.positions == "learned" or layer in self.unrotated_layers:
                return "none"
            return "local" if window and self.local_rope_theta else "global"

        windows = self.windows or (0,) * self.num_layers
        return tuple(LayerKind(window, rope(layer, window)) for layer, window in enumerate(windows))

    @classmethod
    def from_config(cls, config: ModelConfig, vocab_size: int) -> Architecture:
        """Returns the Llama that a `model` section without a checkpoint describes.

        Raises:
            ValueError: num_heads does not divide hidden_size, or an impossible architecture.
        """
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"model.num_heads {config.num_heads} does not divide model.hidden_size {config.hidden_size}; "
                "choose a multiple of the heads as hidden size"
            )
        return cls(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            mlp_size=config.mlp_size,
            context_length=config.context_length,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
        )

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Architecture:
        """Returns the architecture that `to_dict` wrote, also an earlier version's with fewer fields.

        Raises:
            ValueError: a field is missing or unknown, or an impossible architecture.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        missing = sorted(
            name
            for name, field in fields.items()
            if name not in facts and field.default is dataclasses.MISSING
        )
        unknown = sorted(set(facts) - set(fields))
        if missing or unknown:
            raise ValueError(f"not an architecture: missing {missing}, unknown {unknown}")
        scaling = facts.get("rope_scaling")
        made = {name: _tuple(value) for name, value in facts.items()}
        if scaling is not None:
            made["rope_scaling"] = RopeScaling(**{name: _tuple(value) for name, value in scaling.items()})
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, fit for JSON."""
        return dataclasses.asdict(self)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _wrong_types(facts: Architecture | RopeScaling) -> list[str]:
    hints = get_type_hints(type(facts))
    problems = []
    for field in dataclasses.fields(facts):
        value, kind = getattr(facts, field.name), hints[field.name]
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                problems.append(f"{field.name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
        elif get_origin(kind) is UnionType:
            problems += [] if value is None else [f"{field.name}.{wrong}" for wrong in _wrong_types(value)]
        elif not _is_a(value, kind):
            problems.append(f"{field.name} is {value!r}; it must be of type {field.type}")
        elif kind in (int, float):
            least = "positive" if field.default is dataclasses.MISSING else "zero or positive"
            if not (0 < value < float("inf") or (value == 0 and least != "positive")):
                problems.append(f"{field.name} is {value}; it must be {least}")
    return problems


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _wrong_numbers(facts: Architecture) -> list[str]:
    problems = []
    if facts.num_heads % facts.num_kv_heads:
        problems.append(f"num_kv_heads {facts.num_kv_heads} does not divide num_heads {facts.num_heads}")
    if facts.positions == "rotary" and facts.head_dim % 2:
        problems.append(f"head_dim {facts.head_dim} is odd; rotary positions turn pairs of numbers")
    elif facts.positions == "rotary" and (facts.rotary_size % 2 or not 0 < facts.rotary_fraction <= 1):
        problems.append(
            f"rotary_fraction {facts.rotary_fraction} makes {facts.rotary_size} of the {facts.head_dim} "
            "dimensions of a head turn; it must be an even number of them"
        )
    if facts.windows and (len(facts.windows) != facts.num_layers or min(facts.windows) < 0):
        problems.append(f"windows are {facts.windows}; they must be {facts.num_layers} numbers, 0 or more")
    if any(not 0 <= layer < facts.num_layers for layer in facts.unrotated_layers):
        problems.append(f"unrotated_layers {facts.unrotated_layers} are not all among the layers")
    if facts.num_experts and not 1 <= facts.experts_per_token <= facts.num_experts:
        problems.append(
            f"experts_per_token is {facts.experts_per_token}; it must be from 1 to {facts.num_experts}"
        )
    scaling = facts.rope_scaling
    if scaling and scaling.kind == "longrope" and 2 * len(scaling.short_factors) != facts.rotary_size:
        problems.append(
            f"rope_scaling has {len(scaling.short_factors)} short factors; it must have one for each of the "
            f"{facts.rotary_size // 2} frequencies"
        )
    if scaling and scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.append(
            f"rope_scaling.high_freq_factor is {scaling.high_freq_factor}; it must be more than "
            f"low_freq_factor, {scaling.low_freq_factor}"
        )
    if scaling and (scaling.factor == 0 or (scaling.kind != "linear" and scaling.original_context == 0)):
        problems.append("rope_scaling must have a positive factor and original_context")
    return problems
