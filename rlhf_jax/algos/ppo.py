"""Proximal policy optimisation: clipped surrogate, clipped value loss, KL to the reference."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.algos.algorithm import Algorithm, Aux, Measure, Term, Terms
from rlhf_jax.batch import Max, Mean, Metrics, Params, PolicyBatch, Scored
from rlhf_jax.models.forward import Forward
from rlhf_jax.online_config import PolicyGradientConfig, PPOConfig
from rlhf_jax.ops.advantages import gae
from rlhf_jax.ops.aggregation import aggregated, sequence_means, sequence_sums
from rlhf_jax.ops.kl import MAX_LOG_RATIO, adapt_kl_coef, adapt_old_kl_coef, k2, k3, log_ratio, sequence_kl
from rlhf_jax.ops.masking import WHITEN_EPS, keep, masked, masked_max, masked_var, told_of_any, whiten
from rlhf_jax.ops.shaping import apply_missing_eos, first_token, running_statistics, token_rewards

SCORE_STATISTICS = ("score_count", "score_mean", "score_var")
"""Of all scores so far, in the train state's aux."""


def clipped_policy_loss(
    logprobs: Array, batch: PolicyBatch, settings: PolicyGradientConfig, longest: int = 1
) -> tuple[Mean, Metrics]:
    """Returns the clipped surrogate loss, to minimise, and metrics of the ratio, that of tokens.

    L_t = w_t max(-A_t r_t, -A_t clip(r_t, 1 - low, 1 + high)),   log r_t = logprobs_t - old_logprobs_t

    With `surrogate: kl` L_t = -w_t A_t r_t. With `ratio: sequence_mean` log r_t is the mean of that over the
    completion, with `sequence` its sum. With `dual_clip: c` a token with A_t < 0 loses at most -c A_t.

    Args:
        logprobs: f32[B, T], nats, under the policy being trained; the only input with a gradient.
        batch: old_logprobs and advantages f32[B, T], completion_mask bool[B, T], and w: importance f32[B, T]
            where another policy than the old one has sampled; else w is 1.
        settings: reads surrogate, clip_eps, clip_eps_high, dual_clip, ratio and aggregation.
        longest: the most completion tokens of a sequence.
    Source: arXiv:1707.06347 eq. 7, with a mean over the tokens of the global batch by default, not per
        sequence; GSPO arXiv:2507.18071 eq. 5 to 7; dual clip arXiv:1912.09729 eq. 5.
    """
    mask, low = batch.completion_mask, settings.clip_eps
    log_ratios = log_ratio(logprobs, batch.old_logprobs, mask)
    of_tokens = ratio = jnp.exp(log_ratios)
    match settings.ratio:
        case "sequence_mean":
            ratio = jnp.exp(sequence_means(log_ratios, mask, batch.rows))
        case "sequence":
            sums = keep(sequence_sums(log_ratios, batch.rows), mask)
            ratio = jnp.exp(jnp.clip(sums, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    advantages = keep(batch.advantages, mask)  # before it is multiplied: garbage must not reach a gradient
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - low, 1 + (settings.clip_eps_high or low))
    surrogate = jnp.maximum(plain, clipped) if settings.surrogate == "clip" else plain
    if settings.dual_clip:
        bound = -settings.dual_clip * advantages
        surrogate = jnp.where(advantages < 0, jnp.minimum(surrogate, bound), surrogate)
    if batch.importance is not None:
        surrogate = keep(batch.importance, mask) * surrogate
    return aggregated(surrogate, mask, batch.rows, settings.aggregation, longest), {
        "policy/clip_frac": masked(jnp.float32(clipped > plain), mask),
        "policy/ratio": masked(of_tokens, mask),
        "policy/ratio_max": Max(masked_max(of_tokens, mask)),
        "policy/ratio_gap": Max(masked_max(jnp.abs(of_tokens - 1), mask)),
        "policy/approx_kl": masked(k3(batch.old_logprobs, logprobs), mask),
    }


def policy_terms(
    forward: Forward, logprobs: Array, entropy: Array, batch: PolicyBatch, settings: PolicyGradientConfig
) -> tuple[Terms, Metrics]:
    """Returns the terms of a policy's loss: the surrogate and, where their weights are not 0, KL and entropy.

    Args:
        forward: reads longest.
        logprobs, entropy: f32[B, T], nats, of the policy being trained.
        batch, settings: see `clipped_policy_loss`; kl_weights f32[B, T] where the KL is a term of the loss.
    """
    mask = batch.completion_mask

    def mean(x: Array) -> Mean:
        return aggregated(x, mask, batch.rows, settings.aggregation, forward.longest)

    policy, metrics = clipped_policy_loss(logprobs, batch, settings, forward.longest)
    terms = {"policy": Term(policy)}
    if batch.kl_weights is not None:
        assert batch.ref_logprobs is not None
        gap = log_ratio(logprobs, batch.ref_logprobs, mask)
        kl = (k2 if settings.kl_term == "k2" else k3)(gap, jnp.zeros_like(gap))
        terms["kl"] = Term(mean(keep(batch.kl_weights, mask) * kl))
    if batch.old_kl_weights is not None:
        gap = log_ratio(batch.old_logprobs, logprobs, mask)  # the samples are the old policy's
        terms["old_kl"] = Term(mean(keep(batch.old_kl_weights, mask) * k3(gap, jnp.zeros_like(gap))))
    if settings.entropy_coef:
        terms["entropy"] = Term(mean(-entropy), settings.entropy_coef)
    return terms, metrics | {"policy/entropy": masked(lax.stop_gradient(entropy), mask)}


def ptx_terms(
    forward: Forward, params: Params, frozen: Params, batch: PolicyBatch, settings: PolicyGradientConfig
) -> Terms:
    """Returns the loss on demonstrations, that of algorithm sft; no term where its weight is 0.

    ptx_coef L,   L = -mean over completion tokens of log pi(token)

    Args:
        forward: reads demonstration_logprobs, which have temperature 1: no policy has sampled these tokens.
        params, frozen: by role.
        batch: its ptx, there where ptx_coef is not 0; the mean is over the tokens that carry loss in it.
        settings: reads ptx_coef.
    Source: arXiv:2203.02155 eq. 2, whose coefficient is of another mean, and whose texts are those of
        pretraining, eight for each completion.
    """
    assert (batch.ptx is not None) == bool(settings.ptx_coef), "demonstrations go with ptx_coef"
    if batch.ptx is None:
        return {}
    assert forward.demonstration_logprobs is not None
    logprobs = forward.demonstration_logprobs(params, frozen, batch.ptx)
    return {"ptx": Term(masked(-logprobs, batch.ptx.completion_mask), settings.ptx_coef)}


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
    """Returns the terms of policy and value, and the metrics of an update."""
    logprobs, entropy, values = forward.policy_and_value(params, frozen, batch.rows)
    terms, metrics = policy_terms(forward, logprobs, entropy, batch, settings)
    terms |= ptx_terms(forward, params, frozen, batch, settings)
    value, value_metrics = clipped_value_loss(values, batch, settings.value_clip_eps)
    return terms | {"value": Term(value, settings.value_coef)}, metrics | value_metrics


def shaped_scores(scored: Scored, aux: Aux, settings: PolicyGradientConfig) -> tuple[Array, Array, Metrics]:
    """Returns the scores f32[B] that become rewards, the rows bool[B] that stay, and what long ones lost.

    Running normalisation, clip, missing-EOS rule, price of overlong completions, in this order.

    Args:
        scored: a judged rollout.
        aux: statistics of the scores of earlier iterations, where settings.normalize_scores.
        settings: reads normalize_scores, score_clip, missing_eos and overlong_*.
    Source: arXiv:1909.08593's code and arXiv:2307.04964 (normalisation, clip); arXiv:2503.14476 eq. 13.
    """
    stays = _stays(scored, settings)
    scores, lost = _as_rewards(scored, _moments(scored, aux, settings), settings)
    return scores, stays, {"reward/overlong": masked(lost, stays)} if settings.overlong_from else {}


def greedy_as_rewards(scored: Scored, aux: Aux, settings: PolicyGradientConfig) -> Array:
    """Returns the scores of the greedy completions, f32[N], as `shaped_scores` makes rewards of the others.

    Where scores are normalised, it is with the statistics of the sampled ones.
    """
    assert scored.greedy is not None
    return _as_rewards(scored.greedy, _moments(scored, aux, settings), settings)[0]


def _stays(scored: Scored, settings: PolicyGradientConfig) -> Array:
    return scored.rollout.rows.sequence_mask & (scored.rollout.ended | (settings.missing_eos != "mask"))


def _moments(scored: Scored, aux: Aux, settings: PolicyGradientConfig) -> tuple[Array, Array] | None:
    """Returns mean and variance with which scores are normalised; None where they are not."""
    if not settings.normalize_scores:
        return None
    _, mean, var = _statistics(aux, scored.scores, _stays(scored, settings))
    return mean, var


def _as_rewards(
    scored: Scored, moments: tuple[Array, Array] | None, settings: PolicyGradientConfig
) -> tuple[Array, Array]:
    """Returns the scores that become rewards, and what long completions lost of them, f32[B]."""
    scores, rows = scored.scores, scored.rollout.rows
    if moments is not None:
        mean, var = moments
        scores = (scores - mean) / jnp.sqrt(var + WHITEN_EPS)
    if settings.score_clip:
        scores = jnp.clip(scores, -settings.score_clip, settings.score_clip)
    rule, value = settings.missing_eos, settings.missing_eos_value
    scores, _ = apply_missing_eos(scores, scored.rollout.ended, rule, value)
    if not settings.overlong_from:
        return scores, jnp.zeros_like(scores)
    beyond = (rows.lengths - rows.prompt_lengths - settings.overlong_from) / settings.overlong_buffer
    lost = settings.overlong_penalty * jnp.clip(beyond, 0.0, 1.0)
    return scores - lost, lost


def _statistics(aux: Aux, scores: Array, mask: Array) -> tuple[Array, Array, Array]:
    count, mean, var = (aux[name] for name in SCORE_STATISTICS)
    return running_statistics(count, mean, var, scores, mask)


def policy_batch(
    scored: Scored, aux: Aux, settings: PolicyGradientConfig, mask: Array, advantages: Array
) -> PolicyBatch:
    """Returns what an update of the policy reads, without values.

    Args:
        scored: a judged rollout.
        aux: the weights of the KLs.
        settings: which KLs are terms of the loss, and whether statistics of scores are kept.
        mask: bool[B, T], completion tokens of the rows that stay.
        advantages: f32[B, T].
    """

    def everywhere(name: str) -> Array:
        return jnp.full(mask.shape, aux[name])

    in_loss = settings.kl_coef > 0 and settings.kl_term != "reward"
    return PolicyBatch(
        rows=scored.rollout.rows,
        completion_mask=mask,
        old_logprobs=scored.old_logprobs,
        ref_logprobs=scored.ref_logprobs,
        old_values=None,
        advantages=advantages,
        returns=None,
        kl_weights=everywhere("kl_coef") if in_loss else None,
        old_kl_weights=everywhere("old_kl_coef") if settings.surrogate == "kl" else None,
        scores=scored.scores if settings.normalize_scores else None,
    )


def prepare(scored: Scored, aux: Aux, settings: PPOConfig) -> tuple[PolicyBatch, Metrics]:
    """Returns the batch that the update reads, and what the rollout says of the policy.

    The order of NUMERICS: score, missing-EOS rule, KL term, reward whitening (mean kept), GAE, returns,
    advantage whitening; all statistics over the valid tokens of the whole batch. Everything is float32.
    """
    assert scored.ref_logprobs is not None and scored.values is not None
    rows, values = scored.rollout.rows, scored.values
    scores, stays, told = shaped_scores(scored, aux, settings)
    mask = rows.completion_mask & stays[:, None]
    kl_coef = aux["kl_coef"] if settings.kl_term == "reward" else jnp.float32(0)
    rewards = token_rewards(scores, scored.old_logprobs, scored.ref_logprobs, mask, kl_coef)
    total = masked(jnp.sum(rewards, axis=1), stays)
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    if settings.ratio == "sequence":  # one action, whose reward is all there is
        gained = jnp.sum(rewards, axis=1)
        of_action = gained - jnp.sum(keep(values, first_token(mask)), axis=1)
        if settings.whiten_advantages:
            of_action = whiten(of_action, stays)
        advantages, returns = (keep(x[:, None], mask) for x in (of_action, gained))
    else:
        advantages, returns = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.gae_lambda)
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask)
    batch = policy_batch(scored, aux, settings, mask, advantages)._replace(old_values=values, returns=returns)
    return_var = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask) / jnp.maximum(return_var, 1e-8)
    return batch, told | {
        "reward/total": total,
        "policy/kl_coef": aux["kl_coef"],
        "value/mean": masked(values, mask),
        "value/explained_variance": told_of_any(1 - unexplained, mask),
    }


