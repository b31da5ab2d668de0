"""What a report of a stage takes from the compiler and from the options."""

import pytest

from rlhf_jax.preflight import advice
from rlhf_jax.stage_report import needed_bytes


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
            18 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.", None),
        ("INTERNAL: Used 31.50G of 15.75G hbm", None),
    ],
)
def test_only_a_lack_of_hbm_is_one_of_the_slice(error, needed):
    """In libtpu's words; a kernel that lacks vector memory does so on every slice of the chip."""
    assert needed_bytes(error) == needed


@pytest.mark.parametrize(
    ("largest", "says", "does_not_say"),
    [
        ("update: temporaries", ["microbatch_size", "model.remat"], ["Lower batch_size"]),
        ("score: temporaries", ["Lower batch_size", "logprob_chunk"], ["microbatch_size", "remat"]),
        ("reward: temporaries", ["Lower batch_size"], ["logprob_chunk", "microbatch_size", "remat"]),
        ("greedy_rollout: arguments of its own", ["rollout.slots"], ["batch_size"]),
        ("frozen base", ["mesh.fsdp", "smaller model"], ["frozen_dtype", "frozen_memory"]),
        ("frozen reference", ["model.frozen_dtype", "model.frozen_memory"], ["optimizer"]),
        ("optimizer", ["optimizer.state_dtype"], ["batch_size"]),
    ],
)
def test_advice_names_options_that_the_part_depends_on(largest, says, does_not_say):
    """Only an update has microbatches and keeps activations; a base is in bfloat16 and stays there."""
    said = advice(largest)
    assert all(option in said for option in says) and not any(option in said for option in does_not_say)
