"""Rejection-sampling fine-tuning: of what the policy samples, the best is learned as in SFT."""

from __future__ import annotations

import jax.numpy as jnp

from rlhf_jax.algos.algorithm import Algorithm, Aux
from rlhf_jax.algos.grpo import teaches
from rlhf_jax.algos.online_dpo import candidates, taken
from rlhf_jax.algos.ppo import PPO
from rlhf_jax.algos.sft import loss
from rlhf_jax.batch import Mean, Metrics, Rows, Scored
from rlhf_jax.online_config import RAFTConfig
from rlhf_jax.ops.masking import masked


def prepare(scored: Scored, aux: Aux, settings: RAFTConfig) -> tuple[Rows, Metrics]:
    """Returns the rows of the best completions of each group, and what is told of them.

    Those that are not good enough only fill up, so that the loss is a mean over the tokens of what is
    learned. rollout/kept is the share of the completions that is. A group whose scores are all equal is
    counted in rollout/equal_groups, and treated as any other: its first completions are its best ones.

    Source: arXiv:2304.06767 algorithm 1, with the best of each prompt and not of the whole batch.
    """
    scores, counts = candidates(scored, settings)
    size = settings.group_size
    grouped = jnp.where(counts, scores, -jnp.inf).reshape(-1, size)
    ranked = jnp.argsort(-grouped, axis=1, stable=True)[:, : settings.num_kept]
    which = (size * jnp.arange(len(grouped))[:, None] + ranked).reshape(-1)
    is_kept = counts[which]
    if settings.keep == "above":
        is_kept &= scores[which] > settings.threshold
    is_equal = ~teaches(scores, counts, size)
    some = jnp.any(counts.reshape(-1, size), axis=1)
    return taken(scored.rollout.rows, which, is_kept), {
        "reward/kept": masked(scores[which], is_kept),
        "rollout/kept": Mean(jnp.sum(is_kept, dtype=jnp.float32), jnp.sum(counts, dtype=jnp.float32)),
        "rollout/equal_groups": masked(jnp.float32(is_equal), some),
    }


RAFT = Algorithm(
    trains=("policy",),
    reads=lambda settings: ("reference", "reward") if settings.tracks_kl else ("reward",),
    loss=loss,
    figures=("reward/score", "reward/kept", "policy/kl", "rollout/length"),
    reports=PPO.reports,
    prepare=prepare,
    leaves_out=PPO.leaves_out,
)
