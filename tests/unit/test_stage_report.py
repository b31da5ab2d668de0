"""What a report of a stage takes from the compiler and from the options."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import stage_report
from rlhf_jax.chips import described_devices, read_topology
from rlhf_jax.command_line import read_config
from rlhf_jax.preflight import advice
from rlhf_jax.reward_origin import External
from rlhf_jax.rewards.external import RewardReader
from rlhf_jax.shape_plan import shape_plans
from rlhf_jax.stage_report import needed_bytes
from tests import tiny
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.50G of 15.75G hbm.",
            31.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(18.00G) exceeds available HBM (15.75G).",
            15 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.", None),
        ("INTERNAL: Used 31.50G of 15.75G hbm", None),
    ],
)
def test_only_a_lack_of_hbm_is_one_of_the_slice(error, needed):
    """In libtpu's words; a kernel that lacks vector memory does so on every slice of the chip."""
    assert needed_bytes(error, 3 * 2**30) == needed


def test_arguments_are_none_of_what_a_program_lacks():
    """Two arguments of 10 GiB on a chip of 16, and a sum of their products that needs next to nothing."""
    pytest.importorskip("libtpu")
    (device,) = described_devices(read_topology("v5e:1x1"))
    of = jax.ShapeDtypeStruct((10 * 2**28,), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    lowered = jax.jit(lambda x, y: jnp.sum(x * y)).lower(of, of)
    with pytest.raises(jax.errors.JaxRuntimeError) as failed:
        lowered.compile()
    needed = needed_bytes(str(failed.value), 20 * 2**30)
    assert needed is not None and needed < 2**27


@pytest.mark.parametrize(
    ("largest", "says", "does_not_say"),
    [
        ("update: temporaries", ["microbatch_size", "model.remat"], ["Lower batch_size"]),
        ("score: temporaries", ["Lower batch_size", "logprob_chunk"], ["microbatch_size", "remat"]),
        ("reward: temporaries", ["Lower batch_size"], ["logprob_chunk", "microbatch_size", "remat"]),
        ("greedy_rollout: arguments of its own", ["rollout.slots"], ["batch_size"]),
        ("frozen base", ["mesh.fsdp", "smaller model"], ["frozen_dtype", "frozen_memory"]),
        ("frozen reference", ["model.frozen_dtype", "model.frozen_memory"], ["optimizer"]),
        ("frozen teacher", ["model.frozen_dtype", "mesh.fsdp"], ["frozen_memory"]),
        ("optimizer", ["optimizer.state_dtype"], ["batch_size"]),
    ],
)
def test_advice_names_options_that_the_part_depends_on(largest, says, does_not_say):
    """Only an update has microbatches and keeps activations; a base and a teacher stay there."""
    said = advice(largest)
    assert all(option in said for option in says) and not any(option in said for option in does_not_say)


def test_a_reward_model_of_another_kind_is_compiled_for_the_rows_that_it_is_given():
    """Prompts of 40 tokens and completions of 30 lie in rows of 128."""
    path = ROOT / "configs" / "smoke" / "ppo.yaml"
    flags = ("--data.max_prompt_length", "40", "--rollout.max_new_tokens", "30", "--run.dir", "unused")
    plans = shape_plans(read_config(["--config", str(path), *flags], runs=False))
    plan = next(plan for plan in plans if plan.stage.algorithm == "ppo")
    other = dataclasses.replace(plan.architecture, context_length=256)
    external = External(Path("judge"), other, RewardReader(None, False, None, None, other.context_length))
    found = stage_report._external(plan._replace(external=external), tiny.mesh())
    assert found is not None
    (rows,) = found[0].own
    assert rows.tokens.shape == (plan.stage.settings.batch_size, 128)
