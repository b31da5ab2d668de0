"""Reward and value models in the layout of transformers' sequence classification, in and out.

A scorer is a trunk and `score.weight` [1, D]; config.json names `...ForSequenceClassification` and one label.
transformers' logit is score.weight . hidden, without bias, at the last token that is not `pad_token_id`. Two
keys of config.json are ours, and absent where others wrote it:

    score_normalizer    {"mean": m, "std": s}: the score is (logit - m) / s; m = 0, s = 1 where it is absent.
                        A value model's bias b stands there as well, as m = -b.
    score_role          "reward": the score is that of a whole text; "value": of the state after each token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.batch import Params
from rlhf_jax.models import hf, tensor_files
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.families import to_hf
from rlhf_jax.models.heads import fold_normalizer
from rlhf_jax.models.tensor_files import NewTensor, open_tensors
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import place

SCORE = "score.weight"
_SUFFIX = "ForSequenceClassification"

Role = Literal["reward", "value"]


class Normalizer(NamedTuple):
    """A score is (logit - mean) / std."""

    mean: float
    std: float


RAW = Normalizer(mean=0.0, std=1.0)


class Scorer(NamedTuple):
    """What config.json says of a scorer."""

    architecture: Architecture
    pad_id: int | None
    """A score is read at the last token that is not this one; None: at the last token."""
    normalizer: Normalizer
    role: Role


def is_scorer(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is that of sequence classification."""
    return any(str(name).endswith(_SUFFIX) for name in config.get("architectures") or [])


def is_own_scorer(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is one that `save_scorer` wrote."""
    return "score_role" in config


def read_scorer(directory: str | os.PathLike[str]) -> Scorer:
    """Returns what a directory's config.json says of a scorer.

    Raises:
        ValueError: no such directory or file, a model that is not supported, one without a score head or with
            several labels, or a normaliser that is none.
    """
    architecture, config = hf.read_architecture(directory), hf.read_config(directory)
    path = Path(directory) / "config.json"
    if not is_scorer(config):
        raise ValueError(
            f"{directory} has no score head: architectures in its config.json is "
            f"{config.get('architectures')}; a reward model is one of sequence classification, such as "
            f"Llama{_SUFFIX}, with one label"
        )
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # as transformers
    if num_labels != 1:
        raise ValueError(
            f"{path}: the model has {num_labels} labels (num_labels, id2label); a reward model has "
            "one, its score"
        )
    pad_id = config.get("pad_token_id")
    if pad_id is not None and type(pad_id) is not int:
        raise ValueError(f"{path}: pad_token_id is {pad_id!r}; it must be a token's id or null")
    role = config.get("score_role", "reward")
    if role not in ("reward", "value"):
        raise ValueError(f"{path}: score_role is {role!r}; it must be 'reward' or 'value'")
    return Scorer(architecture, pad_id, _normalizer(config.get("score_normalizer", {}), path), role)


def check_scorer(directory: str | os.PathLike[str], scorer: Scorer) -> None:
    """Raises what `load_scorer` would raise, reading the headers alone."""
    hf.checked_tensors(directory, scorer.architecture, open_tensors(Path(directory)), _head_shape(scorer))


def load_scorer(
    directory: str | os.PathLike[str], scorer: Scorer, shardings: Params, dtype: hf.Dtype = "float32"
) -> Params:
    """Returns a trunk and a score head with the normaliser folded into it, as `hf.load_policy` does.

    Args:
        directory: config.json and safetensors.
        scorer: see `read_scorer`.
        shardings: of the parameters, in their tree.
        dtype: of the trunk; the head is float32.
    Raises:
        ValueError: see `hf.load_policy`.
    """
    files = open_tensors(Path(directory))
    expected = hf.checked_tensors(directory, scorer.architecture, files, _head_shape(scorer))
    trunk = hf.read_parameters(directory, expected, files, {"trunk": shardings["trunk"]}, dtype)
    kernel = jnp.asarray(files[SCORE][0], jnp.float32)
    head = fold_normalizer({"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}, *scorer.normalizer)
    return trunk | {"score_head": place(head, shardings["score_head"])}


def save_scorer(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    params: Params,
    role: Role,
    normalizer: Normalizer = RAW,
    dtype: hf.Dtype = "float32",
    token_ids: Mapping[str, int] | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors for transformers' AutoModelForSequenceClassification.

    All processes call it. The head's bias and the normaliser go to `score_normalizer`: transformers gives the
    logit, from which the score is (logit - mean) / std.

    Args:
        directory: made where it does not exist.
        architecture: of the trunk.
        params: trunk and score head, sharded in any way.
        role: reward or value.
        normalizer: of the scores of these parameters.
        dtype: of the tensors written.
        token_ids: see `families.to_hf`. transformers finds the last token of a text by `pad_token_id`.
        shard_bytes: see `hf.save_policy`.
    Raises:
        ValueError: see `hf.save_policy`; or a pad_token_id that is also the EOS: transformers would then read
            the score before the EOS.
    """
    ids = dict(token_ids or {})
    if ids.get("pad_token_id") is not None and ids.get("pad_token_id") == ids.get("eos_token_id"):
        raise ValueError(
            f"pad_token_id and eos_token_id are both {ids['eos_token_id']}: transformers reads a score at "
            "the last token that is not pad, and so would leave out the EOS; set another tokenizer.pad_token"
        )
    hf.check_range(params, dtype)
    shapes = make_model(architecture).score_shapes
    tensors = hf.new_tensors(architecture, {"trunk": params["trunk"]}, {"trunk": shapes["trunk"]}, dtype)
    kernel, bias = params["score_head"]["kernel"], float(np.asarray(params["score_head"]["bias"]))
    tensors.append(NewTensor(SCORE, (1, *kernel.shape), lambda: hf.gather(kernel)[None]))
    config = to_hf(architecture, dtype, token_ids)
    (name,) = config["architectures"]
    name = name.replace("Gemma3For", "Gemma3TextFor")  # of gemma3_text; theirs without "Text" sees images too
    config |= {
        "architectures": [name.replace("ForCausalLM", _SUFFIX).replace("LMHeadModel", _SUFFIX)],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "score_role": role,
        "score_normalizer": {"mean": normalizer.mean - bias, "std": normalizer.std},
    }
    hf.write_checkpoint(directory, tensors, config, dtype, shard_bytes)


def _head_shape(scorer: Scorer) -> dict[str, tuple[int, ...]]:
    return {SCORE: (1, scorer.architecture.hidden_size)}


def _normalizer(stored: Any, path: Path) -> Normalizer:
    numbers = RAW._asdict() | stored if isinstance(stored, dict) else {}
    is_good = numbers.keys() == RAW._asdict().keys() and all(
        type(x) in (int, float) and isfinite(x) for x in numbers.values()
    )
    if not is_good or numbers["std"] <= 0:
        raise ValueError(
            f'{path}: score_normalizer is {stored!r}; it must be such as {{"mean": 0.5, "std": 2.0}}, std > 0'
        )
    return Normalizer(float(numbers["mean"]), float(numbers["std"]))
