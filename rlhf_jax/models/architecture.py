"""What a decoder-only transformer looks like, as numbers; to and from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_jax.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Llama: pre-norm blocks of rotary grouped-query attention and SwiGLU, RMSNorm, no biases.

    Raises:
        ValueError: numbers that do not fit together; all of them in one message.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = {"int": int, "float": (int, float), "bool": bool}[str(field.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type != "bool"):
                problems.append(f"{field.name} is {value!r}; it must be of type {field.type}")
            elif field.type != "bool" and not 0 < value < float("inf"):
                problems.append(f"{field.name} is {value}; it must be positive")
        if not problems and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if not problems and self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of numbers")
        if problems:
            raise ValueError("impossible architecture: " + "; ".join(problems))

    @classmethod
    def from_config(cls, config: ModelConfig, vocab_size: int) -> Architecture:
        """Returns the architecture that a `model` section without a checkpoint describes.

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
    def from_dict(cls, numbers: Mapping[str, Any]) -> Architecture:
        """Returns the architecture that `to_dict` wrote.

        Raises:
            ValueError: a field is missing or unknown, or an impossible architecture.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(numbers) != names:
            missing, unknown = sorted(names - set(numbers)), sorted(set(numbers) - names)
            raise ValueError(f"not an architecture: missing {missing}, unknown {unknown}")
        return cls(**numbers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Architecture:
        """Returns the architecture of a Hugging Face config.json, as read from JSON.

        Keys that a Llama's config may leave out have the values that transformers gives them. Both spellings
        of the rotary base are read: `rope_parameters` (transformers 5) and `rope_theta` (before).

        Raises:
            ValueError: a model or an option that the transformer here does not compute; all in one message.
        """
        if config.get("model_type") != "llama":
            raise ValueError(f"model_type is {config.get('model_type')!r}; supported: 'llama'")
        problems = [f"{name} is missing" for name in _REQUIRED if config.get(name) is None]
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        problems += [
            f"{name} is {size!r}; it must be a positive integer"
            for name, size in (("num_attention_heads", heads), ("hidden_size", width))
            if size is not None and not (type(size) is int and size > 0)
        ]
        for name, supported in _SUPPORTED.items():
            if config.get(name, supported) != supported:
                problems.append(f"{name} is {config[name]!r}; supported: {supported!r}")
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            problems.append(f"rope_parameters is {rope!r}; it must be a mapping")
            rope = {}
        theta = next(
            (t for t in (rope.get("rope_theta"), config.get("rope_theta")) if t is not None), 10000.0
        )
        if isinstance(theta, bool) or not isinstance(theta, int | float):
            problems.append(f"rope_theta is {theta!r}; it must be a number")
        for name, supported in _SUPPORTED_ROPE.items():
            if rope.get(name, supported) != supported:
                problems.append(f"rope_parameters.{name} is {rope[name]!r}; supported: {supported!r}")
        if problems:
            raise ValueError("this llama is not supported: " + "; ".join(problems))
        assert isinstance(heads, int) and isinstance(width, int)

        def optional(name: str, default: Any) -> Any:
            return default if config.get(name) is None else config[name]

        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=width,
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=optional("num_key_value_heads", heads),
            head_dim=optional("head_dim", width // heads),
            mlp_size=config["intermediate_size"],
            context_length=optional("max_position_embeddings", 2048),
            rope_theta=float(theta),
            norm_eps=optional("rms_norm_eps", 1e-6),
            tie_embeddings=optional("tie_word_embeddings", False),
        )

    def to_hf(self, dtype: str = "float32", token_ids: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Returns a config.json that transformers reads as LlamaForCausalLM, of version 4 and 5.

        Args:
            dtype: of the stored weights.
            token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; those not given are null, since the
                defaults of transformers (1 and 2) would be ordinary tokens of another tokenizer.
        """
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | dict(token_ids or {})
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": dtype,
            **special,
        }


_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What the transformer computes; another value of one of these would silently be another model.
_SUPPORTED: dict[str, Any] = {
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
}
_SUPPORTED_ROPE: dict[str, Any] = {"rope_type": "default", "partial_rotary_factor": 1.0}
