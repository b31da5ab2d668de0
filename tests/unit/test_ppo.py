"""PPO's losses on hand-worked numbers, and its batch preparation against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos import ppo
from rlhf_jax.batch import PolicyBatch, Rollout, Rows, Scored
from rlhf_jax.metrics import to_host
from rlhf_jax.models.forward import Forward
from rlhf_jax.online_config import PPOConfig
from rlhf_jax.ops.importance import importance_weights


def one_token_batch(**fields):
    """A row of one prompt token and one completion token; the given fields stand at the completion."""
    rows = Rows(jnp.zeros((1, 2), jnp.int32), jnp.array([1]), jnp.array([2]))
    zeros = jnp.zeros((1, 2))
    names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    arrays = {name: zeros.at[0, 1].set(fields.get(name, 0.0)) for name in names}
    return PolicyBatch(rows=rows, completion_mask=rows.completion_mask, **arrays)


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (+1.0, 1.5, -1.2, 0.0),  # good token, already up enough: the clip binds, no push
        (+1.0, 0.5, -0.5, -0.5),  # good token went down: full push back up
        (-1.0, 1.5, 1.5, 1.5),  # bad token went up: full push down, no clip
        (-1.0, 0.5, 0.8, 0.0),  # bad token, already down enough
        (+2.0, 1.1, -2.2, -2.2),  # inside the clip
    ],
)
def test_clip_only_stops_pushes_that_went_far_enough(advantage, ratio, loss, slope):
    batch = one_token_batch(advantages=advantage, old_logprobs=-1.0)

    def value(logprob):
        return ppo.clipped_policy_loss(jnp.zeros((1, 2)).at[0, 1].set(logprob), batch, PPOConfig())[0].value

    logprob = -1.0 + np.log(ratio)
    assert value(logprob) == pytest.approx(loss, rel=1e-6)
    assert jax.grad(value)(logprob) == pytest.approx(slope, abs=1e-6)


def test_importance_weights_multiply_the_policy_loss_alone():
    """Value and gradient against numpy, on random tokens; padding is poison."""
    rng = np.random.default_rng(0)
    shape, cap, eps = (5, 7), 2.0, 0.2
    rows = Rows(jnp.zeros(shape, jnp.int32), jnp.array([1, 2, 1, 3, 2]), jnp.array([7, 6, 4, 7, 2]))
    mask = np.asarray(rows.completion_mask)
    new, old, sampled = (rng.normal(-2, 0.8, shape) for _ in range(3))
    advantages = rng.normal(size=shape)
    poisoned = [jnp.float32(np.where(mask, x, 1e6)) for x in (new, old, sampled, advantages)]
    weights, told = importance_weights(*poisoned[1:3], rows.completion_mask, cap)
    zeros = jnp.zeros(shape)
    batch = PolicyBatch(rows, rows.completion_mask, poisoned[1], zeros, zeros, poisoned[3], zeros, weights)

    def value(logprobs, batch):
        return ppo.clipped_policy_loss(logprobs, batch, PPOConfig(clip_eps=eps))[0].value

    found, slope = jax.value_and_grad(value)(poisoned[0], batch)
    untruncated, ratio = np.exp(old - sampled), np.exp(new - old)
    expected_weights, clipped = np.minimum(untruncated, cap), np.clip(ratio, 1 - eps, 1 + eps)
    binds = -advantages * clipped > -advantages * ratio
    terms = expected_weights * -advantages * np.where(binds, clipped, ratio)
    slopes = np.where(binds, 0, expected_weights * -advantages * ratio)
    assert found == pytest.approx(terms[mask].mean(), rel=1e-5)
    np.testing.assert_allclose(slope, np.where(mask, slopes, 0) / mask.sum(), rtol=1e-4, atol=1e-6)
    assert told["policy/importance"].value == pytest.approx(expected_weights[mask].mean(), rel=1e-5)
    assert told["policy/importance_clip_frac"].value == pytest.approx((untruncated > cap)[mask].mean())
    assert 0 < told["policy/importance_clip_frac"].value < 0.5

    alike, _ = importance_weights(poisoned[1], poisoned[1], rows.completion_mask, 1.0)
    plain = jax.value_and_grad(value)(poisoned[0], batch._replace(importance=None))
    weighted = jax.value_and_grad(value)(poisoned[0], batch._replace(importance=alike))
    np.testing.assert_array_equal(plain[0], weighted[0])
    np.testing.assert_array_equal(plain[1], weighted[1])


def test_ratio_metrics():
    batch = one_token_batch(advantages=1.0, old_logprobs=-1.0)
    _, metrics = ppo.clipped_policy_loss(
        jnp.zeros((1, 2)).at[0, 1].set(-1.0 + np.log(1.5)), batch, PPOConfig()
    )
    assert metrics["policy/ratio"].value == pytest.approx(1.5)
    assert metrics["policy/ratio_gap"].value == pytest.approx(0.5)
    assert metrics["policy/clip_frac"].value == 1.0
    assert metrics["policy/approx_kl"].value == pytest.approx(1.5 - 1 - np.log(1.5), rel=1e-5)


@pytest.mark.parametrize(
    "value, old, target, loss, slope, clip_frac",
    [
        (1.0, 0.0, 2.0, 0.5 * 1.8**2, 0.0, 1.0),  # moved beyond the clip towards the target: no more push
        (0.1, 0.0, 2.0, 0.5 * 1.9**2, -1.9, 0.0),  # inside the clip
        (-1.0, 0.0, 2.0, 0.5 * 3.0**2, -3.0, 0.0),  # moved the wrong way: the larger error counts
    ],
)
def test_value_clip(value, old, target, loss, slope, clip_frac):
    batch = one_token_batch(old_values=old, returns=target)

    def loss_of(v):
        return ppo.clipped_value_loss(jnp.zeros((1, 2)).at[0, 1].set(v), batch, 0.2)[0].value

    assert loss_of(value) == pytest.approx(loss, rel=1e-6)
    assert jax.grad(loss_of)(value) == pytest.approx(slope, abs=1e-6)
    _, metrics = ppo.clipped_value_loss(jnp.zeros((1, 2)).at[0, 1].set(value), batch, 0.2)
    assert metrics["value/clip_frac"].value == clip_frac


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_entropy_bonus_raises_the_entropy(entropy_coef):
    """Of a choice between two tokens, 0.9 to 0.1: dH / dlogit_i = -p_i (log p_i + H)."""
    p = np.array([0.9, 0.1])
    entropy = -np.sum(p * np.log(p))

    def terms_and_metrics(logits):
        every = jax.nn.log_softmax(logits)
        found = -jnp.sum(jnp.exp(every) * every)
        at_completion = jnp.array([[1e6, 1.0]])  # the prompt's column is garbage
        forward = Forward(
            logprobs=None,
            ref_logprobs=None,
            values=None,
            scores=None,
            policy_and_value=lambda *_: (jnp.zeros((1, 2)), found * at_completion, jnp.zeros((1, 2))),
            score_all=None,
        )
        return ppo.loss(forward, {}, {}, one_token_batch(), PPOConfig(entropy_coef=entropy_coef))

    def objective(logits):
        terms, _ = terms_and_metrics(logits)
        return sum(term.coef * term.mean.value for term in terms.values())

    _, metrics = terms_and_metrics(jnp.log(p))
    assert metrics["policy/entropy"].value == pytest.approx(entropy, rel=1e-5)
    raises = -p * (np.log(p) + entropy)
    np.testing.assert_allclose(-jax.grad(objective)(jnp.log(p)), entropy_coef * raises, atol=1e-6)


def scored_rollout(seed=0, num_rows=6, length=9):
    """Rows of different lengths, the last one a filling."""
    rng = np.random.default_rng(seed)
    prompt_lengths = np.array([1, 2, 3, 2, 1, 0])
    lengths = np.array([4, 9, 5, 6, 2, 0])
    tokens = rng.integers(0, 50, (num_rows, length))
    rows = Rows(jnp.asarray(tokens), jnp.asarray(prompt_lengths), jnp.asarray(lengths))

    def noise():
        return jnp.asarray(rng.normal(size=(num_rows, length)), jnp.float32)

    ended = jnp.array([True, False, True, False, True, False])
    rollout = Rollout(rows=rows, ended=ended, sampler_logprobs=noise())
    scores = jnp.asarray(rng.normal(size=num_rows), jnp.float32)
    return Scored(rollout, old_logprobs=noise(), ref_logprobs=noise(), values=noise(), scores=scores)


def prepare_in_python(scored, settings, kl_coef):
    """The order of NUMERICS 17, one token at a time."""
    rows = jax.device_get(scored.rollout.rows)
    rewards, advantages, returns, kept, totals = {}, {}, {}, [], []
    for b in range(len(rows.lengths)):
        tokens = range(rows.prompt_lengths[b], rows.lengths[b])
        score, ended = float(scored.scores[b]), bool(scored.rollout.ended[b])
        if not ended and settings.missing_eos == "subtract":
            score -= settings.missing_eos_value
        if not ended and settings.missing_eos == "replace":
            score = settings.missing_eos_value
        if not len(tokens) or (not ended and settings.missing_eos == "mask"):
            continue
        for t in tokens:
            gap = float(scored.old_logprobs[b, t]) - float(scored.ref_logprobs[b, t])
            rewards[b, t] = -kl_coef * gap + (score if t == tokens[-1] else 0.0)
            kept.append((b, t))
        totals.append(sum(rewards[b, t] for t in tokens))
    if settings.whiten_rewards:
        mean, std = np.mean(list(rewards.values())), np.sqrt(np.var(list(rewards.values())) + 1e-8)
        rewards = {at: (r - mean) / std + mean for at, r in rewards.items()}
    for b, t in reversed(kept):
        value = float(scored.values[b, t])
        next_value = float(scored.values[b, t + 1]) if (b, t + 1) in rewards else 0.0
        delta = rewards[b, t] + settings.gamma * next_value - value
        advantages[b, t] = delta + settings.gamma * settings.gae_lambda * advantages.get((b, t + 1), 0.0)
        returns[b, t] = advantages[b, t] + value
    if settings.whiten_advantages:
        mean, std = np.mean(list(advantages.values())), np.sqrt(np.var(list(advantages.values())) + 1e-8)
        advantages = {at: (a - mean) / std for at, a in advantages.items()}
    old_values = [float(scored.values[at]) for at in kept]
    residuals = np.array([returns[at] for at in kept]) - old_values
    metrics = {
        "reward/total": np.mean(totals),
        "policy/kl_coef": kl_coef,
        "value/mean": np.mean(old_values),
        "value/explained_variance": 1 - np.var(residuals) / np.var([returns[at] for at in kept]),
    }
    return advantages, returns, set(kept), metrics


@pytest.mark.parametrize("missing_eos", ["none", "subtract", "replace", "mask"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_prepare_follows_the_order_of_operations(missing_eos, whiten_rewards):
    settings = PPOConfig(
        missing_eos=missing_eos,
        missing_eos_value=0.7,
        whiten_rewards=whiten_rewards,
        gamma=0.9,
        gae_lambda=0.8,
    )
    scored = scored_rollout()
    batch, metrics = ppo.prepare(scored, {"kl_coef": jnp.float32(0.3)}, settings)
    advantages, returns, kept, expected_metrics = prepare_in_python(scored, settings, 0.3)
    assert to_host(metrics) == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
    assert {tuple(at) for at in np.argwhere(batch.completion_mask)} == kept
    for at in kept:
        assert batch.advantages[at] == pytest.approx(advantages[at], abs=1e-5)
        assert batch.returns[at] == pytest.approx(returns[at], abs=1e-5)


@pytest.mark.parametrize("poison", [1e6, np.nan])
def test_garbage_outside_the_completions_changes_nothing(poison):
    settings = PPOConfig(missing_eos="mask", whiten_rewards=True)
    scored = scored_rollout()
    aux = {"kl_coef": jnp.float32(0.3)}
    kept = scored.rollout.rows.completion_mask & scored.rollout.ended[:, None]
    poisoned = scored._replace(
        old_logprobs=jnp.where(kept, scored.old_logprobs, poison),
        ref_logprobs=jnp.where(kept, scored.ref_logprobs, poison),
        values=jnp.where(kept, scored.values, poison),
        scores=jnp.where(scored.rollout.ended, scored.scores, poison),
    )
    clean, clean_metrics = ppo.prepare(scored, aux, settings)
    batch, metrics = ppo.prepare(poisoned, aux, settings)
    np.testing.assert_array_equal(clean.advantages, batch.advantages)
    np.testing.assert_array_equal(clean.returns, batch.returns)
    assert jax.device_get(clean_metrics) == jax.device_get(metrics)

    def losses(batch, logprobs, values):
        policy, _ = ppo.clipped_policy_loss(logprobs, batch, PPOConfig())
        value, _ = ppo.clipped_value_loss(values, batch, 0.2)
        return policy.value + value.value

    logprobs, values = scored.old_logprobs + 0.1, scored.values + 0.1
    bad = jnp.where(kept, 0.0, poison)
    clean_loss = jax.value_and_grad(losses, argnums=(1, 2))(clean, logprobs, values)
    bad_loss = jax.value_and_grad(losses, argnums=(1, 2))(batch, logprobs + bad, values + bad)
    for a, b in zip(jax.tree.leaves(clean_loss), jax.tree.leaves(bad_loss), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adaptive_coefficient_follows_the_rollouts_kl():
    settings = PPOConfig(kl_controller="adaptive", kl_target=2.0, kl_horizon=100, batch_size=2)
    rows = Rows(jnp.zeros((2, 3), jnp.int32), jnp.array([1, 1]), jnp.array([3, 2]))
    zeros = jnp.zeros((2, 3))
    # 3.0 and 1.4 nats: mean 2.2, ten per cent above the target.
    old = zeros.at[0, 1:].set(1.5).at[1, 1].set(1.4)
    batch = PolicyBatch(rows, rows.completion_mask, old, zeros, zeros, zeros, zeros)
    aux = ppo.update_aux({"kl_coef": jnp.float32(0.5)}, batch, {}, settings)
    assert aux["kl_coef"] == pytest.approx(0.5 * (1 + 0.1 * 2 / 100), rel=1e-6)
    fixed = ppo.update_aux({"kl_coef": jnp.float32(0.5)}, batch, {}, PPOConfig())
    assert fixed["kl_coef"] == 0.5


def test_a_completion_as_one_action_has_the_advantage_of_its_first_token():
    settings = PPOConfig(ratio="sequence", whiten_advantages=False)
    scored = scored_rollout()
    batch, _ = ppo.prepare(scored, {"kl_coef": jnp.float32(0.3)}, settings)
    rows = jax.device_get(scored.rollout.rows)
    for b in range(5):
        of = slice(rows.prompt_lengths[b], rows.lengths[b])
        total = scored.scores[b] - 0.3 * np.sum((scored.old_logprobs - scored.ref_logprobs)[b, of])
        np.testing.assert_allclose(batch.returns[b, of], total, rtol=1e-5)
        expected = total - scored.values[b, rows.prompt_lengths[b]]
        np.testing.assert_allclose(batch.advantages[b, of], expected, rtol=1e-5)
