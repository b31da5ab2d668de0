"""Best of n: of several completions of a prompt the one that a reward model, a function or both like most.

`best_of(sampler(prompts, group_size=8), 8, score)` is the Python call, of any score.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoint import load_info
from rlhf_jax.data.collate import collate_rows
from rlhf_jax.data.token_rows import Row
from rlhf_jax.models.hub import local_directory
from rlhf_jax.models.transformer import make_model
from rlhf_jax.origins import is_stage_dir, stored_ensemble
from rlhf_jax.programs import reward_program
from rlhf_jax.reward_origin import External, external_reward
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.rewards.external import ExternalReward, RewardReader
from rlhf_jax.rewards.functions import RewardFunction, load_function
from rlhf_jax.rewards.once import scored_once
from rlhf_jax.roles import load_frozen_reward
from rlhf_jax.sampler import Completion
from rlhf_jax.sharding import axis_rules, make_mesh, num_parts, row_holders, traced_on
from rlhf_jax.stored_policy import Requests, StoredPolicy

BATCH = 64  # completions scored at once, or a few more


class Best(NamedTuple):
    """The best completion of a group."""

    completion: Completion
    score: float
    mean_score: float
    """Of the group: what a completion by the policy scores."""


def kl_bound(n: int) -> float:
    """Returns the most that the KL from the policy to its best of n is, nats per completion.

    log n - (n - 1) / n, which it is where no two completions are alike. Source: arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n


def best_of(
    completions: Iterable[Completion], n: int, score: Callable[[Sequence[Completion]], np.ndarray]
) -> Iterator[Best]:
    """Yields the completion of the highest score of each group, of equal ones the first.

    Args:
        completions: n of each prompt, one behind the other.
        n: of a group.
        score: gives one number for each of up to `batch_size(n)` completions.
    """
    for some in itertools.batched(completions, batch_size(n)):
        for number, scores in enumerate(score(some).reshape(-1, n)):
            place = int(scores.argmax())
            yield Best(some[n * number + place], float(scores[place]), float(scores.mean()))


def batch_size(n: int) -> int:
    """Returns the completions that are scored at once: whole groups of n."""
    return n * -(-BATCH // n)


class StoredReward(NamedTuple):
    """Where scores come from: what the host can tell before a reward model is loaded."""

    functions: dict[str, RewardFunction]
    """Of rewards.functions, by what that calls them."""
    model: External | None


def find_reward(policy: StoredPolicy, requests: Requests) -> StoredReward:
    """Returns the rewards that a policy's options name, `reward_from` and `rewards.function`.

    Raises:
        ValueError: there is none, no such function or reward model, or one that cannot read the prompts.
    """
    stage, tokenizer = policy.stage, policy.tokenizer
    if not stage.reward_from and not stage.rewards.functions:
        raise ValueError(
            "best_of: nothing tells which completion is the best; name a reward model by --reward_from, or a "
            "function by --rewards.function package.module:name"
        )
    functions = {spec: load_function(spec) for spec in stage.rewards.functions}
    for function in functions.values():
        function.check_columns(requests.records[0].columns)
    if not stage.reward_from:
        return StoredReward(functions, None)
    path, rule = local_directory(stage.reward_from), stage.rewards.ensemble
    num_heads = stored_ensemble(load_info(path)).num_heads if is_stage_dir(path) else 1
    if num_heads == 1 and rule != "mean":
        raise ValueError(f"rewards.ensemble: {rule} would be ignored: {stage.reward_from} has one score head")
    model = external_reward(
        stage,
        path,
        policy.architecture,
        tokenizer,
        {},
        has_conversations=not isinstance(requests.records[0].prompt, str),
        num_heads=num_heads,
    )
    if model is None:  # it reads what the policy wrote
        longest = policy.architecture.context_length
        reader = RewardReader(None, False, cast("int | None", tokenizer.bos_token_id), None, longest)
        model = External(path, policy.architecture, reader)
    return StoredReward(functions, model)


class Scorer:
    """Scores of completions by the rewards of a policy's options, on devices."""

    def __init__(self, policy: StoredPolicy, requests: Requests, reward: StoredReward, n: int) -> None:
        """Loads the reward model, if there is one.

        Args:
            policy: has written the completions.
            requests: that they complete.
            reward: of `find_reward`.
            n: completions of a prompt.
        """
        options = policy.stage.model
        self._requests, self._axes, self._external = requests, policy.stage.mesh.axes, None
        self._tokenizer = policy.tokenizer
        with axis_rules(self._axes):
            mesh = make_mesh(policy.stage.mesh)
            parts = traced_on(mesh, num_parts)("batch")
            self._num_rows = -(-batch_size(n) // parts) * parts
            if reward.model is not None:
                path, architecture, reader, ensemble = reward.model
                model = make_model(
                    architecture, options.dtype, attention=options.attention, ensemble=ensemble
                )
                params = load_frozen_reward(options, path, model, mesh)
                self._external = ExternalReward(reader, reward_program(model, mesh), params, mesh)
            holders = row_holders(mesh, self._num_rows)
        functions = {spec: scored_once(function, holders) for spec, function in reward.functions.items()}
        self._judge = Judge(policy.stage.rewards, functions, has_model=reward.model is not None)

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """Returns the combined score of each completion, f32. Texts have stop strings, as in training."""
        requests, numbers = self._requests, [completion.prompt_index for completion in completions]
        records = [requests.records[number] for number in numbers]
        texts = self._tokenizer.batch_decode(
            [of.tokens for of in completions], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        learned = jnp.zeros(self._num_rows)
        if self._external is not None:
            ids = [requests.ids[number] + of.tokens for number, of in zip(numbers, completions, strict=True)]
            rows = collate_rows([Row(of, 0) for of in ids], max(map(len, ids)), 0, self._num_rows)
            ended = np.array([of.ended for of in completions])
            with axis_rules(self._axes):
                learned, _ = self._external(rows, records, texts, ended)
        return self._judge(records, texts, learned, np.ones(len(texts), bool)).scores
