"""TRPO's products, step and search: against explicit matrices, and on a bandit with a known answer."""

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algos.trpo import TRPO, line_search, make_update, natural_step
from rlhf_jax.batch import PolicyBatch, Rows
from rlhf_jax.metrics import to_host
from rlhf_jax.models.forward import make_forward
from rlhf_jax.online_config import TRPOConfig
from rlhf_jax.step import init_state
from tests import tiny

V, D = 5, 3


def network(hidden_of, num_completion, temperature=1.0, chunk=0):
    """Returns the forward of a policy with a hidden_of(trunk, tokens) and a linear head."""
    model = SimpleNamespace(
        hidden_of_roles=lambda trunk, adapters, tokens: (hidden_of(trunk, tokens),),
        logits=lambda policy, hidden: hidden @ policy["lm_head"],
    )
    return make_forward(cast(Any, model), num_completion, temperature, chunk)


def recurrent(trunk, tokens):
    """Returns states that depend on the tokens so far."""

    def next_state(state, token):
        state = jnp.tanh(state @ trunk["w"] + trunk["embed"][token])
        return state, state

    start = jnp.zeros((tokens.shape[0], D))
    return jnp.moveaxis(jax.lax.scan(next_state, start, tokens.T)[1], 0, 1)


def small_policy(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"trunk": {"w": normal(D, D), "embed": normal(V, D)}, "lm_head": normal(D, V)}


def small_batch():
    rows = tiny.rows(6)
    rows = rows._replace(tokens=rows.tokens % V)
    rng = np.random.default_rng(1)
    noise = [jnp.asarray(rng.normal(size=rows.tokens.shape), jnp.float32) for _ in range(4)]
    return PolicyBatch(rows, rows.completion_mask.at[1].set(False), *noise, None)  # a row left out


@pytest.mark.parametrize(("temperature", "chunk"), [pytest.param(1.0, 0, marks=pytest.mark.slow), (0.7, 6)])
def test_products_are_with_the_hessian_of_the_kl_and_with_the_gauss_newton_matrix(temperature, chunk):
    forward, policy, batch = network(recurrent, 8, temperature, chunk), small_policy(), small_batch()
    mask = batch.completion_mask
    flat, unravel = jax.flatten_util.ravel_pytree(policy)

    def kl(flat):
        new = {"policy": unravel(flat)}
        return jnp.where(mask, forward.policy_change(new, {"policy": policy}, {}, batch.rows)[2], 0).sum()

    def half(flat_move):
        of_tokens = forward.fisher({"policy": policy}, unravel(flat_move), {}, batch.rows)
        return 0.5 * jnp.where(mask, of_tokens, 0).sum()

    def logits(flat):
        params = unravel(flat)
        return recurrent(params["trunk"], batch.rows.tokens) @ params["lm_head"] / temperature

    jacobian = np.asarray(jax.jacobian(logits)(flat), np.float64)[:, :-1]  # of what predicts tokens 1, 2, ...
    p = np.asarray(jax.nn.softmax(logits(flat)), np.float64)[:, :-1]
    of_softmax = np.einsum("btv,vw->btvw", p, np.eye(V)) - p[..., None] * p[..., None, :]
    shown = np.asarray(mask)[:, 1:]
    expected = np.einsum("bt,btvi,btvw,btwj->ij", shown, jacobian, of_softmax, jacobian)
    products = np.asarray(jax.jit(jax.vmap(jax.grad(half)))(jnp.eye(flat.size)))
    assert np.linalg.norm(products - expected) < 1e-5 * np.linalg.norm(expected)
    hessian = np.asarray(jax.jit(jax.hessian(kl))(flat))
    assert np.linalg.norm(products - hessian) < 1e-4 * np.linalg.norm(hessian)
    move = np.random.default_rng(2).normal(size=flat.size)
    assert float(half(jnp.float32(move))) == pytest.approx(0.5 * move @ expected @ move, rel=1e-5)


def test_the_kl_is_of_whole_distributions_beside_logprobs_of_both():
    forward, old, new, batch = network(recurrent, 8, 0.7, 6), small_policy(0), small_policy(1), small_batch()
    logprobs, old_logprobs, kl = forward.policy_change({"policy": new}, {"policy": old}, {}, batch.rows)
    for found, policy in ((logprobs, new), (old_logprobs, old)):
        np.testing.assert_allclose(found, forward.logprobs({"policy": policy}, {}, batch.rows)[0], atol=1e-6)

    def distribution(policy):
        logits = np.asarray(recurrent(policy["trunk"], batch.rows.tokens) @ policy["lm_head"]) / 0.7
        logits = logits.astype(np.float64)
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    p, q = distribution(old), distribution(new)
    by_hand = np.zeros(kl.shape)
    by_hand[:, 1:] = (p * np.log(p / q)).sum(-1)[:, :-1]
    np.testing.assert_allclose(kl, np.where(batch.rows.completion_mask, by_hand, 0), atol=1e-5)


