"""Direct preference optimisation on pairs that the policy samples and the reward judges."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algos.algorithm import Algorithm, Aux
from rlhf_jax.algos.dpo import loss
from rlhf_jax.algos.grpo import teaches
from rlhf_jax.algos.ppo import PPO
from rlhf_jax.batch import Metrics, Rows, Scored
from rlhf_jax.online_config import OnlineConfig, OnlineDPOConfig
from rlhf_jax.ops.masking import keep, masked
from rlhf_jax.ops.sequences import completion_sums
from rlhf_jax.ops.shaping import apply_missing_eos


def candidates(scored: Scored, settings: OnlineConfig) -> tuple[Array, Array]:
    """Returns the scores f32[B] after the rule for completions without EOS, and bool[B]: those that count.

    Args:
        scored: a judged rollout.
        settings: reads missing_eos and missing_eos_value.
    """
    rule, value = settings.missing_eos, settings.missing_eos_value
    scores, stays = apply_missing_eos(scored.scores, scored.rollout.ended, rule, value)
    return scores, stays & scored.rollout.rows.sequence_mask


def taken(rows: Rows, which: Array, is_kept: Array) -> Rows:
    """Returns some of the rows; those that are not kept only fill up, and so have no weight in a loss.

    Args:
        rows: of one sequence each.
        which: i32[R], numbers of rows.
        is_kept: bool[R].
    """
    assert rows.excluded is None and rows.ref_logprobs is None
    prompt_lengths, lengths = (keep(x[which], is_kept) for x in (rows.prompt_lengths, rows.lengths))
    return Rows(rows.tokens[which], prompt_lengths, lengths)


def prepare(scored: Scored, aux: Aux, settings: OnlineDPOConfig) -> tuple[Rows, Metrics]:
    """Returns rows that alternate chosen, rejected, a pair of each prompt, and what is told of the judgement.

    Chosen is the completion of the group with the highest score, rejected that with the lowest; the first of
    several. A group whose scores are all equal, or of which fewer than two completions count, has no pair:
    its two rows only fill up, and rollout/equal_groups is the share of such groups.

    Source: arXiv:2402.04792 section 3. There an annotator always prefers one of two.
    """
    assert scored.ref_logprobs is not None
    scores, counts = candidates(scored, settings)
    of_group, size = counts.reshape(-1, settings.group_size), settings.group_size
    grouped = scores.reshape(-1, size)
    best = jnp.argmax(jnp.where(of_group, grouped, -jnp.inf), axis=1)
    worst = jnp.argmin(jnp.where(of_group, grouped, jnp.inf), axis=1)
    is_pair = teaches(scores, counts, size)
    first = size * jnp.arange(len(grouped))
    which, is_kept = jnp.stack([first + best, first + worst], axis=1).reshape(-1), jnp.repeat(is_pair, 2)
    rollout_rows = scored.rollout.rows
    ref_logprobs = keep(completion_sums(scored.ref_logprobs, rollout_rows)[which], is_kept)
    gap = scores[which[::2]] - scores[which[1::2]]
    return taken(rollout_rows, which, is_kept)._replace(ref_logprobs=ref_logprobs), {
        "reward/score_gap": masked(gap, is_pair),
        "rollout/equal_groups": masked(jnp.float32(~is_pair), jnp.any(of_group, axis=1)),
    }


ONLINE_DPO = Algorithm(
    trains=("policy",),
    reads=lambda settings: ("reference", "reward"),
    loss=loss,
    rows_per_record=2,
    figures=("reward/score", "policy/kl", "reward/margin", "rollout/length"),
    reports=PPO.reports,
    prepare=prepare,
    leaves_out=PPO.leaves_out,
)
