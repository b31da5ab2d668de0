"""What a config.json says in several ways, or not with a key of its own: rotary positions, windows, Gemma."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.models.architecture import Architecture, RopeScaling

Facts = dict[str, Any]


class Options:
    """A config.json, with transformers' values for what it leaves out, and what is wrong with it."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config, self.defaults = config, defaults
        self.problems: list[str] = []

    def __call__(self, key: str) -> Any:
        """Returns the value of a key; None where it is null, or missing without a default."""
        return self.config.get(key, self.defaults.get(key))

    def size(self, key: str) -> int:
        """Returns a positive integer; 1 where it is none, which then is a problem."""
        value = self(key)
        if type(value) is int and value > 0:
            return value
        if value is not None:  # what is missing is told by the one who needs it
            self.problems.append(f"{key} is {value!r}; it must be a positive integer")
        return 1

    def number(self, name: str, *values: Any) -> float:
        """Returns the first of the values that is not None; 1 where it is no positive number, a problem."""
        value = next((value for value in values if value is not None), None)
        if value is None:
            self.problems.append(f"{name} is missing")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{name} is {value!r}; it must be a number")
        elif not 0 < value < math.inf:
            self.problems.append(f"{name} is {value!r}; it must be positive")
        else:
            return float(value)
        return 1.0

    def sequence(self, of: Mapping[str, Any], key: str) -> list[float]:
        """Returns a list of positive numbers in a mapping; [] where it is none, which then is a problem."""
        found = of.get(key)
        if not isinstance(found, list) or not found:
            self.problems.append(f"{key} is {found!r}; it must be a list of numbers")
            return []
        return [self.number(key, value) for value in found]

    def mapping(self, of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Returns a mapping in another; {} where there is none."""
        found = of.get(key)
        if found is None or isinstance(found, Mapping):
            return found or {}
        self.problems.append(f"{key} is {found!r}; it must be a mapping")
        return {}


# Rotary positions

_ORIGINAL = "original_max_position_embeddings"


def rope(
    theta_key: str = "rope_theta", theta: float = 10000.0, share_key: str = "", share: float = 1.0
) -> tuple[Callable[[Options], Facts], Callable[[Architecture], Facts]]:
    """Returns what reads and writes rotary positions that are the same in all layers.

    Args:
        theta_key: the key of the base, where it is not in rope_parameters.
        theta: its default.
        share_key: the key of the share of dimensions that turn; "": all do.
        share: its default.
    """

    def read(options: Options) -> Facts:
        found = _rope_parameters(options)
        facts: Facts = {
            "rope_theta": options.number(
                theta_key, found.get("rope_theta"), options.config.get(theta_key), theta
            )
        }
        stated = found.get("partial_rotary_factor")
        if share_key:
            facts["rotary_fraction"] = options.number(share_key, stated, options.config.get(share_key), share)
        elif stated not in (None, 1.0):
            options.problems.append(f"rope_parameters.partial_rotary_factor is {stated!r}; supported: 1.0")
        return facts | _read_scaling(options, found)

    def write(a: Architecture) -> Facts:
        share = {"partial_rotary_factor": a.rotary_fraction} if share_key else {}
        config: Facts = {theta_key: a.rope_theta}
        config |= {share_key: a.rotary_fraction} if share_key else {}
        if a.rope_scaling is None:
            return config | {"rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta, **share}}
        scaling = scaling_keys(a.rope_scaling)
        config["rope_parameters"] = {"rope_theta": a.rope_theta, **share, **scaling}
        if a.rope_scaling.kind == "longrope":  # transformers 4 wants `type` and two keys more, no others
            config |= {
                "max_position_embeddings": a.rope_scaling.long_context,
                _ORIGINAL: scaling.pop(_ORIGINAL),
            }
            scaling = {"type": scaling.pop("rope_type"), **scaling}
        return config | {"rope_scaling": scaling}

    return read, write


def _rope_parameters(options: Options) -> Mapping[str, Any]:
    old, new = (options.mapping(options.config, key) for key in ("rope_scaling", "rope_parameters"))
    return old or new


def _read_scaling(options: Options, found: Mapping[str, Any]) -> Facts:
    """Returns rope_scaling; also context_length where the frequencies have one meaning only up to there."""
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return {}
    if kind == "su" or (kind == "yarn" and options("model_type") == "phi3"):
        kind = "longrope"  # its names in the first Phi-3
    longest = options.number("max_position_embeddings", options("max_position_embeddings"))
    original = int(options.number(_ORIGINAL, options(_ORIGINAL), found.get(_ORIGINAL), longest))

    def number(key: str, default: float | None = None) -> float:
        return options.number(f"{key} of rope_type {kind!r}", found.get(key), default)

    match kind:
        case "linear":
            return {"rope_scaling": RopeScaling(kind=kind, factor=number("factor"))}
        case "llama3":
            scaling = RopeScaling(
                kind=kind,
                factor=number("factor"),
                original_context=original,
                low_freq_factor=number("low_freq_factor"),
                high_freq_factor=number("high_freq_factor"),
            )
            return {"rope_scaling": scaling}
        case "yarn":
            factor = number("factor", longest / original)
            scales = (1.0, 0.0)  # of the amplitude's numerator and denominator
            if found.get("mscale") and found.get("mscale_all_dim"):
                scales = (number("mscale"), number("mscale_all_dim"))
            over, under = (1 + 0.1 * scale * math.log(max(factor, 1.0)) for scale in scales)
            scaling = RopeScaling(
                kind=kind,
                factor=factor,
                original_context=original,
                amplitude=number("attention_factor", over / under),
                beta_fast=number("beta_fast", 32.0),
                beta_slow=number("beta_slow", 1.0),
                truncate=found.get("truncate", True),
            )
            return {"rope_scaling": scaling}
        case "longrope":
            # Longer rows have other frequencies, at all their positions: another length of the longest row of
            # a batch would change its neighbours. What is computed here ends where the short factors do.
            factor = number("factor", longest / original)
            scaling = RopeScaling(
                kind=kind,
                original_context=original,
                amplitude=number("attention_factor", _long_amplitude(factor, original)),
                short_factors=tuple(options.sequence(found, "short_factor")),
                long_factors=tuple(options.sequence(found, "long_factor")),
                long_context=int(longest),
            )
            return {"rope_scaling": scaling, "context_length": int(min(longest, original))}
    reason = ", which changes frequencies with the length of a row" if kind == "dynamic" else ""
    options.problems.append(
        f"rope_type is {kind!r}{reason}; supported: 'default', 'linear', 'llama3', 'yarn', 'longrope'"
    )
    return {}


def _long_amplitude(factor: float, original: int) -> float:
    """Source: arXiv:2402.13753 section 3.4, as in its code."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def scaling_keys(scaling: RopeScaling) -> Facts:
    """Returns the keys of config.json that tell a scaling, without the base."""
    keys: Facts = {"rope_type": scaling.kind}
    if scaling.kind != "linear":
        keys[_ORIGINAL] = scaling.original_context
    if scaling.kind != "longrope":
        keys["factor"] = scaling.factor
    match scaling.kind:
        case "llama3":
            keys |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        case "yarn":
            keys |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            keys |= {"truncate": scaling.truncate, "attention_factor": scaling.amplitude}
        case "longrope":
            keys |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
            growth = scaling.long_context / scaling.original_context
            if scaling.amplitude != _long_amplitude(growth, scaling.original_context):
                keys["attention_factor"] = scaling.amplitude
    return keys


def read_gemma3_rope(options: Options) -> Facts:
    """Returns two bases, of layers without and with a window; only the first may be scaled."""
    both = options.mapping(options.config, "rope_parameters")
    whole, local = (options.mapping(both, key) for key in ("full_attention", "sliding_attention"))
    whole = {**whole, **options.mapping(options.config, "rope_scaling")}
    if local.get("rope_type", "default") != "default":
        options.problems.append(
            f"rope_parameters.sliding_attention.rope_type is {local['rope_type']!r}; supported: 'default'"
        )
    bases = {
        "rope_theta": options.number("rope_theta", whole.get("rope_theta"), options("rope_theta"), 1e6),
        "local_rope_theta": options.number(
            "rope_local_base_freq", local.get("rope_theta"), options("rope_local_base_freq"), 1e4
        ),
    }
    return bases | _read_scaling(options, whole)


def write_gemma3_rope(a: Architecture) -> Facts:
    """Returns what read_gemma3_rope reads."""
    scaling = scaling_keys(a.rope_scaling) if a.rope_scaling else {"rope_type": "default"}
    return {
        "rope_theta": a.rope_theta,
        "rope_local_base_freq": a.local_rope_theta,
        "rope_scaling": scaling if a.rope_scaling else None,
        "rope_parameters": {
            "full_attention": {"rope_theta": a.rope_theta, **scaling},
            "sliding_attention": {"rope_type": "default", "rope_theta": a.local_rope_theta},
        },
    }


def read_unrotated_layers(options: Options) -> Facts:
    """Returns SmolLM3's layers without positions: each fourth, or those of a list."""
    num_layers, interval = options.size("num_hidden_layers"), options.size("no_rope_layer_interval")
    rotated = options("no_rope_layers")
    if rotated is None:
        rotated = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    elif not isinstance(rotated, list) or len(rotated) < num_layers:
        options.problems.append(f"no_rope_layers is {rotated!r}; it must be a 0 or 1 for each layer")
        return {}
    return {"unrotated_layers": tuple(layer for layer in range(num_layers) if not rotated[layer])}


def is_unrotated(options: Options, layer: int) -> bool:
    """Returns whether a layer of a SmolLM3 has no positions."""
    return layer in read_unrotated_layers(options).get("unrotated_layers", ())


def write_unrotated_layers(a: Architecture) -> Facts:
    """Returns what read_unrotated_layers reads."""
    return {"no_rope_layers": [int(layer not in a.unrotated_layers) for layer in range(a.num_layers)]}


# Windows


def read_one_window(options: Options) -> Facts:
    """Returns the same window in all layers, or none."""
    window = None if options("use_sliding_window") is False else options("sliding_window")
    return {"windows": (window,) * options.size("num_hidden_layers") if window else ()}


def write_one_window(a: Architecture) -> Facts:
    """Returns what read_one_window reads."""
    return {"sliding_window": a.windows[0] if a.windows else None}


def write_one_optional_window(a: Architecture) -> Facts:
    """Returns what read_one_window reads where use_sliding_window is a key."""
    return write_one_window(a) | {"use_sliding_window": bool(a.windows)}


def layer_windows(has_window: Callable[[Options, int], bool]) -> Callable[[Options], Facts]:
    """Returns what reads windows of layers that layer_types tells apart.

    Args:
        has_window: of a layer, where there are no layer_types.
    """

    def read(options: Options) -> Facts:
        num_layers = options.size("num_hidden_layers")
        window = None if options("use_sliding_window") is False else options("sliding_window")
        types = options("layer_types")
        if types is None:
            local = [bool(window) and has_window(options, layer) for layer in range(num_layers)]
        elif (
            not isinstance(types, list)
            or len(types) != num_layers
            or set(types) - {"sliding_attention", "full_attention"}
        ):
            options.problems.append(
                f"layer_types is {types!r}; it must be 'full_attention' or 'sliding_attention' for each of "
                f"the {num_layers} layers"
            )
            return {}
        else:
            local = [kind == "sliding_attention" for kind in types]
        if any(local) and not window:
            options.problems.append("layer_types has 'sliding_attention', but there is no sliding_window")
        return {"windows": tuple(window or 0 if here else 0 for here in local) if any(local) else ()}

    return read


def write_layer_windows(a: Architecture) -> Facts:
    """Returns what layer_windows reads."""
    windows = a.windows or (0,) * a.num_layers
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": types}


def write_optional_layer_windows(a: Architecture) -> Facts:
    """Returns what layer_windows reads where use_sliding_window is a key."""
    first = next((layer for layer, window in enumerate(a.windows) if window), a.num_layers)
    written = write_layer_windows(a) | {"use_sliding_window": bool(a.windows)}
    return written | {"max_window_layers": first}  # what transformers before layer_types reads


# Qwen3-MoE


def read_qwen_experts(options: Options) -> Facts:
    """Returns the number of experts, which transformers 4 and 5 write with different keys."""
    found = (options("num_experts"), options("num_local_experts"), 128)
    return {"num_experts": next(value for value in found if value is not None)}


def write_qwen_experts(a: Architecture) -> Facts:
    """Returns what read_qwen_experts reads."""
    return {"num_experts": a.num_experts, "num_local_experts": a.num_experts}


# Gemma


def read_embedding_scale(options: Options) -> Facts:
    """Returns what embeddings are multiplied with, the root of the width; no key tells it."""
    return {"embedding_scale": options.size("hidden_size") ** 0.5}


def write_nothing(a: Architecture) -> Facts:
    """Returns no key."""
    return {}


def read_query_scale(options: Options) -> Facts:
    """Returns the scale of attention, query_pre_attn_scalar^-0.5."""
    return {
        "attention_scale": options.number("query_pre_attn_scalar", options("query_pre_attn_scalar")) ** -0.5
    }


def write_query_scale(a: Architecture) -> Facts:
    """Returns what read_query_scale reads."""
    return {"query_pre_attn_scalar": round(a.score_scale**-2)}


def read_gemma_activation(options: Options) -> Facts:
    """Returns gelu_tanh: the first Gemmas say "gelu" and mean it."""
    for key in ("hidden_act", "hidden_activation"):
        if options.config.get(key) not in (None, "gelu", "gelu_pytorch_tanh"):
            options.problems.append(f"{key} is {options.config[key]!r}; supported: 'gelu_pytorch_tanh'")
    return {"activation": "gelu_tanh"}


def write_gemma_activation(a: Architecture) -> Facts:
    """Returns what read_gemma_activation reads."""
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
