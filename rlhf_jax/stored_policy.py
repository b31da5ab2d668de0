"""A policy in a directory, how it is to be sampled, and prompts for it in tokens: all that the host reads.

What is wrong with any of them is told here, before a device is touched.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from rlhf_jax import command_line
from rlhf_jax.checkpoint import load_info
from rlhf_jax.config import StageConfig
from rlhf_jax.config_types import LARGEST_INT
from rlhf_jax.data.columns import Content
from rlhf_jax.data.examples import load_records, tokenize_records
from rlhf_jax.data.records import PromptOnly, in_template
from rlhf_jax.data.tokenize import stop_id, text_difference, text_settings
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.export import last_policy, read_run_config
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.hub import local_directory
from rlhf_jax.options import show
from rlhf_jax.origins import is_stage_dir, stored_architecture
from rlhf_jax.plan import TEXT_OF_MODEL
from rlhf_jax.rollout.stops import read_stop_ids, read_stop_strings
from rlhf_jax.run_tokenizer import check_vocabulary, tokenizer_dir

logger = logging.getLogger(__name__)

SECTIONS = ("rollout", "data", "model", "tokenizer", "mesh", "distributed", "rewards")
"""Sections of the configuration that sampling reads."""
UNREAD = (
    "data.eval",
    "data.length_buckets",
    "data.max_eval_records",
    "data.train",
    "distributed.save_timeout",
    "distributed.step_timeout",
    "model.logprob_chunk",
    "model.param_dtype",
    "model.sharing",
    "model.remat",
    "model.unroll",
    "rewards.gold",
    "rollout.devices",
    "rollout.importance",
    "rollout.importance_cap",
)
"""Options of these sections that it does not read."""
OF_REWARD_MODEL = ("model.attention", "model.frozen_dtype", "model.frozen_memory")
"""Options that only a reward model needs."""
OF_FILES = ("data.cache_dir", "data.columns", "data.format", "data.prompt_tokens")
"""Options that only a file of prompts needs."""
LIMIT = "max_new_tokens"
"""The column of a record that bounds its completions."""
SLOTS = 16  # unless rollout.slots says otherwise; as many more as the devices need to divide them
STEPS = 32  # between two looks of the host for stop strings


class StoredPolicy(NamedTuple):
    """A policy in a directory, and how it is to be sampled: what the host can tell before it is loaded."""

    path: Path
    """RUN/STAGE, or a Hugging Face directory."""
    architecture: Architecture
    tokenizer: Tokenizer
    stage: StageConfig
    """Its sections are those of SECTIONS."""
    text: Mapping[str, Any]
    """How the text was treated that it was trained on; empty where no stage tells."""


class Requests(NamedTuple):
    """Prompts in tokens."""

    records: list[PromptOnly]
    ids: list[list[int]]
    limits: list[int | None]
    """The most tokens of each one's completions, where its record says so."""
    stop: int
    """The token that ends completions of such prompts."""


def read_options(
    model: str,
    flags: Sequence[str] = (),
    *,
    data: str = "",
    reward_from: str = "",
    context_length: int = LARGEST_INT,
    prompt_template: str = "",
    **rollout: Any,
) -> StageConfig:
    """Returns the options of sampling: those given, over the defaults.

    Args:
        model: named in messages alone.
        flags: `--section.option value`.
        data: a file of prompts, in the notation of data.train; empty: they are given in another way.
        reward_from: a reward model, as of a stage; empty: none.
        context_length: of the model.
        prompt_template: that the model was trained with.
        rollout: options of that section.

    Raises:
        ValueError: options that are unknown, wrong, or would be ignored; all of them.
    """
    tree: dict[str, Any] = {
        "run": {"dir": "."},
        "stages": [{"name": "sample", "algorithm": "ppo", "from": model, "reward_from": reward_from}],
        "data": {
            "train": data or "-",
            "eval": data or "-",
            "max_eval_records": LARGEST_INT,
            "max_prompt_length": context_length,
            "prompt_template": prompt_template,
        },
        "rollout": {"steps_per_call": STEPS, "slots": SLOTS},
    }
    unread = (*UNREAD, *(() if data else OF_FILES), *(() if reward_from else OF_REWARD_MODEL))
    of_rollout = [f"--rollout.{name}={json.dumps(value)}" for name, value in rollout.items()]
    return command_line.read_stage(tree, [*flags, *of_rollout], sections=SECTIONS, unread=unread)


