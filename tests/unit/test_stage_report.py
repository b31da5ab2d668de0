"""What a report of a stage takes from the compiler and from the options."""

import pytest

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
