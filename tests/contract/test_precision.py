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
from tests.contract.test_algorithms import ONLINE, batch_of

NAMES = sorted(ALGORITHMS)


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
