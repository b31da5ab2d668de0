"""Activations in bfloat16: whatever is kept, compared or summed is float32 all the same (NUMERICS 11, 31)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.metrics import to_host
from rlhf_jax.models.transformer import make_model
from rlhf_jax.programs import TokenIds, build_programs
from tests import tiny
from tests.contract.test_algorithms import batch_of
from tests.contract.test_state import NAMES, ONLINE


@functools.cache
def programs_of(name, dtype):
    stage = tiny.stage(name, model={"dtype": dtype})
    model = make_model(tiny.ARCHITECTURE, dtype)
    ids = TokenIds(tiny.EOS, tiny.PAD)
    return build_programs(stage, ALGORITHMS[name], model, tiny.mesh(), 8, ids)


def float_types(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.parametrize("name", NAMES)
def test_state_losses_and_metrics_stay_float32(name):
    programs = programs_of(name, "bfloat16")
    trained, frozen = tiny.roles(name, tiny.mesh())
    batch = batch_of(name, tiny.rows(8 * ALGORITHMS[name].rows_per_record))
    state, metrics = programs.update(programs.init_state(trained), frozen, batch, jax.random.key(0))
    assert float_types(state.params) == float_types(state.opt_state) == {jnp.dtype("float32")}
    assert float_types(metrics) == {jnp.dtype("float32")}
    losses = [metric for metric in metrics if metric.startswith("loss/")]
    assert losses and all(np.isfinite(metrics[loss].value) for loss in losses)
    assert metrics["update/skipped"].value == 0


@pytest.mark.parametrize("name", ONLINE)
def test_what_a_rollout_is_judged_by_is_float32(name):
    programs = programs_of(name, "bfloat16")
    trained, frozen = tiny.roles(name, tiny.mesh())
    state = programs.init_state(trained)
    rollout = programs.rollout(state.params, frozen, tiny.prompts(), jax.random.key(1))
    scored, rollout_metrics = programs.score(state.params, frozen, rollout)
    batch, prepared = programs.advantages(scored, state.aux)
    for tree in (rollout, scored, batch, rollout_metrics, prepared):
        assert float_types(tree) == {jnp.dtype("float32")}
    exact, _ = programs_of(name, "float32").score(state.params, frozen, rollout)
    gap = np.abs(np.asarray(exact.old_logprobs - scored.old_logprobs)).max()
    assert 1e-4 < gap < 0.5  # the activations are bfloat16, and no more than these
    for found in (scored.scores, scored.old_logprobs, batch.advantages):
        rounded = found.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.any(np.asarray(rounded != found))  # nothing was rounded on the way

    _, metrics = programs.update(state, frozen, batch, jax.random.key(2))
    found = to_host(metrics)
    assert 0 <= found["policy/ratio_gap_first"] < 0.5
    assert np.isfinite(found["policy/ratio_gap"])


@functools.cache
def learned(param_dtype, *, rounding=True):
    """Returns how far the loss of one batch falls in forty small steps, and the state."""
    stored = {"state_dtype": param_dtype, "stochastic_rounding": rounding}
    stage = tiny.stage(
        "sft",
        model={"param_dtype": param_dtype, "dtype": param_dtype},
        optimizer={"learning_rate": 1e-5, **stored},
        settings={"microbatch_size": 4},
    )
    model = make_model(tiny.ARCHITECTURE, param_dtype)
    programs = build_programs(stage, ALGORITHMS["sft"], model, tiny.mesh(), 8, TokenIds(tiny.EOS, tiny.PAD))
    state = programs.init_state({"policy": tiny.weights("policy", tiny.mesh())})
    losses = []
    for step in range(40):
        state, metrics = programs.update(state, {}, tiny.rows(), jax.random.key(step))
        losses.append(to_host(metrics)["loss/nll"])
    return losses[0] - losses[-1], state


@pytest.mark.slow
def test_bfloat16_everything_learns_like_float32_where_rounding_is_stochastic():
    """To the nearest number nearly all steps are lost: they are 1e-5, and half of bfloat16's own is 6e-5."""
    exact, _ = learned("float32")
    assert exact > 0.1
    found, state = learned("bfloat16")
    lost, _ = learned("bfloat16", rounding=False)
    assert float_types(state.params) == float_types(state.opt_state) == {jnp.dtype("bfloat16")}
    assert found == pytest.approx(exact, rel=0.1)
    assert lost < 0.2 * exact
