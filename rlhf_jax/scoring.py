"""What the roles say of a rollout, in one pass: log-probabilities of policy and reference, values, scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.batch import Params, Rollout, Scored
from rlhf_jax.models.forward import Forward, Said
from rlhf_jax.ops.packed_rows import Placement, RowLayout


def score_rollout(
    forward: Forward, params: Params, frozen: Params, rollout: Rollout, layout: RowLayout | None = None
) -> Scored:
    """Returns the rollout scored by every role that is there; scores are 0 where there is no reward model.

    `old_logprobs` are the training forward's own, so that the first ratio of an on-policy update is 1.

    Args:
        forward: forward passes by role.
        params, frozen: by role.
        rollout: of rows of one sequence each.
        layout: in what rows it is computed; None: in the rollout's own.
    """

    def in_rows(at: Placement) -> Said:
        assert forward.with_columns is not None
        short = forward.with_columns(at.rung.num_completion)
        return jax.tree.map(at.unpack, short.score_all(params, frozen, at.pack(rollout.rows)))

    if layout is None:
        said = forward.score_all(params, frozen, rollout.rows)
    else:
        said = layout.in_short_rows(rollout.rows, in_rows)
    scores = jnp.zeros(rollout.rows.lengths.shape) if said.scores is None else said.scores
    return Scored(rollout, said.logprobs, said.ref_logprobs, said.values, scores)
