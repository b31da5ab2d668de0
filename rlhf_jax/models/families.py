"""The families of models in Hugging Face's format, as a table: config.json to Architecture and back.

A row says what all models of a family have in common, which key of config.json is which field, and which
table of tensors is theirs. What config.json tells in several ways is read and written by config_json.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.models import config_json as options
from rlhf_jax.models import tensor_tables as tables
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.config_json import Facts, Options

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# Fields of which null is a value: as many as heads, hidden_size / heads, 4 hidden_size, none.
_NULLABLE = ("num_kv_heads", "head_dim", "mlp_size", "attention_softcap", "final_softcap")
# Field: key.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_size": "intermediate_size",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_FINAL_CAP = {"final_softcap": "final_logit_softcapping"}
_CAPS = {"attention_softcap": "attn_logit_softcapping"} | _FINAL_CAP
_GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "mlp_size": "n_inner",
    "context_length": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
_GPT_NEOX_KEYS = {key: name for key, name in _KEYS.items() if key not in ("num_kv_heads", "head_dim")} | {
    "norm_eps": "layer_norm_eps"
}
_MOE_KEYS = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
_QWEN3_MOE_KEYS = {
    "mlp_size": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "normalize_expert_weights": "norm_topk_prob",
}
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_QWEN_DEFAULTS |= {"use_sliding_window": False, "num_key_value_heads": 32}
_GEMMA_DEFAULTS = {"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA_DEFAULTS |= {"attention_bias": False}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256}
_GEMMA2_DEFAULTS |= {"sliding_window": 4096}
_LAYER_NORM = {"norm": "layer", "gated": False, "mlp_bias": True}
_CAUSAL = {"use_bidirectional_attention": False}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one model_type have in common, and how their config.json says the rest."""

    model_class: str
    """In transformers."""
    tensors: tables.Tensors
    base: str = "model."
    """What the names of tensors lack in a checkpoint of the model without LM head."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture that are the same in all models."""
    keys: Mapping[str, str] = field(default_factory=lambda: _KEYS)
    """Fields of the architecture: the key of config.json that is the same thing."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of keys that a config.json may leave out, where they are not _DEFAULTS."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys that may have this value alone (or null): another would be a model that is not computed here."""
    activation: tuple[str, str] | None = ("hidden_act", "silu")
    """Key, and the value where it is missing."""
    special: tuple[tuple[Callable[[Options], Facts], Callable[[Architecture], Facts]], ...] = (
        options.rope(),
    )
    """Pairs that read further fields and write their keys."""


_ONE_WINDOW = (options.read_one_window, options.write_one_window)
_QWEN_WINDOWS = (
    options.layer_windows(lambda found, layer: layer >= found("max_window_layers")),
    options.write_optional_layer_windows,
)
_QUERY_SCALE = (options.read_query_scale, options.write_query_scale)
_EMBEDDING_SCALE = (options.read_embedding_scale, options.write_nothing)

