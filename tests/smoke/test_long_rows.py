"""An update on rows of 32k tokens, compiled for eight chips of a TPU that is not there."""

import dataclasses
from functools import cache

import pytest

from rlhf_jax import config, offline_config
from rlhf_jax.bench.aot import figures, lower_shape
from rlhf_jax.bench.harness import make_stage
from rlhf_jax.chips import described_devices, read_topology
from rlhf_jax.sharding import make_mesh
from tests import tiny

pytestmark = pytest.mark.slow

ROWS, LENGTH, WIDTH, HEADS, LAYERS, DEVICES = 2, 32768, 256, 8, 8, 8
ARCHITECTURE = dataclasses.replace(
    tiny.ARCHITECTURE,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=2,
    head_dim=WIDTH // HEADS,
    mlp_size=512,
    context_length=LENGTH,
)


@cache
def update(remat):
    """Returns what the compiler says of the update."""
    pytest.importorskip("libtpu")
    stage = make_stage(
        "sft",
        settings=offline_config.SFTConfig(batch_size=ROWS),
        model=config.ModelConfig(dtype="bfloat16", remat=remat, logprob_chunk=8192),
        mesh=config.MeshConfig(data=1, fsdp=2, sequence=4),
    )
    mesh = make_mesh(stage.mesh, described_devices(read_topology("v5e:2x4")))
    return figures(lower_shape(stage, ARCHITECTURE, LENGTH, mesh)["update"])


def test_no_chip_holds_the_scores_of_all_pairs_of_tokens():
    found = update("full")
    assert {name for name in found["kernels"] if name.startswith("splash")} == {
        "splash_mha_fwd_residuals",
        "splash_mha_dq_no_residuals",
        "splash_mha_dkv_no_residuals",
    }
    # Forward, again in the backward pass, and backward: of q, k, v and the result.
    assert found["collectives"]["all-to-all"] >= 3 * 4
    scores = 2 * ROWS * HEADS * LENGTH**2 // DEVICES  # of one layer, in bfloat16
    assert found["temp_bytes"] < scores / 4


def test_offloading_keeps_the_residual_stream_in_the_hosts_memory():
    """Of each layer what goes into it, in bfloat16."""
    kept = LAYERS * 2 * ROWS * LENGTH * WIDTH // DEVICES
    full, offload = update("full"), update("offload")
    assert offload["host_temp_bytes"] >= kept
    assert offload["temp_bytes"] < full["temp_bytes"] - kept / 2