def find_policy(
    model: str, flags: Sequence[str] = (), *, data: str = "", reward_from: str = "", **rollout: Any
) -> StoredPolicy:
    """Returns the policy of a directory; of a run the last that it trained. Arguments as in `read_options`.

    Args:
        model: a run, RUN/STAGE, a Hugging Face directory, or hub:OWNER/NAME[@REVISION].

    Raises:
        ValueError: options that are wrong, no policy there, or a tokenizer that is not its own.
    """
    read_options(
        model, flags, data=data, reward_from=reward_from, **rollout
    )  # what is wrong with these is told first
    path = local_directory(model)
    if not is_stage_dir(path) and (path / "config.yaml").is_file():
        name = last_policy(read_run_config(path))
        if not name:
            raise ValueError(f"{path} has no stage that trains a policy, which alone can be sampled")
        path = path / name
        if not is_stage_dir(path):
            raise ValueError(f"{path} holds no checkpoint yet; name a stage of that run which does")
    architecture = stored_architecture(path, "policy")
    is_stage = is_stage_dir(path)
    text = load_info(path)["text"] if is_stage else {}
    stage = read_options(
        model,
        flags,
        data=data,
        reward_from=reward_from,
        context_length=architecture.context_length,
        prompt_template=text.get("prompt_template") or "",
        **rollout,
    )
    tokenizer = load_tokenizer(stage.tokenizer, str(tokenizer_dir(path) if is_stage else path))
    check_vocabulary(path, tokenizer, stage.tokenizer, architecture)
    read_stop_ids(stage.rollout, tokenizer)
    read_stop_strings(stage.rollout, tokenizer)
    if stage.rollout.max_new_tokens >= architecture.context_length:
        raise ValueError(
            f"rollout.max_new_tokens is {stage.rollout.max_new_tokens}, but the model's context has "
            f"{architecture.context_length} tokens, prompts included; lower it"
        )
    return StoredPolicy(path, architecture, tokenizer, stage, text)


def read_file(policy: StoredPolicy) -> Requests:
    """Returns the prompts of the file that the policy's options name; of synthetic the held-out ones.

    A column `max_new_tokens` of a record bounds its completions.

    Raises:
        ValueError: as load_records, tokenize_records, `read_prompts`.
    """
    (source,) = load_records(policy.stage.data, "prompt_only", "eval", policy.stage.run.seed)
    if source.left_out:
        logger.warning("%s: left out: %s", source.name, dict(source.left_out))
    return _tokenized(policy, [cast(PromptOnly, record) for record in source.records], source.name)


def read_prompts(policy: StoredPolicy, prompts: Sequence[Content], where: str = "prompts") -> Requests:
    """Returns prompts in tokens: of a text as of plain records, of messages by the chat template.

    Args:
        policy: to complete them.
        prompts: texts or conversations, at least one; not some of each.
        where: they come from, for messages.

    Raises:
        ValueError: none, an empty one where the tokenizer has no BOS, a conversation without a chat template,
            or one that is longer than the model's context less the longest completion.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"{where}: give a list of at least one prompt, got {show(prompts)}")
    template = policy.stage.data.prompt_template
    records = [PromptOnly(prompt) for prompt in prompts]
    return _tokenized(policy, [in_template(record, template) for record in records], where)


def _tokenized(policy: StoredPolicy, records: Sequence[PromptOnly], where: str) -> Requests:
    data, rollout, tokenizer = policy.stage.data, policy.stage.rollout, policy.tokenizer
    limit = min(data.max_prompt_length, policy.architecture.context_length - rollout.max_new_tokens)
    drops = data.prompt_truncation == "drop"
    to_tokens = dataclasses.replace(data, max_prompt_length=LARGEST_INT if drops else limit)
    examples = tokenize_records(records, "prompt_only", tokenizer, to_tokens, where=where)
    if examples.num_dropped:
        why = f"have no more than data.prompt_tokens = {data.prompt_tokens} tokens"
        logger.warning("%s: %d records %s, and are left out", where, examples.num_dropped, why)
    ids = [list(row.ids) for row in examples.rows]
    kept = [cast(PromptOnly, record) for record in examples.records]
    too_long = [number for number, row in enumerate(ids, start=1) if len(row) > limit]
    if too_long:
        raise ValueError(
            f"{where}: {len(too_long)} of {len(ids)} prompts are too long, number {too_long[0]} the first of "
            f"them with {len(ids[too_long[0] - 1])} tokens; {limit} are allowed, as the context has "
            f"{policy.architecture.context_length} and rollout.max_new_tokens is {rollout.max_new_tokens}; "
            "lower that, shorten the prompts, or set data.prompt_truncation to left"
        )
    ours = text_settings(tokenizer, data, has_conversations=examples.has_conversations)
    if policy.text and (differing := text_difference(policy.text, ours, TEXT_OF_MODEL)):
        logger.warning("%s was trained on text that is treated otherwise: %s", policy.path, differing)
    return Requests(
        records=kept,
        ids=ids,
        limits=[
            read_limit(record.columns.get(LIMIT), rollout.max_new_tokens, f"{where}: record {number}")
            for number, record in enumerate(kept, start=1)
        ],
        stop=stop_id(tokenizer, has_conversations=examples.has_conversations),
    )


def read_limit(value: object, most: int, where: str) -> int | None:
    """Returns the most tokens of a request; ValueError where that is none that the engine was made for."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(
            f"{where}: max_new_tokens must be an integer from 1 to {most}, which rollout.max_new_tokens is "
            f"for all, got {show(value)}"
        )
    return value
