"""Reward functions in a run of several processes: each row is scored once, and all hear of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.agreement import exchanged
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.distributed import num_processes, process_id
from rlhf_jax.rewards.functions import RewardError, RewardFunction

Scores = Callable[[Sequence[PromptOnly], Sequence[str]], np.ndarray]
"""Records and their completions -> f32[B]."""


def scored_once(function: RewardFunction, holders: np.ndarray) -> Scores:
    """Returns the function, called on each process for the rows that no lower one holds.

    All processes give it the same batch and get the same scores, in one gather. Where it fails on one of
    them, all raise that one's RewardError.

    Args:
        function: of the user.
        holders: bool[processes, rows of a batch]; see `sharding.row_holders`. Of a group of rows that are to
            be scored by one process, each has to have the holders of the first.
    """
    if num_processes() == 1:
        return function
    scorer, rows = holders.argmax(axis=0), np.arange(holders.shape[1])

    def scores(records: Sequence[PromptOnly], completions: Sequence[str]) -> np.ndarray:
        own = np.flatnonzero(scorer[: len(records)] == process_id()).tolist()
        told = np.zeros(len(rows) + 1, np.float32)  # the last one says that the function failed
        failure = None
        if own:
            try:
                told[own] = function([records[row] for row in own], [completions[row] for row in own])
            except RewardError as error:
                told[-1], failure = 1, error
        every = multihost_utils.process_allgather(told)
        if every[:, -1].any():
            raise next(error for error in exchanged(failure) if error is not None) from failure
        return every[scorer, rows][: len(records)]

    return scores
