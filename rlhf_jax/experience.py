"""One online batch: prompts -> rollout -> scores. Training and evaluation both come through here."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import watchdog
from rlhf_jax.batch import Metrics, Params, Prompts, Rollout, Rows, Scored
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.programs import Programs
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.rewards.external import ExternalReward
from rlhf_jax.sharding import gathered, place_rows


class Experience(NamedTuple):
    """A batch of prompts, completed and judged."""

    scored: Scored
    """On the device; `scores` are the judges' combined verdict."""
    scores: np.ndarray | None
    """f32, one for each completion: the same on the host; None where nothing judges."""
    metrics: Metrics
    """Of the rollout, the judges, and the seconds that each phase took."""
    completions: list[str]
    """Text of each completion, without its EOS."""
    ids: list[np.ndarray]
    """Tokens of each completion, with its EOS when it has one."""
    rows_counted: np.ndarray
    """bool, one for each completion: whether it counts in metrics."""


class Collector:
    """Makes experience with one set of programs; keeps the host side: tokenizer and judge."""

    def __init__(
        self,
        programs: Programs,
        judge: Judge | None,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        leaves_out: bool,
        external: ExternalReward | None = None,
    ) -> None:
        """Makes a collector.

        Args:
            programs: of the stage.
            judge: combines scores; None: there are none.
            tokenizer: of the policy.
            mesh: where everything lies.
            leaves_out: completions without EOS do not count in metrics.
            external: gives the learned scores where the reward model is not among the stage's roles.
        """
        self._external = external
        self._leaves_out = leaves_out
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
        in_groups: bool = True,
    ) -> Experience:
        """Returns completions of the prompts by the policy, scored by the models and the judge's functions.

        The models score on the device while the host's functions read the text.

        Args:
            params, frozen: by role.
            prompts: a batch on the mesh; rows of length 0 fill it up.
            records: the prompts' records, one for each completion of a prompt that is no filling.
            key: of this rollout.
            in_groups: each prompt has as many completions as the stage says, one behind the other; else one.
        Raises:
            RewardError: where a reward function fails.
        """
        begun = time.perf_counter()
        complete = self._programs.rollout if in_groups else self._programs.rollout_of_one
        rollout = complete(params, frozen, prompts, key)
        return self.judge(params, frozen, rollout, records, begun, waits=True)

    def judge(
        self,
        params: Params,
        frozen: Params,
        rollout: Rollout,
        records: Sequence[PromptOnly],
        begun: float,
        *,
        waits: bool = False,
    ) -> Experience:
        """Returns a rollout, scored by the models and the judge's functions; see `collect`.

        Args:
            params, frozen: by role.
            rollout: on the mesh.
            records: see `collect`.
            begun: when waiting for the rollout began, by time.perf_counter.
            waits: for the models' scores also where the host does not read them, so that the seconds are
                theirs; not where other devices wait for the host.
        """
        rows, ended = gathered((rollout.rows, rollout.ended))
        sampled = time.perf_counter()
        watchdog.beat()

        scored, metrics = self._programs.score(
            params, frozen, rollout
        )  # runs while the functions read the text
        ids = [completion_ids(rows, row) for row in range(len(records))]
        completions = self._tokenizer.batch_decode(
            [row_ids.tolist() for row_ids in ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        rows_counted = ended[: len(records)] | (not self._leaves_out)
        metrics = metrics | text_metrics(ids, rows_counted)
        learned, scores = scored.scores, None
        if self._external is not None:
            learned, told = self._external(rows, records, completions, ended)
            metrics = metrics | told
        if self._judge is not None:
            verdict = self._judge(records, completions, learned, rows_counted)
            every, scores = np.zeros(rows.lengths.shape, np.float32), verdict.scores
            every[: len(records)] = scores
            scored = scored._replace(scores=place_rows(self._mesh, every))
            metrics = metrics | verdict.metrics
        if waits:
            jax.block_until_ready(scored)
        judged = time.perf_counter()
        watchdog.beat()
        is_there = rows.lengths > 0
        metrics = metrics | {
            "perf/prompt_tokens": float(rows.prompt_lengths[is_there].sum()),
            "perf/sequences": float(is_there.sum()),
            "perf/rollout_seconds": sampled - begun,
            "perf/score_seconds": judged - sampled,
        }
        return Experience(scored, scores, metrics, completions, ids, rows_counted)


def completion_ids(rows: Rows, row: int) -> np.ndarray:
    """Returns the token ids of a row's completion, its EOS included when it has one; rows are on the host."""
    return np.asarray(rows.tokens[row, rows.prompt_lengths[row] : rows.lengths[row]])


def text_metrics(ids: Sequence[np.ndarray], rows_counted: np.ndarray) -> dict[str, float]:
    """Returns what only all completions together can tell: the 95th percentile of lengths, and distinct-2.

    Args:
        ids: tokens of each completion.
        rows_counted: bool, one for each; of the others nothing is told, and NaN where there is none.
    """
    counted = [row_ids for row_ids, counts in zip(ids, rows_counted, strict=True) if counts]
    lengths = [len(row_ids) for row_ids in counted] or [math.nan]
    return {
        "rollout/length_p95": float(np.percentile(lengths, 95)),
        "rollout/distinct_2": distinct_n(counted, 2) if counted else math.nan,
    }


def distinct_n(ids: Sequence[np.ndarray], n: int) -> float:
    """Returns the share of different n-grams among all n-grams of the completions' tokens; 0 without any.

    Source: arXiv:1510.03055 (distinct-1, distinct-2), on tokens instead of words.
    """
    grams = [np.lib.stride_tricks.sliding_window_view(row_ids, n) for row_ids in ids if len(row_ids) >= n]
    if not grams:
        return 0.0
    every = np.concatenate(grams)
    return len(np.unique(every, axis=0)) / len(every)
