"""Slices of TPUs by their names."""

import pytest

from rlhf_jax.chips import CHIPS, GIB, read_topology


@pytest.mark.parametrize(
    ("topology", "accelerator_type", "chips", "hosts"),
    [
        ("v5p:2x2x4", "v5p-32", 16, 4),  # of cores
        ("v5e:4x4", "v5litepod-16", 16, 4),  # of chips
        ("v6e:2x4", "v6e-8", 8, 1),
        ("v5e:2x4", "v5litepod-8", 8, 1),
        ("v5p:2x2x2", "v5p-16", 8, 2),
        ("v4:2x2x1", "v4-8", 4, 1),
        ("v5e:1x1", "v5litepod-1", 1, 1),
    ],
)
def test_a_slice_by_both_of_its_names(topology, accelerator_type, chips, hosts):
    slices = read_topology(topology)
    assert (slices.topology, slices.accelerator_type) == (topology, accelerator_type)
    assert (slices.chips, slices.hosts) == (chips, hosts)
    assert f": {chips} chip{'s' if chips > 1 else ''} on " in slices.text and accelerator_type in slices.text


def test_several_slices_count_together():
    slices = read_topology("v5e:16x16", 2)
    assert (slices.chips, slices.hosts) == (512, 128)
    assert slices.text.startswith("2 slices of v5e:16x16 = v5litepod-256: 512 chips on 128 hosts, 8,192 GiB")


@pytest.mark.parametrize(
    ("topology", "number", "message"),
    [
        ("v5p-32", 1, "topologies of v5p read v5p:4x4x4"),
        ("v5litepod-16", 1, "topologies of v5e read v5e:4x4"),
        ("v5x:4x4", 1, "is no TPU chip"),
        ("v5e:4x4x4", 1, "has 2 dimensions: write it as v5e:4x4"),
        ("v5p:4x4", 1, "has 3 dimensions"),
        ("v5e:4x0", 1, "has 2 dimensions"),
        ("v5e:4x4", 0, "--slices 0: must be at least 1"),
    ],
)
def test_what_is_no_slice_is_refused(topology, number, message):
    with pytest.raises(ValueError, match=message):
        read_topology(topology, number)


def test_no_chip_lets_programs_have_more_than_it_has():
    for chip in CHIPS.values():
        assert 0.9 * chip.hbm < chip.usable_hbm < chip.hbm and chip.hbm % GIB == 0
