"""The score that a policy is trained on: learned scores and a function's, weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Combines the reward model's scores with those of the user's function, as the configuration says."""

    def __init__(self, rewards: RewardsConfig, function: Scores | None, *, has_model: bool) -> None:
        """Makes a judge.

        Args:
            rewards: reads model_weight and function_weight.
            function: of rewards.function; None where there is none.
            has_model: there is a reward model, so that the learned scores mean something.

        Raises:
            ValueError: there is neither.
        """
        if function is None and not has_model:
            raise ValueError("there is no reward: give the stage a reward_from, or set rewards.function")
        self._function = function
        self._has_model = has_model
        self._weights = {"model": rewards.model_weight, "function": rewards.function_weight}

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
                function reads the text; not read where there is no reward model.
            rows_counted: bool[B], the rows that count in the means.

        Raises:
            RewardError: the function failed.
        """
        parts: dict[str, np.ndarray] = {}
        if self._function is not None:
            parts["function"] = self._function(records, completions)
        if self._has_model:
            parts["model"] = gathered(learned_scores)[: len(records)]
        return combine(parts, self._weights, rows_counted)
