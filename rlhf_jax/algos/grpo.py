"""Policy gradients without a critic: other completions of the same prompt, or of the batch, are the baseline;
or the greedy one of the prompt.

GRPO, Dr. GRPO, DAPO, GSPO, RLOO, REINFORCE, REINFORCE++ and ReMax are this file with other defaults, see the
subclasses of `GRPOConfig`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.algos.algorithm import Aux, Terms
from rlhf_jax.algos.ppo import PPO, greedy_as_rewards, policy_batch, policy_terms, ptx_terms, shaped_scores
from rlhf_jax.batch import Metrics, Params, PolicyBatch, Scored
from rlhf_jax.models.forward import Forward
from rlhf_jax.online_config import GRPOConfig
from rlhf_jax.ops.masking import keep, masked, masked_mean, whiten
from rlhf_jax.ops.shaping import token_rewards

STD_EPS = 1e-4
"""Added to a group's deviation. Source: the code of arXiv:2402.03300's reimplementations, TRL among them."""


def group_statistics(rewards: Array, stays: Array, group_size: int) -> tuple[Array, Array, Array]:
    """Returns mean, deviation (ddof 1; 0 of fewer than two) and number of each completion's group, f32[B].

    Args:
        rewards: f32[B], those of a group one behind the other.
        stays: bool[B], the completions that count.
        group_size: G, divides B.
    """
    stays = stays.reshape(-1, group_size)
    rewards = keep(rewards.reshape(-1, group_size), stays)
    count = jnp.sum(stays, axis=1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(count, 1.0)
    squares = jnp.square(keep(rewards - mean, stays))
    std = jnp.sqrt(jnp.sum(squares, axis=1, keepdims=True) / jnp.maximum(count - 1.0, 1.0))
    mean, std, count = (jnp.broadcast_to(x, stays.shape).reshape(-1) for x in (mean, std, count))
    return mean, std, count


def teaches(rewards: Array, stays: Array, group_size: int) -> Array:
    """Returns bool[N]: the groups whose completions that count have different rewards.

    Args:
        rewards: f32[B].
        stays: bool[B].
        group_size: G.
    """
    rewards, stays = rewards.reshape(-1, group_size), stays.reshape(-1, group_size)
    most = jnp.max(jnp.where(stays, rewards, -jnp.inf), axis=1)
    return most > jnp.min(jnp.where(stays, rewards, jnp.inf), axis=1)


def advantages(
    rewards: Array, mask: Array, stays: Array, settings: GRPOConfig, greedy_scores: Array | None = None
) -> Array:
    """Returns the advantage of each token, f32[B, T].

    A_it = (R_it - b_i) / d_i,   R_it = sum_k r_ik (credit `completion`) or sum_{k >= t} r_ik (`token`),
    R_i = sum_k r_ik,   b_i = mean of R over the group, over its others, over the batch, the score of
    the prompt's greedy completion, or 0,
    d_i = std of R over the group (ddof 1) + 1e-4, or 1; with scale `batch` A is whitened over all tokens.

    A group of one has nothing to compare with: baselines `group` and `others` are then refused by the
    configuration; where only one of a group counts, its advantage is 0.

    Args:
        rewards: f32[B, T], 0 outside the mask.
        mask: bool[B, T], completion tokens that count.
        stays: bool[B], the completions that count.
        settings: reads group_size, baseline, scale and credit.
        greedy_scores: f32[B], as they become rewards; of baseline `greedy`.
    Source: arXiv:2402.03300 section 4.1 (group), arXiv:2402.14740 eq. 8 (others), arXiv:2501.03262 (token),
        arXiv:2310.10505 (greedy).
    """
    totals = jnp.sum(rewards, axis=1)
    mean, std, count = group_statistics(totals, stays, settings.group_size)
    match settings.baseline:
        case "group":
            baseline = mean
        case "others":  # (n mean - R) / (n - 1)
            baseline = jnp.where(count > 1, (count * mean - totals) / jnp.maximum(count - 1, 1), totals)
        case "batch":
            baseline = jnp.full(totals.shape, masked_mean(totals, stays))
        case "greedy":
            assert greedy_scores is not None
            baseline = greedy_scores
        case "none":
            baseline = jnp.zeros_like(totals)
    to_go = totals[:, None]
    if settings.credit == "token":
        to_go = lax.cumsum(rewards, axis=1, reverse=True)
    found = to_go - baseline[:, None]
    compares = settings.baseline in ("group", "others") and settings.credit == "completion"
    if compares or settings.scale == "group":
        has_taught = jnp.repeat(teaches(totals, stays, settings.group_size), settings.group_size)
        found = keep(found, has_taught[:, None])  # else rounding is all there is, and divided by little
    if settings.scale == "group":
        found = found / (std + STD_EPS)[:, None]
    found = jnp.broadcast_to(found, mask.shape)
    return whiten(found, mask) if settings.scale == "batch" else keep(found, mask)


def loss(
    forward: Forward, params: Params, frozen: Params, batch: PolicyBatch, settings: GRPOConfig
) -> tuple[Terms, Metrics]:
    """Returns the policy's terms and the metrics of an update."""
    logprobs, entropy = forward.logprobs(params, frozen, batch.rows)
    terms, metrics = policy_terms(forward, logprobs, entropy, batch, settings)
    return terms | ptx_terms(forward, params, frozen, batch, settings), metrics


