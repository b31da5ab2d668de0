"""One online batch: prompts -> rollout -> scores. Training and evaluation both come through here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax.batch import Metrics, Params, Prompts, Rows, Scored
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.programs import Programs
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.sharding import place_rows


class Experience(NamedTuple):
    """A batch of prompts, completed and judged."""

    scored: Scored
    """On the device; `scores` are the judges' combined verdict."""
    metrics: Metrics
    """Of the rollout, the judges, and the seconds that each phase took."""
    completions: list[str]
    """Text of each completion, without its EOS."""


class Collector:
    """Makes experience with one set of programs; keeps the host side: tokenizer and judge."""

    def __init__(self, programs: Programs, judge: Judge, tokenizer: Tokenizer, mesh: Mesh) -> None:
        self._programs = programs
        self._judge = judge
        self._tokenizer = tokenizer
        self._mesh = mesh

    def collect(
        self,
        params: Params,
        frozen: Params,
        prompts: Prompts,
        records: Sequence[PromptOnly],
        key: Array,
        *,
        greedy: bool = False,
    ) -> Experience:
        """Returns completions of the prompts by the policy, scored by the models and the judge's functions.

        The models score on the device while the host's functions read the text.

        Args:
            params, frozen: by role.
            prompts: a batch on the host; rows of length 0 fill it up.
            records: the prompts' records, one for each row that is no filling.
            key: of this rollout.
            greedy: take the likeliest token instead of sampling.
        Raises:
            RewardError: where a reward function fails.
        """
        start = time.perf_counter()
        sample = self._programs.greedy if greedy else self._programs.rollout
        rollout = sample(params["policy"], place_rows(self._mesh, prompts), key)
        rows = jax.device_get(rollout.rows)
        sampled = time.perf_counter()

        scored, metrics = self._programs.score(params, frozen, rollout)
        completions = decode_completions(self._tokenizer, rows, len(records))
        verdict = self._judge(records, completions, np.asarray(scored.scores)[: len(records)])
        scores = np.zeros(rows.lengths.shape, np.float32)
        scores[: len(records)] = verdict.scores
        scored = scored._replace(scores=place_rows(self._mesh, scores))
        ended = time.perf_counter()
        metrics = metrics | verdict.metrics
        metrics |= {
            "rollout/distinct_2": distinct_n(rows, 2),
            "perf/rollout_seconds": sampled - start,
            "perf/score_seconds": ended - sampled,
        }
        return Experience(scored, metrics, completions)


def completion_ids(rows: Rows, row: int) -> np.ndarray:
    """Returns the token ids of a row's completion, its EOS included when it has one; rows are on the host."""
    return np.asarray(rows.tokens[row, rows.prompt_lengths[row] : rows.lengths[row]])


def decode_completions(tokenizer: Tokenizer, rows: Rows, num_rows: int) -> list[str]:
    """Returns the text of the first num_rows completions, special tokens left out."""
    ids = [completion_ids(rows, row).tolist() for row in range(num_rows)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def distinct_n(rows: Rows, n: int) -> float:
    """Returns the share of different n-grams among those of the completions' tokens; 0 where there are none.

    Source: arXiv:1510.03055 (distinct-1, distinct-2), on tokens instead of words.
    """
    grams = []
    for row in np.flatnonzero(rows.lengths).tolist():
        ids = completion_ids(rows, row)
        if len(ids) >= n:
            grams.append(np.lib.stride_tricks.sliding_window_view(ids, n))
    if not grams:
        return 0.0
    every = np.concatenate(grams)
    return len(np.unique(every, axis=0)) / len(every)