# A bandit: one state, as many rows of each action as its probability says

PROBABILITIES = np.array([1, 1, 2, 4]) / 8
ADVANTAGES = np.array([-1.0, 2.0, -0.5, -0.3])
BANDIT = network(lambda trunk, tokens: jnp.ones((*tokens.shape, 1)), 1)


def bandit_batch():
    actions = np.repeat(np.arange(4), [1, 1, 2, 4])
    tokens = jnp.stack([jnp.zeros(8, jnp.int32), jnp.asarray(actions, jnp.int32)], axis=1)
    rows = Rows(tokens, jnp.ones(8, jnp.int32), jnp.full(8, 2))

    def at_action(of_action):
        return jnp.zeros((8, 2)).at[:, 1].set(jnp.float32(of_action[actions]))

    old_logprobs, advantages = at_action(np.log(PROBABILITIES)), at_action(ADVANTAGES)
    zeros = jnp.zeros((8, 2))
    return PolicyBatch(rows, rows.completion_mask, old_logprobs, zeros, zeros, advantages, zeros)


BANDIT_POLICY = {"policy": {"trunk": {}, "lm_head": jnp.float32(np.log(PROBABILITIES))[None]}}


def bandit_step(settings):
    """Returns the direction, the policy after the search, and the metrics of both."""

    def of(batch):
        over_batch = lambda function: function(batch)  # noqa: E731
        parts = (BANDIT, BANDIT_POLICY, {}, over_batch, jnp.float32(8))
        direction = natural_step(*parts, settings)
        policy, metrics = line_search(*parts, direction, settings)
        return direction.step["lm_head"][0], policy["lm_head"][0], direction.metrics | metrics

    step, policy, metrics = jax.jit(of)(bandit_batch())
    return np.asarray(step, np.float64), np.asarray(policy, np.float64), to_host(metrics)


def kl_of(logits):
    q = np.exp(logits) / np.exp(logits).sum()
    return float(np.sum(PROBABILITIES * np.log(PROBABILITIES / q)))


def test_the_step_of_a_bandit_is_along_the_advantages():
    """g = p (A - E A) and F = diag(p) - p p' give x = A - mean A; the KL of the step is delta."""
    delta = 1e-4
    step, policy, metrics = bandit_step(TRPOConfig(delta=delta, damping=0.0))
    mean = PROBABILITIES @ ADVANTAGES
    deviation = np.sqrt(PROBABILITIES @ (ADVANTAGES - mean) ** 2)
    expected = np.sqrt(2 * delta) / deviation * (ADVANTAGES - ADVANTAGES.mean())
    np.testing.assert_allclose(step, expected, rtol=1e-3)
    old = np.log(PROBABILITIES)
    assert kl_of(old + step) == pytest.approx(delta, rel=0.02)
    assert kl_of(policy) <= delta * (1 + 1e-3)  # the program's float32 against float64
    assert metrics["policy/approx_kl"] <= delta
    assert metrics["policy/approx_kl"] == pytest.approx(kl_of(policy), rel=1e-2)
    q = np.exp(policy) / np.exp(policy).sum()
    assert (q - PROBABILITIES) @ ADVANTAGES > 0
    assert metrics["policy/surrogate_gain"] == pytest.approx((q - PROBABILITIES) @ ADVANTAGES, rel=1e-2)
    assert metrics["policy/line_search_failed"] == 0


def test_damping_turns_the_step_to_the_gradient_and_keeps_its_length():
    step, _, _ = bandit_step(TRPOConfig(delta=1e-4, damping=1e3))
    gradient = PROBABILITIES * (ADVANTAGES - PROBABILITIES @ ADVANTAGES)
    assert step @ gradient == pytest.approx(np.linalg.norm(step) * np.linalg.norm(gradient), rel=1e-4)
    assert kl_of(np.log(PROBABILITIES) + step) == pytest.approx(1e-4, rel=0.02)


def test_the_search_shortens_a_step_that_goes_too_far():
    """At delta = 0.1 the quadratic model is a third too small."""
    settings = TRPOConfig(delta=0.1, damping=0.0, line_search_factor=0.9)
    step, policy, metrics = bandit_step(settings)
    old, tried = np.log(PROBABILITIES), int(metrics["policy/line_search_steps"])
    assert kl_of(old + step) > 0.1 and tried == 3
    np.testing.assert_allclose(policy, old + 0.9 ** (tried - 1) * step, rtol=1e-5)
    assert metrics["policy/approx_kl"] <= 0.1 < kl_of(old + 0.9 ** (tried - 2) * step)
    assert metrics["policy/surrogate_gain"] > 0