def _rewards(scored: Scored, aux: Aux, settings: GRPOConfig) -> tuple[Array, Array, Array, Metrics]:
    """Returns rewards f32[B, T], the tokens bool[B, T] and the completions bool[B] that stay, and metrics."""
    scores, stays, told = shaped_scores(scored, aux, settings)
    mask = scored.rollout.rows.completion_mask & stays[:, None]
    kl_coef, reference = jnp.float32(0), scored.old_logprobs
    if scored.ref_logprobs is not None and settings.kl_coef and settings.kl_term == "reward":
        kl_coef, reference = aux["kl_coef"], scored.ref_logprobs
    return token_rewards(scores, scored.old_logprobs, reference, mask, kl_coef), mask, stays, told


def informative_groups(scored: Scored, aux: Aux, settings: GRPOConfig) -> Array:
    """Returns bool[N]: the groups from whose rewards something is to be learned."""
    rewards, _, stays, _ = _rewards(scored, aux, settings)
    return teaches(jnp.sum(rewards, axis=1), stays, settings.group_size)


def prepare(scored: Scored, aux: Aux, settings: GRPOConfig) -> tuple[PolicyBatch, Metrics]:
    """Returns the batch that the update reads, and what the rollout says of the policy; all is float32."""
    rewards, mask, stays, told = _rewards(scored, aux, settings)
    totals = jnp.sum(rewards, axis=1)
    metrics = told | {"reward/total": masked(totals, stays)}
    greedy_scores = None
    if scored.greedy is not None:
        greedy_scores = jnp.repeat(greedy_as_rewards(scored, aux, settings), settings.group_size)
        rows = scored.greedy.rollout.rows
        metrics["reward/greedy_score"] = masked(scored.greedy.scores, rows.sequence_mask)
        metrics["rollout/greedy_length"] = masked(rows.lengths - rows.prompt_lengths, rows.sequence_mask)
    found = advantages(rewards, mask, stays, settings, greedy_scores)
    batch = policy_batch(scored, aux, settings, mask, found)
    if scored.ref_logprobs is not None and settings.kl_coef:
        metrics["policy/kl_coef"] = aux["kl_coef"]
    if settings.group_size > 1:
        is_equal = ~teaches(totals, stays, settings.group_size)
        some = jnp.any(stays.reshape(-1, settings.group_size), axis=1)
        metrics["rollout/equal_groups"] = masked(jnp.float32(is_equal), some)
    return batch, metrics


GRPO = PPO._replace(
    trains=("policy",),
    reads=lambda settings: ("reference", "reward") if settings.kl_coef or settings.tracks_kl else ("reward",),
    loss=loss,
    adam_eps=1e-8,
    prepare=prepare,
    informative_groups=informative_groups,
    reads_greedy=lambda settings: settings.baseline == "greedy",
    rates=lambda settings: {},
    waits=lambda settings: {},
)
