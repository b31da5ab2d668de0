"""Adapters: what they start as, which weights have them, and the whole model that they are equal to."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.kv_cache import unstack
from rlhf_jax.models.lora import Lora, choose_targets, merge
from rlhf_jax.models.transformer import make_model
from rlhf_jax.role_parts import part_shardings
from rlhf_jax.sharding import batch_sharding, traced_on
from tests import tiny

ALL = ("q", "k", "v", "o", "gate", "up", "down")
LORA = Lora(rank=3, alpha=6.0, targets=ALL)
MODEL = make_model(tiny.ARCHITECTURE, lora=LORA)
MIXTURE = dataclasses.replace(tiny.ARCHITECTURE, num_experts=4, experts_per_token=2)
INIT = jax.jit(MODEL.init_adapter)
HIDDEN = jax.jit(MODEL.hidden)
ROWS = tiny.rows(4)


def adapter(seed):
    """Returns an adapter after some training: b is not zero."""
    fresh = INIT(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed + 50), len(leaves))
    noise = [0.05 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [leaf + more for leaf, more in zip(leaves, noise, strict=True)])


@pytest.fixture(scope="module")
def trunk():
    return tiny.weights("policy", tiny.mesh())["trunk"]


def test_a_fresh_adapter_has_a_uniform_a_and_changes_nothing():
    """As PEFT starts it: Kaiming-uniform with slope sqrt(5) is uniform in +-1/sqrt(inputs)."""
    fresh = INIT(jax.random.key(0))["layers"]
    down, out = fresh["mlp"]["down_adapter"], fresh["attention"]["o_adapter"]
    assert down["a"].shape == (2, 48, 3) and down["b"].shape == (2, 3, 32)
    assert out["a"].shape == (2, 8, 4, 3) and out["b"].shape == (2, 3, 32)
    for a, inputs in ((down["a"], 48), (out["a"], 32)):
        assert 0.9 / math.sqrt(inputs) < float(jnp.max(jnp.abs(a))) <= 1 / math.sqrt(inputs)
        assert float(jnp.std(a)) == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.15)
        assert not np.array_equal(a[0], a[1])
    assert not any(np.any(leaf) for leaf in (down["b"], out["b"]))


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 6 / math.sqrt(3))])
def test_the_scale(rslora, scale):
    assert LORA._replace(rslora=rslora).scale == pytest.approx(scale)


def test_roles_on_one_trunk_are_the_merged_models(trunk):
    """x W + s (x A) B is x (W + s A B), for each role of a joint pass; without an adapter it is the trunk."""
    adapters = (adapter(1), None, adapter(2))
    found = jax.jit(MODEL.hidden_of_roles)(trunk, adapters, ROWS.tokens)
    for hidden, own in zip(found, adapters, strict=True):
        whole = trunk if own is None else merge(trunk, own, LORA)
        np.testing.assert_allclose(hidden, HIDDEN(whole, ROWS.tokens), rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(found[0] - found[1]))) > 0.01


@pytest.mark.parametrize("sizes", [{}, pytest.param({"expert": 2}, marks=pytest.mark.slow)])
def test_a_mixture_of_experts_has_adapters_on_its_attention_alone(sizes):
    """Loss and gradients are those of the merged model, also where the experts are on several devices."""
    lora = LORA._replace(targets=choose_targets(MIXTURE, ()))
    model = make_model(MIXTURE, lora=lora)
    assert set(model.shapes["adapter"]["layers"]) == {"attention"}
    trunk = jax.jit(model.init_trunk)(jax.random.key(0))
    trunk = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, trunk)
    own = {"layers": {"attention": adapter(1)["layers"]["attention"]}}

    def loss(hidden):
        return jnp.mean(jnp.sin(hidden))

    merged = jax.jit(jax.value_and_grad(lambda own: loss(model.hidden(merge(trunk, own, lora), ROWS.tokens))))
    mesh = tiny.mesh(**sizes)
    on_mesh = traced_on(
        mesh, lambda own, trunk, tokens: loss(model.hidden_of_roles(trunk, (own,), tokens)[0])
    )
    shardings = part_shardings(model, mesh, ("adapter", "trunk"))
    placed = jax.device_put((own, trunk), (shardings["adapter"], shardings["trunk"]))
    found = jax.jit(jax.value_and_grad(on_mesh))(*placed, jax.device_put(ROWS.tokens, batch_sharding(mesh)))
    assert tiny.relative_difference(found, merged(own)) < 1e-5


def test_gradients_of_an_adapter_are_those_through_the_merged_model(trunk):
    """dL/dA and dL/dB of every target, under remat as well."""
    own = adapter(1)

    def loss(hidden):
        return jnp.mean(jnp.sin(hidden))

    merged = jax.jit(jax.grad(lambda own: loss(MODEL.hidden(merge(trunk, own, LORA), ROWS.tokens))))
    expected = merged(own)
    for remat in ("none", "full"):
        model = make_model(tiny.ARCHITECTURE, remat=remat, lora=LORA)
        found = jax.jit(jax.grad(lambda own, m=model: loss(m.hidden_of_roles(trunk, (own,), ROWS.tokens)[0])))
        assert tiny.relative_difference(found(own), expected) < 1e-5


def test_targets_alone_have_adapters():
    model = make_model(tiny.ARCHITECTURE, lora=LORA._replace(targets=("q", "down")))
    layers = model.shapes["adapter"]["layers"]
    assert {name: set(node) for name, node in layers.items()} == {
        "attention": {"q_adapter"},
        "mlp": {"down_adapter"},
    }


def test_all_targets_are_those_that_a_model_has():
    ungated = dataclasses.replace(tiny.ARCHITECTURE, gated=False)
    assert choose_targets(tiny.ARCHITECTURE, ()) == ALL
    assert choose_targets(tiny.ARCHITECTURE, ("v", "q")) == ("q", "v")
    assert choose_targets(ungated, ()) == ("q", "k", "v", "o", "up", "down")
    assert choose_targets(MIXTURE, ()) == ("q", "k", "v", "o")
    with pytest.raises(ValueError, match="'gate': this model's MLP has no gate; choose of q, k, v, o, up"):
        choose_targets(ungated, ("q", "gate"))
    with pytest.raises(ValueError, match="'up': experts have no adapters; choose of q, k, v, o"):
        choose_targets(MIXTURE, ("up",))


def test_small_adapters_are_not_lost_while_decoding_in_bfloat16():
    """Merged into weights in bfloat16 they would be: what is less than half a step away rounds back."""
    params = jax.tree.map(jnp.bfloat16, MODEL.init_policy(jax.random.key(0)))
    adapter = jax.tree.map(lambda x: jnp.full_like(x, 1e-4), INIT(jax.random.key(1)))
    merged = merge(params["trunk"], adapter, LORA)["layers"]["attention"]["q"].astype(jnp.bfloat16)
    q = params["trunk"]["layers"]["attention"]["q"]
    assert np.mean(np.asarray(merged == q)) > 0.9
    weights = unstack(params | {"adapter": adapter}, tiny.ARCHITECTURE, "bfloat16", LORA)
    x = jnp.ones((1, 1, 32), jnp.bfloat16)
    for block, bare in zip(
        weights.blocks(), dataclasses.replace(weights, adapters=[None, None]).blocks(), strict=True
    ):
        moved = block.attention.q_adapter(x)
        assert float(jnp.max(jnp.abs(moved))) > 0 and not hasattr(bare.attention, "q_adapter")