FAMILIES = {
    "llama": Family(
        model_class="LlamaForCausalLM",
        tensors=tables.LLAMA,
        keys=_KEYS | _BIASES | {"mlp_bias": "mlp_bias"},
        defaults={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        model_class="MistralForCausalLM",
        tensors=tables.LLAMA,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        special=(options.rope(), _ONE_WINDOW),
    ),
    "mixtral": Family(
        model_class="MixtralForCausalLM",
        tensors=tables.MIXTRAL,
        keys=_KEYS | _MOE_KEYS,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        special=(options.rope(theta=1e6), _ONE_WINDOW),
    ),
    "qwen2": Family(
        model_class="Qwen2ForCausalLM",
        tensors=tables.LLAMA,
        facts={"qkv_bias": True},
        defaults=_QWEN_DEFAULTS,
        special=(options.rope(), _QWEN_WINDOWS),
    ),
    "qwen3": Family(
        model_class="Qwen3ForCausalLM",
        tensors=tables.LLAMA,
        facts={"qk_norm": "head"},
        keys=_KEYS | _BIASES,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
        special=(options.rope(), _QWEN_WINDOWS),
    ),
    "qwen3_moe": Family(
        model_class="Qwen3MoeForCausalLM",
        tensors=tables.QWEN3_MOE,
        facts={"qk_norm": "head"},
        keys=_KEYS | _BIASES | _QWEN3_MOE_KEYS,
        defaults=_QWEN_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "attention_bias": False,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
        special=(
            options.rope(),
            (options.read_one_window, options.write_one_optional_window),
            (options.read_qwen_experts, options.write_qwen_experts),
        ),
    ),
    "gemma": Family(
        model_class="GemmaForCausalLM",
        tensors=tables.LLAMA,
        facts={"norm_offset": True},
        keys=_KEYS | _BIASES,
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        only=_CAUSAL,
        activation=None,
        special=(
            options.rope(),
            _EMBEDDING_SCALE,
            (options.read_gemma_activation, options.write_gemma_activation),
        ),
    ),
    "gemma2": Family(
        model_class="Gemma2ForCausalLM",
        tensors=tables.GEMMA2,
        facts={"norm_offset": True, "norm_placement": "sandwich"},
        keys=_KEYS | _BIASES | _CAPS,
        defaults=_GEMMA2_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        only=_CAUSAL,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        special=(
            options.rope(),
            (options.layer_windows(lambda found, layer: layer % 2 == 0), options.write_layer_windows),
            _QUERY_SCALE,
            _EMBEDDING_SCALE,
        ),
    ),
    "gemma3_text": Family(
        model_class="Gemma3ForCausalLM",
        tensors=tables.GEMMA2,
        facts={"norm_offset": True, "norm_placement": "sandwich", "qk_norm": "head"},
        keys=_KEYS | _BIASES | _FINAL_CAP,
        defaults=_GEMMA2_DEFAULTS | {"max_position_embeddings": 131072, "sliding_window_pattern": 6},
        only=_CAUSAL | {"attn_logit_softcapping": None},  # transformers has the key, and does not apply it
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        special=(
            (options.read_gemma3_rope, options.write_gemma3_rope),
            (
                options.layer_windows(
                    lambda found, layer: (layer + 1) % found.size("sliding_window_pattern") > 0
                ),
                options.write_layer_windows,
            ),
            _QUERY_SCALE,
            _EMBEDDING_SCALE,
        ),
    ),
    "gpt2": Family(
        model_class="GPT2LMHeadModel",
        tensors=tables.GPT2,
        base="transformer.",
        facts=_LAYER_NORM | {"positions": "learned", "rope_theta": 10000.0, "qkv_bias": True, "o_bias": True},
        keys=_GPT2_KEYS,
        defaults={"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        activation=("activation_function", "gelu_new"),
        special=(),
    ),
    "gpt_neox": Family(
        model_class="GPTNeoXForCausalLM",
        tensors=tables.GPT_NEOX,
        base="gpt_neox.",
        facts=_LAYER_NORM,
        keys=_GPT_NEOX_KEYS | _BIASES | {"parallel_residual": "use_parallel_residual"},
        defaults={"layer_norm_eps": 1e-5, "attention_bias": True, "use_parallel_residual": True},
        activation=("hidden_act", "gelu"),
        special=(options.rope("rotary_emb_base", share_key="rotary_pct", share=0.25),),
    ),
    "phi3": Family(
        model_class="Phi3ForCausalLM",
        tensors=tables.PHI3,
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        special=(options.rope(share_key="partial_rotary_factor"), _ONE_WINDOW),
    ),
    "olmo2": Family(
        model_class="Olmo2ForCausalLM",
        tensors=tables.OLMO2,
        facts={"norm_placement": "post", "qk_norm": "all"},
        keys=_KEYS | _BIASES,
        defaults={"rms_norm_eps": 1e-5, "attention_bias": False},
    ),
    "smollm3": Family(
        model_class="SmolLM3ForCausalLM",
        tensors=tables.LLAMA,
        keys=_KEYS | _BIASES | {"mlp_bias": "mlp_bias"},
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        },
        special=(
            options.rope(theta=2e6),
            (options.read_unrotated_layers, options.write_unrotated_layers),
            (options.layer_windows(options.is_unrotated), options.write_optional_layer_windows),
        ),
    ),
}


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Returns the architecture of a Hugging Face config.json, as read from JSON.

    Keys that may be left out have the values that transformers gives them. The spellings of transformers 4
    and 5 are read: `rope_theta` and `rope_scaling`, or `rope_parameters`.

    Raises:
        ValueError: a model or an option that the transformer here does not compute; all in one message.
    """
    name = config.get("model_type")
    if name == "gemma3":
        raise ValueError(
            "model_type is 'gemma3', a model of images and text; its text model is supported: save it with "
            "transformers' Gemma3ForCausalLM, whose model_type is 'gemma3_text'"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type is {name!r}; supported: {', '.join(map(repr, sorted(FAMILIES)))}")
    family = FAMILIES[name]
    found = Options(config, _DEFAULTS | dict(family.defaults))
    required = [
        family.keys[of] for of in ("vocab_size", "hidden_size", "num_layers", "num_heads", "mlp_size")
    ]
    found.problems += [f"{key} is missing" for key in required if found(key) is None and key != "n_inner"]
    width, num_heads, _ = (found.size(family.keys[of]) for of in ("hidden_size", "num_heads", "num_layers"))
    found.problems += [
        f"{key} is {config[key]!r}; supported: {value!r}"
        for key, value in {"quantization_config": None, **family.only}.items()
        if config.get(key) not in (None, value)
    ]
    facts: Facts = {
        "num_kv_heads": num_heads,
        "head_dim": width // num_heads,
        "mlp_size": 4 * width,
        "family": name,
        **family.facts,
    }
    for of, key in family.keys.items():
        value = found(key)
        if value is None and of not in _NULLABLE:
            value = found.defaults.get(key)
        facts |= {} if value is None else {of: value}
    if family.activation:
        key, default = family.activation
        value = config.get(key) or default
        facts["activation"] = _ACTIVATIONS.get(value)
        if value not in _ACTIVATIONS:
            found.problems.append(f"{key} is {value!r}; supported: {', '.join(map(repr, _ACTIVATIONS))}")
    for read, _ in family.special:
        facts |= read(found)
    if found.problems:
        raise ValueError(f"this {name} is not supported: " + "; ".join(dict.fromkeys(found.problems)))
    return Architecture(**facts)


def to_hf(
    architecture: Architecture, dtype: str = "float32", token_ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Returns a config.json that transformers, of version 4 and 5, reads as this architecture.

    Args:
        architecture: of the policy.
        dtype: of the stored weights.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`; those not given are null, since the
            defaults of transformers would be ordinary tokens of another tokenizer.
    """
    family = FAMILIES[architecture.family]
    config: dict[str, Any] = {"architectures": [family.model_class], "model_type": architecture.family}
    config |= {key: getattr(architecture, of) for of, key in family.keys.items()}
    config |= {_CAPS[of]: getattr(architecture, of) or None for of in _CAPS if of in family.keys}
    if family.activation:
        key, default = family.activation
        names = [name for name in (default, *_ACTIVATIONS) if _ACTIVATIONS[name] == architecture.activation]
        config[key] = names[0]
    for _, write in family.special:
        config |= write(architecture)
    config |= family.only
    config |= {"torch_dtype": dtype, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return config | dict(token_ids or {})
