"""What the roles say of a rollout, in one pass: log-probabilities of policy and reference, values, scores."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.batch import Params, Rollout, Scored
from rlhf_jax.models.forward import Forward


def score_rollout(forward: Forward, params: Params, frozen: Params, rollout: Rollout) -> Scored:
    """Returns the rollout scored by every role that is there; scores are 0 where there is no reward model.

    `old_logprobs` are the training forward's own, so that the first ratio of an on-policy update is 1.
    """
    said = forward.score_all(params, frozen, rollout.rows)
    scores = jnp.zeros(rollout.rows.lengths.shape) if said.scores is None else said.scores
    return Scored(rollout, said.logprobs, said.ref_logprobs, said.values, scores)
