"""Every optimiser by name, on real parameters: the same on any mesh, sharded with them, saved as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.checkpoint import Checkpointer, load_params
from rlhf_jax.optim import make_optimizer
from rlhf_jax.role_parts import role_shardings
from tests import tiny

NAMES = ["adamw", "adafactor", "lion", "muon"]
FSDP = tiny.mesh(fsdp=8)


@pytest.fixture(autouse=True)
def small_matrices_are_factored(monkeypatch):
    monkeypatch.setattr("rlhf_jax.optim.FACTORED_FROM", 16)


@functools.cache
def state_of(name, mesh=FSDP, **dtypes):
    """Returns the train state of a fresh SFT stage."""
    dtypes = dict(dtypes)
    model = {"param_dtype": dtypes.get("param_dtype", "float32")}
    optimizer = {"name": name, "state_dtype": dtypes.get("state_dtype", "float32")}
    programs = tiny.programs(tiny.stage("sft", model=model, optimizer=optimizer), mesh)
    return programs.init_state(tiny.roles("sft", mesh)[0])


def num_bytes(tree, device=None):
    """Returns the bytes of all leaves, or of what one device has of them."""
    if device is None:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    parts = [part for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards]
    return sum(part.data.nbytes for part in parts if part.device == device)


def some_of(policy):
    """Returns leaves of every kind, sharded in every way."""
    trunk = policy["trunk"]
    attention, mlp = trunk["layers"]["attention"], trunk["layers"]["mlp"]
    blocks = {name: attention[name] for name in ("q", "o")} | {"down": mlp["down"]}
    return {"embed": trunk["embed"], "layers": blocks, "final_norm": trunk["final_norm"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_are_the_same_on_one_and_eight_devices(name):
    """Parameters and state, of gradients that are laid out as the parameters are."""
    optimizer = make_optimizer(tiny.stage("sft", optimizer={"name": name}).optimizer, num_steps=2)
    rng = np.random.default_rng(0)
    shapes = some_of(tiny.model().policy_shapes)
    start, *gradients = (
        jax.tree.map(lambda x: np.float32(0.02 * rng.normal(size=x.shape)), shapes) for _ in range(3)
    )

    def step(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def moved(mesh):
        shardings = some_of(role_shardings(tiny.model(), mesh, "policy"))
        on_mesh = jax.jit(step, out_shardings=(shardings, None))
        params = jax.device_put(start, shardings)
        state = jax.jit(optimizer.init)(params)
        for of_step in gradients:
            params, state = on_mesh(jax.device_put(of_step, shardings), state, params)
        return jax.device_get((jax.tree.map(np.subtract, jax.device_get(params), start), state))

    found, expected = moved(tiny.mesh(data=2, fsdp=2, tensor=2)), moved(tiny.mesh())
    assert tiny.relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_sharded_with_its_parameters(name):
    """A device has an eighth of it, but for norms, counts and what is factored."""
    state = state_of(name)
    device = FSDP.devices.flat[0]
    opt_state = state.opt_state["policy"]
    sizes = {"adamw": 2, "lion": 1, "muon": 1.1, "adafactor": 0.1}
    assert num_bytes(opt_state) < 1.2 * sizes[name] * num_bytes(state.params)
    if name == "adafactor":
        assert num_bytes(opt_state, device) < 0.1 * num_bytes(state.params)
    else:
        assert num_bytes(opt_state, device) < 0.14 * num_bytes(opt_state)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_halves_the_state(name):
    wide, half = state_of(name), state_of(name, state_dtype="bfloat16", param_dtype="bfloat16")
    assert num_bytes(half.params) * 2 == num_bytes(wide.params)
    assert num_bytes(half.opt_state) == pytest.approx(num_bytes(wide.opt_state) / 2, abs=64)
    exact = [leaf for leaf in jax.tree.leaves(half.opt_state) if leaf.dtype != jnp.bfloat16]
    assert all(leaf.size <= 3 for leaf in exact)  # counts, and Muon's coefficients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_comes_back_from_a_checkpoint(name, dtype, tmp_path):
    state = state_of(name, state_dtype=dtype, param_dtype=dtype)
    other = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state)
    with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpointer:
        checkpointer.save(1, state, {})
        found = checkpointer.restore(checkpointer.latest(), other)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), state.params["policy"]
    )
    loaded = load_params(tmp_path, "policy", shapes)  # by a stage that stores float32
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state.params["policy"]), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype(jnp.float32))
