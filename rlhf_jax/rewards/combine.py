"""The score that a policy is trained on: learned scores and those of functions, weighted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.batch import Mean, Metrics
from rlhf_jax.config import RewardsConfig
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.rewards.once import Scores
from rlhf_jax.sharding import gathered


class Verdict(NamedTuple):
    """What the judges say of a batch of completions."""

    scores: np.ndarray
    """f32[B], the combined score."""
    metrics: Metrics
    """The mean of each part alone, before its weight."""


def combine(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, float], rows_counted: np.ndarray
) -> Verdict:
    """Returns sum_k weights[k] parts[k], and the mean of each part alone as `reward/k`.

    Args:
        parts: f32[B] by name, at least one; rows that are data, no filling.
        weights: one for each part.
        rows_counted: bool[B], the rows whose parts are in the means.
    """
    scores = np.sum([np.float32(weights[name]) * np.asarray(part) for name, part in parts.items()], axis=0)
    metrics: Metrics = {f"reward/{name}": _mean(part[rows_counted]) for name, part in parts.items()}
    return Verdict(np.asarray(scores, np.float32), metrics)


def _mean(part: np.ndarray) -> Mean:
    return Mean(jnp.asarray(np.sum(part), jnp.float32), jnp.float32(len(part)))


class Judge:
    """Combines the reward model's scores with those of the user's functions, as the configuration says."""

    def __init__(self, rewards: RewardsConfig, functions: Mapping[str, Scores], *, has_model: bool) -> None:
        """Makes a judge.

        Args:
            rewards: reads model_weight and functions.
            functions: of rewards.functions, by what that calls them.
            has_model: there is a reward model, so that the learned scores mean something.

        Raises:
            ValueError: there is neither.
        """
        if not functions and not has_model:
            raise ValueError("there is no reward: give the stage a reward_from, or set rewards.function")
        names = function_names(functions)
        self._functions = {names[spec]: function for spec, function in functions.items()}
        self._has_model = has_model
        weights = {names[spec]: rewards.functions[spec] for spec in functions}
        self._weights = {"model": rewards.model_weight} | weights

    def __call__(
        self,
        records: Sequence[PromptOnly],
        completions: Sequence[str],
        learned_scores: Array,
        rows_counted: np.ndarray,
    ) -> Verdict:
        """Returns the combined scores of the completions and the mean of each part.

        Args:
            records: B prompts with their columns.
            completions: B texts.
            learned_scores: f32[at least B], the reward model's, still on its way from the device while the
                functions read the text; not read where there is no reward model.
            rows_counted: bool[B], the rows that count in the means.

        Raises:
            RewardError: a function failed.
        """
        parts = {name: function(records, completions) for name, function in self._functions.items()}
        if self._has_model:
            parts["model"] = gathered(learned_scores)[: len(records)]
        return combine(parts, self._weights, rows_counted)


def function_names(specs: Iterable[str]) -> dict[str, str]:
    """Returns for each function `package.module:name` what its metric is called, behind `reward/`.

    That is `function` of a single one, else `function/name`, so that it is no other metric's, or
    `function/package.module:name` where several have that name.
    """
    specs = list(specs)
    if len(specs) == 1:
        return {specs[0]: "function"}
    names = [spec.rpartition(":")[2] for spec in specs]
    return {
        spec: f"function/{spec if names.count(name) > 1 else name}"
        for spec, name in zip(specs, names, strict=True)
    }
