"""Roles that share parameters: hydra against models of their own, what is trained, and the first ratio."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.forward import make_forward
from rlhf_jax.models.lora import merge
from tests import tiny
from tests.contract.test_algorithms import assert_same, batch_of, updated

MESH = tiny.mesh()
KEY = jax.random.key(1)


@functools.cache
def programs_of(sharing):
    return tiny.programs(tiny.stage("ppo", sharing), MESH)


def without_adapters(tree):
    """Returns a hydra's roles with adapters that change nothing."""
    return {
        role: {
            part: jax.tree.map_with_path(lambda path, x: x * (path[-1].key != "b"), weights)
            if part == "adapter"
            else weights
            for part, weights in parts.items()
        }
        for role, parts in tree.items()
    }


def as_separate(trained, frozen):
    """Returns a hydra's roles as models of their own, adapters merged."""
    lora = tiny.model(tiny.stage("ppo", "hydra")).lora
    base = frozen["base"]

    def whole(role, parts):
        heads = {part: weights for part, weights in parts.items() if part == "score_head"}
        return heads | {"trunk": merge(base["trunk"], parts["adapter"], lora)}

    return (
        {role: whole(role, parts) for role, parts in trained.items()},
        {"reference": base, "reward": whole("reward", frozen["reward"])},
    )


def collected(sharing, trained, frozen):
    programs = programs_of(sharing)
    rollout = programs.rollout(trained, frozen, tiny.prompts(), KEY)
    return jax.device_get(programs.score(trained, frozen, rollout)[0])


@pytest.mark.parametrize("adapters", ["zero", "trained"])
def test_a_hydra_is_what_its_merged_models_are(adapters):
    """The same tokens and, of every role, the same numbers; without adapters the merged model is the base."""
    trained, frozen = tiny.roles("ppo", MESH, "hydra")
    if adapters == "zero":
        trained, frozen = without_adapters(trained), without_adapters(frozen)
    found = collected("hydra", trained, frozen)
    expected = collected("separate", *as_separate(trained, frozen))
    np.testing.assert_array_equal(found.rollout.rows.tokens, expected.rollout.rows.tokens)
    for name in ("old_logprobs", "ref_logprobs", "values", "scores"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name
        )
    gap = np.sum(np.abs(found.old_logprobs - found.ref_logprobs))
    assert gap < 1e-4 if adapters == "zero" else gap > 1e-2


def test_gradients_of_a_hydra_are_those_through_its_merged_models():
    """Of both terms of the loss, in the joint pass: dL/dA, dL/dB and the value head's."""
    trained, frozen = tiny.roles("ppo", MESH, "hydra")
    stage = tiny.stage("ppo", "hydra")
    rows = tiny.rows(4)

    def loss(forward, params, frozen):
        logprobs, entropy, values = forward.policy_and_value(params, frozen, rows)
        return jnp.sum(jnp.sin(logprobs)) + jnp.sum(entropy) + jnp.sum(jnp.cos(values))

    def through_merged(params):
        separate, others = as_separate(params, frozen)
        return loss(make_forward(tiny.model(), 8), separate, others)

    forward = make_forward(tiny.model(stage), 8)
    found = jax.jit(jax.grad(lambda params: loss(forward, params, frozen)))(trained)
    assert tiny.relative_difference(found, jax.jit(jax.grad(through_merged))(trained)) < 1e-5


def test_a_trunk_with_a_value_head_is_two_models_with_equal_weights():
    """The gradient of the shared trunk is the sum of both models' (NUMERICS 29)."""
    trained, _ = tiny.roles("ppo", MESH, "trunk")
    rows, forward = tiny.rows(4), make_forward(tiny.model(), 8)

    def loss(params):
        logprobs, entropy, values = forward.policy_and_value(params, {}, rows)
        return jnp.sum(jnp.sin(logprobs)) + jnp.sum(entropy) + jnp.sum(jnp.cos(values))

    two = trained | {"value": trained["value"] | {"trunk": trained["policy"]["trunk"]}}
    grad = jax.jit(jax.value_and_grad(loss))
    (found, of_shared), (expected, of_two) = grad(trained), grad(two)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    summed = jax.tree.map(jnp.add, of_two["policy"]["trunk"], of_two["value"]["trunk"])
    assert tiny.relative_difference(of_shared["policy"]["trunk"], summed) < 1e-5
    assert tiny.relative_difference(of_shared["value"]["score_head"], of_two["value"]["score_head"]) < 1e-5


@pytest.mark.parametrize("sharing", ["trunk", "hydra"])
def test_the_first_ratio_is_one_and_frozen_roles_stay(sharing):
    """NUMERICS 11; what is trained is adapters and heads alone, in the optimiser too."""
    programs = programs_of(sharing)
    trained, frozen = tiny.roles("ppo", MESH, sharing)
    before = jax.device_get(frozen)
    state = programs.init_state(trained)
    rollout = programs.rollout(state.params, frozen, tiny.prompts(), KEY)
    scored, _ = programs.score(state.params, frozen, rollout)
    batch, _ = programs.advantages(scored, state.aux)
    state, metrics = programs.update(state, frozen, batch, jax.random.key(2))
    assert float(metrics["policy/ratio_gap_first"].value) < 1e-5
    assert float(metrics["policy/ratio_gap"].value) > 1e-4  # later minibatches have moved
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    parts = {role: set(tree) for role, tree in state.params.items()}
    if sharing == "hydra":
        assert parts == {"policy": {"adapter"}, "value": {"adapter", "score_head"}}
        sizes = [leaf.size for leaf in jax.tree.leaves((state.params, state.opt_state))]
        assert max(sizes) == 2 * 48 * 3  # of down_adapter's a: no leaf of the base's size
        again, _ = programs.score(state.params, frozen, rollout)
        np.testing.assert_array_equal(again.ref_logprobs, scored.ref_logprobs)
        assert np.max(np.abs(again.old_logprobs - scored.old_logprobs)) > 1e-4
    else:
        assert parts == {"policy": {"trunk"}, "value": {"score_head"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo:trunk", "ppo:hydra"])
def test_padding_order_microbatches_and_devices_change_nothing(name):
    """All at once, for one compilation; test_algorithms.py has them one by one."""
    batch = batch_of(name, tiny.rows())
    order = np.random.default_rng(0).permutation(8)

    def other(x):
        x = x[order]
        return jnp.pad(x, ((0, 0), (0, 5)), constant_values=x.dtype != bool and 7) if x.ndim == 2 else x

    mesh = tiny.mesh(data=1, fsdp=2, tensor=2)
    found = updated(name, jax.tree.map(other, batch), mesh, microbatch_size=4)
    assert_same(found, updated(name, batch))