def init_aux(settings: PolicyGradientConfig) -> dict[str, float]:
    """Returns the weights that may change, and the statistics of no scores."""
    aux = {"kl_coef": settings.kl_coef}
    if settings.surrogate == "kl":
        aux["old_kl_coef"] = settings.old_kl_coef
    return aux | (dict.fromkeys(SCORE_STATISTICS, 0.0) if settings.normalize_scores else {})


def update_aux(aux: Aux, batch: PolicyBatch, metrics: Metrics, settings: PolicyGradientConfig) -> Aux:
    """Returns the aux of the next iteration.

    The weight of the KL to the reference follows that of this iteration's rollout, the weight of the KL from
    the old policy what the last pass over it had; the statistics of scores go on.
    """
    if settings.kl_controller == "adaptive" and batch.ref_logprobs is not None:
        kl = sequence_kl(batch.old_logprobs, batch.ref_logprobs, batch.completion_mask)
        target, horizon = settings.kl_target, settings.kl_horizon
        coef = adapt_kl_coef(aux["kl_coef"], kl.value, num_episodes=kl.weight, target=target, horizon=horizon)
        aux = aux | {"kl_coef": coef}
    if settings.surrogate == "kl" and settings.old_kl_target:
        last = metrics["policy/approx_kl_last"]
        assert isinstance(last, Mean)
        coef = adapt_old_kl_coef(aux["old_kl_coef"], last.value, target=settings.old_kl_target)
        aux = aux | {
            "old_kl_coef": jnp.where(last.weight > 0, coef, aux["old_kl_coef"])
        }  # not if all skipped
    if batch.scores is not None:
        found = _statistics(aux, batch.scores, jnp.any(batch.completion_mask, axis=1))
        aux = aux | dict(zip(SCORE_STATISTICS, found, strict=True))
    return aux


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
    init_aux=init_aux,
    prepare=prepare,
    update_aux=update_aux,
    alarms=(("policy/ratio_gap_first", 0.05),),  # old and new differ before anything was learned
    leaves_out=lambda settings: settings.missing_eos == "mask",
    rates=lambda settings: {"value": settings.value_learning_rate} if settings.value_learning_rate else {},
    waits=lambda settings: {"policy": settings.value_warmup * settings.num_epochs * settings.num_minibatches},
)
