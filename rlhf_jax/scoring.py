"""What the roles say of a rollout, in one pass: log-probabilities of policy and reference, values, scores."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.batch import Params, Rollout, Scored
from rlhf_jax.models.forward import Forward


def score_rollout(forward: Forward, params: Params, frozen: Params, rollout: Rollout) -> Scored:
    """Returns the rollout scored by every role that is there; scores are 0 where there is no reward model.

    `old_logprobs` are the training forward's own, so that the first ratio of an on-policy update is 1.
    """
    rows = rollout.rows
    has_reward = "reward" in frozen or "reward" in params
    return Scored(
        rollout=rollout,
        old_logprobs=forward.logprobs(params, frozen, rows)[0],
        ref_logprobs=forward.ref_logprobs(params, frozen, rows),
        values=forward.values(params, frozen, rows),
        scores=forward.scores(params, frozen, rows) if has_reward else jnp.zeros(rows.lengths.shape),
    )
