"""MFU, MBU and tokens for each chip of steps whose operations are counted by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from rlhf_jax import compilations, config, online_config
from rlhf_jax.batch import Rows, UnpairedRows, token_counts
from rlhf_jax.bench.harness import make_stage
from rlhf_jax.chips import Peak
from rlhf_jax.offline_config import KTOConfig
from rlhf_jax.roofline import ModelOnChip
from rlhf_jax.sharding import make_mesh
from rlhf_jax.utilization import needed_works, step_lengths, utilization
from tests.unit.test_roofline import BLOCKS, HEAD, ONE, ROWS, TINY, planned, sft

PEAK = Peak(flops=1e9, bytes=1e6)
# Of an offline step: 8 sequences of 40 tokens on average, of 15 of which the log-probabilities are wanted.
TOKENS = {"perf/tokens": 320.0, "perf/prompt_tokens": 200.0, "perf/sequences": 8.0}
SECONDS = {"perf/step_seconds": 10.0, "perf/tokens_per_s": 32.0}
FORWARD = (
    2 * BLOCKS * 320 + 2 * 2 * 320 * 40 * 32
)  # and in each of two layers queries and scores, half masked
# Of an online one: 8 completions of 24 tokens on average, of prompts of 12.
SAMPLED = {"perf/tokens": 192.0, "perf/prompt_tokens": 96.0, "perf/sequences": 8.0}
PHASES = {"perf/rollout_seconds": 4.0, "perf/score_seconds": 1.0, "perf/update_seconds": 5.0}
TRUNK, OF_HEAD = 2 * BLOCKS * 288 + 2 * 2 * 288 * 36 * 32, 2 * HEAD * 192


@pytest.fixture
def peak(monkeypatch):
    monkeypatch.setattr("rlhf_jax.utilization.peak_of", lambda kind: PEAK)


def ppo(**options):
    settings = online_config.PPOConfig(batch_size=ROWS, num_epochs=4, num_minibatches=2, **options)
    return make_stage(
        "ppo",
        settings=settings,
        data=config.DataConfig(max_prompt_length=16),
        rollout=config.RolloutConfig(max_new_tokens=48),
    )


def used(stage, found, **axes):
    mesh = make_mesh(config.MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
    return utilization(planned(stage), mesh, mesh)(found)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_offline_step(peak, remat):
    """Three passes, padding aside; what remat computes again does not count."""
    found = used(sft(remat=remat), TOKENS | SECONDS, data=4)
    assert found.keys() == {"perf/tokens_per_s_per_chip", "perf/mfu"}
    assert found["perf/tokens_per_s_per_chip"] == 8
    assert found["perf/mfu"] == pytest.approx(3 * (FORWARD + 2 * HEAD * 120) / (10 * 4 * 1e9))


def test_an_online_step(peak):
    """Four models score, two learn in four epochs; sampling meets each token by itself."""
    found = used(ppo(), SAMPLED | SECONDS | PHASES, data=2)
    score, update = 4 * TRUNK + 2 * OF_HEAD, 4 * 3 * (2 * TRUNK + OF_HEAD)
    sampled = 2 * BLOCKS * 96 + 2 * 2 * 96 * 12 * 32 + 192 * (2 * (BLOCKS + HEAD) + 2 * 4 * (12 + 12) * 32)
    assert found["perf/score_mfu"] == pytest.approx(score / (1 * 2 * 1e9))
    assert found["perf/update_mfu"] == pytest.approx(update / (5 * 2 * 1e9))
    assert found["perf/mfu"] == pytest.approx((sampled + score + update) / (10 * 2 * 1e9))
    # Each of two devices reads all weights for each of 24 steps of its four rows.
    decoding = ModelOnChip(TINY, 1, 4, holds_scores=False).decode_step(4, 12, 12, 1).times(24)
    prefill = ModelOnChip(TINY, 1, 4, holds_scores=True).trunk(48, 12)
    assert found["perf/rollout_mbu"] == pytest.approx((decoding + prefill).bytes / (4 * 1e6))


def test_slots_are_taken_to_be_always_busy():
    """Three slots for eight completions decode as many tokens as eight slots do."""
    plain = ppo()
    few = dataclasses.replace(plain, rollout=dataclasses.replace(plain.rollout, slots=3))
    whole, of_few = (needed_works(planned(stage), ONE, SAMPLED)["rollout"] for stage in (plain, few))
    assert of_few.flops == pytest.approx(whole.flops)
    assert of_few.bytes > whole.bytes  # but read the weights more often


def test_several_rollouts_and_an_update_that_was_stopped(peak):
    """Of eight optimiser steps the third one's KL was too large: it was computed, and five were not."""
    once = needed_works(planned(ppo()), ONE, SAMPLED)
    stopped = needed_works(planned(ppo()), ONE, SAMPLED | {"update/stopped": 6 / 8, "rollout/rollouts": 2})
    assert stopped["update"].flops == pytest.approx(once["update"].flops * 3 / 8)
    assert stopped["rollout"].flops == pytest.approx(2 * once["rollout"].flops)
    assert stopped["score"].flops == pytest.approx(2 * once["score"].flops)


def test_nothing_is_told_of_a_peak_that_is_not_known():
    assert used(ppo(), SAMPLED | SECONDS | PHASES, data=2) == {"perf/tokens_per_s_per_chip": 16}


def test_phases_that_overlap_are_not_told(peak):
    mesh = make_mesh(config.MeshConfig(data=2), jax.devices()[:2])
    other = make_mesh(config.MeshConfig(data=2), jax.devices()[2:4])
    found = utilization(planned(ppo()), mesh, other)(SAMPLED | SECONDS | PHASES)
    assert found.keys() == {"perf/tokens_per_s_per_chip", "perf/mfu"}
    assert found["perf/tokens_per_s_per_chip"] == 8  # of all four


def test_a_chip_may_be_two_devices(peak):
    devices = np.array([SimpleNamespace(device_kind="TPU7x")])
    mesh = cast(Any, SimpleNamespace(size=4, devices=devices, shape=ONE | {"data": 4}))
    assert utilization(planned(sft()), mesh, mesh)(TOKENS | SECONDS)["perf/tokens_per_s_per_chip"] == 16


def test_tokens_of_packed_and_of_unpaired_rows():
    packed = Rows(np.zeros((2, 9)), np.array([[2, 1], [3, 0]]), np.array([[4, 3], [8, 0]]))  # type: ignore[arg-type]
    told = {"perf/tokens": 15, "perf/prompt_tokens": 6, "perf/sequences": 3}
    assert token_counts(packed) == told
    unpaired = UnpairedRows(packed, packed, np.ones((2, 2)))  # type: ignore[arg-type]
    assert token_counts(unpaired) == {name: 2 * count for name, count in told.items()}
    stage = make_stage("kto", settings=KTOConfig(batch_size=ROWS), data=config.DataConfig(max_length=64))
    lengths = step_lengths(planned(stage), {name: 2 * count for name, count in TOKENS.items()})
    assert (lengths.row, lengths.sequence, lengths.columns) == (40, 40, 15)


def test_seconds_of_compilations_count_once(monkeypatch):
    """What ends last holds what ended before, or overlaps it."""
    monkeypatch.setattr(compilations, "_spans", [])
    monkeypatch.setattr(compilations, "_seconds", 0.0)
    for begin, end in ((1, 2), (3, 4), (2.5, 5), (6, 7), (0, 8), (9, 10), (9.5, 11)):
        compilations._add(begin, end)
    assert compilations.seconds() == 8 + 2
