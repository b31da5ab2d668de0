"""What an update does to the train state: a step that is not finite leaves it alone; its buffers are donated.

NUMERICS 33, on one device and on eight alike, by the compiled programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.metrics import to_host
from tests import tiny
from tests.contract.test_algorithms import batch_of

ONLINE = ["grpo", "ppo"]
LOSSES = {
    "dpo": {"preference"},
    "grpo": {"policy", "kl"},
    "ppo": {"policy"},
    "reward_model": {"bradley_terry"},
    "sft": {"nll"},
}
"""The losses that a bad parameter of the first role reaches, of an algorithm of each kind."""
NAMES = sorted(LOSSES)
MESHES = [{"data": 1}, {"data": 8}]
RARE = 63  # a token that one row alone has


@functools.cache
def programs_of(name, mesh):
    two_steps = {"num_epochs": 1, "num_minibatches": 2, "group_size": 1} if name in ONLINE else {}
    return tiny.programs(tiny.stage(name, settings={"batch_size": 16 // rows_per(name)} | two_steps), mesh)


def rows_per(name):
    return ALGORITHMS[name].rows_per_record


def batch(name):
    """Sixteen rows, of which row 5 alone has the token RARE, in its completion."""
    rows = tiny.rows(16)
    tokens = jnp.where(rows.tokens == RARE, 2, rows.tokens)
    tokens = tokens.at[5, rows.prompt_lengths[5]].set(RARE)
    return batch_of(name, rows._replace(tokens=tokens))


def run(name, batch, mesh, poisoned_embedding=False):
    """Returns the state before and after one update, on the host, and the metrics."""
    programs = programs_of(name, mesh)
    trained, frozen = tiny.roles(name, mesh)
    if poisoned_embedding:
        first = trained[ALGORITHMS[name].trains[0]]["trunk"]["embed"]
        first["embedding"] = first["embedding"].at[RARE].set(jnp.nan)
    state = programs.init_state(trained)
    before = jax.tree.map(np.array, jax.device_get(state))
    state, metrics = programs.update(state, frozen, batch, jax.random.key(0))
    return before, jax.device_get(state), metrics


def assert_untouched(before, after):
    for part in ("params", "opt_state"):
        old, new = (jax.tree.leaves(getattr(state, part)) for state in (before, after))
        assert [x.tobytes() for x in old] == [np.asarray(x).tobytes() for x in new], part
    assert after.step == before.step + 1  # the data goes on


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_a_row_that_is_not_finite_changes_no_bit(name, sizes):
    """One NaN, in a parameter that one row of the batch reads, on one of the devices."""
    # Tied embeddings take it to the logits of every row, so that both minibatches of PPO are skipped.
    before, after, metrics = run(name, batch(name), tiny.mesh(**sizes), poisoned_embedding=True)
    assert_untouched(before, after)
    num_steps = 2 if name in ONLINE else 1
    assert (metrics["update/skipped"].total, metrics["update/skipped"].weight) == (num_steps, num_steps)
    found = to_host(metrics)
    bad = {key for key, value in found.items() if key.startswith("not_finite/") and value > 0}
    role = ALGORITHMS[name].trains[0]
    assert bad == {f"not_finite/{role}/grad_norm", *(f"not_finite/loss/{loss}" for loss in LOSSES[name])}


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(
    "name, field, quantity",
    [
        ("ppo", "advantages", "loss/policy"),
        ("ppo", "returns", "loss/value"),
        ("ppo", "old_logprobs", "loss/policy"),
        ("grpo", "ref_logprobs", "loss/kl"),
    ],
)
def test_one_bad_token_skips_its_minibatch_alone(name, sizes, field, quantity):
    """Both roles wait although one of them alone is bad; the other minibatch's step is made."""
    good = batch(name)
    row, column = 5, good.rows.prompt_lengths[5]
    assert good.completion_mask[row, column]
    bad = good._replace(**{field: getattr(good, field).at[row, column].set(jnp.nan)})
    before, after, metrics = run(name, bad, tiny.mesh(**sizes))
    assert (metrics["update/skipped"].total, metrics["update/skipped"].weight) == (1, 2)
    found = to_host(metrics)
    assert found[f"not_finite/{quantity}"] == 1
    other = {"loss/policy": "loss/value", "loss/value": "loss/policy", "loss/kl": "loss/policy"}[quantity]
    assert found[f"not_finite/{other}"] == 0
    for role in ALGORITHMS[name].trains:
        assert after.opt_state[role][1][0].count == 1
        assert tiny.relative_difference(after.params[role], before.params[role]) > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params[role]))


@pytest.mark.parametrize("name", ONLINE)
def test_the_minibatch_that_is_left_is_the_same_on_one_and_eight_devices(name):
    good = batch(name)
    bad = good._replace(advantages=good.advantages.at[5, good.rows.prompt_lengths[5]].set(jnp.inf))
    _, one, _ = run(name, bad, tiny.mesh())
    _, eight, _ = run(name, bad, tiny.mesh(data=8))
    for role in one.params:
        assert tiny.relative_difference(eight.params[role], one.params[role]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_old_state_s_buffers_are_donated_and_no_others(name):
    """Otherwise parameters and optimiser would lie in memory twice."""
    programs, mesh = programs_of(name, tiny.mesh()), tiny.mesh()
    trained, frozen = tiny.roles(name, mesh)
    state = programs.init_state(trained)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained))
    data = batch(name)
    new, _ = programs.update(state, frozen, data, jax.random.key(0))
    kept = {
        jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(state) if not leaf.is_deleted()
    }
    assert not {path for path in kept if path.startswith((".params", ".opt_state"))}
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, frozen, data)))
