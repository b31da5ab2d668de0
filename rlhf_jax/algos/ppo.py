"""Proximal policy optimisation: clipped surrogate, clipped value loss, KL to the reference in the reward."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.algo_config import PPOConfig
from rlhf_jax.algos.algorithm import Algorithm, Aux, Measure, Term, Terms
from rlhf_jax.batch import Max, Mean, Metrics, Params, PolicyBatch, Scored
from rlhf_jax.models.forward import Forward
from rlhf_jax.ops.advantages import gae
from rlhf_jax.ops.kl import adapt_kl_coef, k3, log_ratio, sequence_kl
from rlhf_jax.ops.masking import keep, masked, masked_max, masked_var, told_of_any, whiten
from rlhf_jax.ops.shaping import apply_missing_eos, token_rewards


def clipped_policy_loss(logprobs: Array, batch: PolicyBatch, clip_eps: float) -> tuple[Mean, Metrics]:
    """Returns PPO's clipped surrogate loss, to minimise, and metrics of the ratio.

    L_t = w_t max(-A_t r_t, -A_t clip(r_t, 1 - eps, 1 + eps)),   r_t = exp(logprobs_t - old_logprobs_t)

    Args:
        logprobs: f32[B, T], nats, under the policy being trained; the only input with a gradient.
        batch: old_logprobs and advantages f32[B, T], completion_mask bool[B, T], and w: importance f32[B, T]
            where another policy than the old one has sampled; else w is 1.
        clip_eps: eps.
    Source: arXiv:1707.06347 eq. 7. We average over the tokens of the global batch, not per sequence.
    """
    mask = batch.completion_mask
    ratio = jnp.exp(log_ratio(logprobs, batch.old_logprobs, mask))
    advantages = keep(batch.advantages, mask)  # before it is multiplied: garbage must not reach a gradient
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    surrogate = jnp.maximum(plain, clipped)
    if batch.importance is not None:
        surrogate = keep(batch.importance, mask) * surrogate
    return masked(surrogate, mask), {
        "policy/clip_frac": masked(jnp.float32(clipped > plain), mask),
        "policy/ratio": masked(ratio, mask),
        "policy/ratio_max": Max(masked_max(ratio, mask)),
        "policy/ratio_gap": Max(masked_max(jnp.abs(ratio - 1), mask)),
        "policy/approx_kl": masked(k3(batch.old_logprobs, logprobs), mask),
    }


def clipped_value_loss(values: Array, batch: PolicyBatch, clip_eps: float) -> tuple[Mean, Metrics]:
    """Returns the clipped value loss and the share of tokens where the clip binds.

    L_t = 0.5 max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -eps, eps) - R_t)^2)

    Args:
        values: f32[B, T]; the only input with a gradient.
        batch: old_values and returns f32[B, T], completion_mask bool[B, T].
        clip_eps: eps.
    Source: the PPO code that came with arXiv:1707.06347; arXiv:2403.17031 section 4.
    """
    assert batch.old_values is not None and batch.returns is not None
    mask = batch.completion_mask
    values, old_values, returns = (keep(x, mask) for x in (values, batch.old_values, batch.returns))
    near_old = old_values + jnp.clip(values - old_values, -clip_eps, clip_eps)
    plain = jnp.square(values - returns)
    clipped = jnp.square(near_old - returns)
    binds = (clipped > plain) & (
        jnp.abs(values - old_values) > clip_eps
    )  # else both are equal but for rounding
    return masked(0.5 * jnp.maximum(plain, clipped), mask), {
        "value/clip_frac": masked(jnp.float32(binds), mask)
    }


def loss(
    forward: Forward, params: Params, frozen: Params, batch: PolicyBatch, settings: PPOConfig
) -> tuple[Terms, Metrics]:
    """Returns policy, value and (when its weight is not 0) entropy terms, and the metrics of an update."""
    logprobs, entropy, values = forward.policy_and_value(params, frozen, batch.rows)
    policy, policy_metrics = clipped_policy_loss(logprobs, batch, settings.clip_eps)
    value, value_metrics = clipped_value_loss(values, batch, settings.value_clip_eps)
    terms = {"policy": Term(policy), "value": Term(value, settings.value_coef)}
    if settings.entropy_coef:
        terms["entropy"] = Term(masked(-entropy, batch.completion_mask), settings.entropy_coef)
    entropy_metric = masked(lax.stop_gradient(entropy), batch.completion_mask)
    return terms, policy_metrics | value_metrics | {"policy/entropy": entropy_metric}


def prepare(scored: Scored, aux: Aux, settings: PPOConfig) -> tuple[PolicyBatch, Metrics]:
    """Returns the batch that the update reads, and what the rollout says of the policy.

    The order of NUMERICS: score, missing-EOS rule, KL term, reward whitening (mean kept), GAE, returns,
    advantage whitening; all statistics over the valid tokens of the whole batch. Everything is float32.
    """
    assert scored.ref_logprobs is not None and scored.values is not None
    rollout, rows = scored.rollout, scored.rollout.rows
    scores, stays = apply_missing_eos(
        scored.scores, rollout.ended, settings.missing_eos, settings.missing_eos_value
    )
    stays = stays & rows.sequence_mask
    mask = rows.completion_mask & stays[:, None]
    rewards = token_rewards(scores, scored.old_logprobs, scored.ref_logprobs, mask, aux["kl_coef"])
    total = masked(jnp.sum(rewards, axis=1), stays)
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    advantages, returns = gae(rewards, scored.values, mask, gamma=settings.gamma, lam=settings.gae_lambda)
    if settings.whiten_advantages:
        advantages = whiten(advantages, mask)
    batch = PolicyBatch(
        rows=rows,
        completion_mask=mask,
        old_logprobs=scored.old_logprobs,
        ref_logprobs=scored.ref_logprobs,
        old_values=scored.values,
        advantages=advantages,
        returns=returns,
    )
    return_var = masked_var(returns, mask)
    unexplained = masked_var(returns - scored.values, mask) / jnp.maximum(return_var, 1e-8)
    return batch, {
        "reward/total": total,
        "policy/kl_coef": aux["kl_coef"],
        "value/mean": masked(scored.values, mask),
        "value/explained_variance": told_of_any(1 - unexplained, mask),
    }


def update_aux(aux: Aux, batch: PolicyBatch, settings: PPOConfig) -> Aux:
    """Returns the KL weight of the next iteration, from the KL of this one's rollout."""
    if settings.kl_controller == "fixed":
        return aux
    assert batch.ref_logprobs is not None
    kl = sequence_kl(batch.old_logprobs, batch.ref_logprobs, batch.completion_mask)
    coef = adapt_kl_coef(
        aux["kl_coef"],
        kl.value,
        num_episodes=kl.weight,
        target=settings.kl_target,
        horizon=settings.kl_horizon,
    )
    return aux | {"kl_coef": coef}


PPO = Algorithm(
    trains=("policy", "value"),
    reads=lambda settings: ("reference", "reward"),
    loss=loss,
    adam_eps=1e-5,  # arXiv:2403.17031, detail 5
    figures=("reward/score", "policy/kl", "rollout/length", "rollout/eos_rate"),
    reports=(
        Measure("gold", "eval/gold"),
        Measure("score", "eval/score"),
        Measure("kl", "eval/policy/kl", is_compared=False),
        Measure("ref_perplexity", "eval/ref_perplexity"),
        Measure("distinct_2", "eval/rollout/distinct_2"),
        Measure("eos_rate", "eval/rollout/eos_rate"),
        Measure("length", "eval/rollout/length"),
    ),
    init_aux=lambda settings: {"kl_coef": settings.kl_coef},
    prepare=prepare,
    update_aux=update_aux,
    alarms=(("policy/ratio_gap_first", 0.05),),  # old and new differ before anything was learned
    leaves_out=lambda settings: settings.missing_eos == "mask",
    rates=lambda settings: {"value": settings.value_learning_rate} if settings.value_learning_rate else {},
)