def test_where_no_step_is_taken_the_policy_stays_and_it_is_counted():
    settings = TRPOConfig(delta=0.1, damping=0.0, line_search_steps=1)
    _, policy, metrics = bandit_step(settings)
    assert np.array_equal(np.float32(policy), np.asarray(BANDIT_POLICY["policy"]["lm_head"][0]))
    assert metrics["policy/line_search_failed"] == 1
    assert metrics["policy/approx_kl"] == metrics["policy/surrogate_gain"] == 0


# The whole update, with a value model that is one number


def update(batch, settings, **parts):
    """Returns the state before and after an update of the bandit, and the metrics."""
    forward = BANDIT._replace(
        values=lambda params, frozen, rows: jnp.broadcast_to(params["value"]["v"], rows.tokens.shape), **parts
    )
    optimizers = {"policy": optax.identity(), "value": optax.sgd(0.1)}
    state = init_state(BANDIT_POLICY | {"value": {"v": jnp.float32(0.5)}}, optimizers, {"kl_coef": 0.0})
    program = make_update(TRPO, forward, optimizers, settings, num_epochs=2)
    new, metrics = jax.jit(program)(state, {}, batch, jax.random.key(0))
    return state, new, to_host(metrics)


OF_THE_SEARCH = ("approx_kl", "surrogate_gain", "line_search_steps", "line_search_failed")
SETTINGS = TRPOConfig(delta=0.01, num_epochs=2, num_minibatches=1, value_clip_eps=10.0)


def test_the_value_model_has_its_own_optimiser():
    batch = bandit_batch()
    _, new, metrics = update(batch._replace(returns=jnp.ones((8, 2))), SETTINGS)
    assert float(new.params["value"]["v"]) == pytest.approx(0.5 + 0.05 + 0.045)  # two steps towards 1
    assert new.step == 1 and jax.tree.leaves(new.opt_state["policy"]) == []
    assert metrics["update/skipped"] == 0 and 0.005 < metrics["policy/approx_kl"] <= 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped_and_counted(bad):
    batch = bandit_batch()
    bad_advantages = batch._replace(advantages=batch.advantages.at[2, 1].set(bad))
    old, new, metrics = update(bad_advantages, SETTINGS)
    for a, b in zip(
        jax.tree.leaves(old.params["policy"]), jax.tree.leaves(new.params["policy"]), strict=True
    ):
        assert np.array_equal(a, b)
    assert metrics["update/skipped"] == pytest.approx(1 / 3)  # of the policy's step and two of the value
    assert metrics["not_finite/policy/grad_norm"] == 1 and metrics["not_finite/loss/value"] == 0
    assert all(np.isnan(metrics[f"policy/{name}"]) for name in OF_THE_SEARCH)
    assert new.params["value"]["v"] < old.params["value"]["v"]
    _, new, metrics = update(batch._replace(returns=batch.returns.at[2, 1].set(bad)), SETTINGS)
    assert new.params["value"]["v"] == 0.5 and metrics["update/skipped"] == pytest.approx(2 / 3)
    assert metrics["policy/approx_kl"] > 0.005


@pytest.mark.slow
def test_a_product_that_is_not_finite_is_no_failed_search():
    """It leaves conjugate gradients at x = 0, whose length is a number."""

    def fisher(params, move, frozen, rows):
        return jnp.full(rows.tokens.shape, jnp.nan) * jnp.square(move["lm_head"]).sum()

    old, new, metrics = update(bandit_batch(), SETTINGS, fisher=fisher)
    assert np.array_equal(old.params["policy"]["lm_head"], new.params["policy"]["lm_head"])
    assert metrics["update/skipped"] == pytest.approx(1 / 3)
    assert metrics["not_finite/policy/cg_residual"] == 1 and metrics["not_finite/policy/grad_norm"] == 0
    assert all(np.isnan(metrics[f"policy/{name}"]) for name in OF_THE_SEARCH)


@pytest.mark.slow
def test_no_advantage_moves_nothing():
    batch = bandit_batch()
    old, new, metrics = update(batch._replace(advantages=jnp.zeros((8, 2))), SETTINGS)
    assert np.array_equal(old.params["policy"]["lm_head"], new.params["policy"]["lm_head"])
    assert metrics["update/skipped"] == 0 and metrics["policy/line_search_failed"] == 1


@pytest.mark.slow
def test_importance_weighs_the_surrogate_alone():
    batch = bandit_batch()
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (8, 2)), jnp.float32)
    weighted = batch._replace(importance=weights)
    as_advantages = batch._replace(advantages=batch.advantages * weights)
    of = partial(update, settings=SETTINGS)
    np.testing.assert_allclose(
        of(weighted)[1].params["policy"]["lm_head"],
        of(as_advantages)[1].params["policy"]["lm_head"],
        rtol=1e-6,
    )
