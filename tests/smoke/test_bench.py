"""The benchmarks run and print what docs and comparisons read; no time is asserted."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

KEYS = {
    "bench", "commit", "device", "mesh", "shape", "batch", "prompt", "new", "epochs", "minibatches", "dtype",
    "ms", "ms_min", "ms_max", "tokens_per_s", "useful_gflops", "ceiling_gflops", "share_of_ceiling",
    "warmup_s", "peak_rss_mib", "load_1m",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("generate", "float32"),
        ("ppo_update", "float32"),
        ("train_step", "float32"),
        ("train_step", "bfloat16"),
    ],
)
def test_one_json_line(name, dtype):
    sizes = {"shape": "tiny", "steps": 1, "batch": 4, "prompt": 8, "new": 8, "dtype": dtype}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", f"rlhf_jax.bench.{name}", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (text,) = done.stdout.splitlines()
    line = json.loads(text)
    more = {"memory_gb_s", "memory_ceiling_gb_s", "share_of_memory"}
    if name != "generate":
        more = {"sequences_per_row", "length_buckets", "tail"}
    assert line.keys() == KEYS | more
    assert line["bench"] == name
    assert {key: line[key] for key in sizes if key != "steps"} == {
        key: value for key, value in sizes.items() if key != "steps"
    }
    assert 0 < line["ms_min"] <= line["ms"] <= line["ms_max"]
    for key in ("tokens_per_s", "useful_gflops", "ceiling_gflops", "peak_rss_mib"):
        assert math.isfinite(line[key]) and line[key] >= 0, key


def test_loading_keeps_no_more_of_a_checkpoint_than_its_parameters():
    """A copy of the embedding or the LM head, of 32 MiB each, would be seen."""
    flags = ["--layers", "2", "--width", "512", "--shard_mib", "30"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.bench.load_checkpoint", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["files"] > 2 and line["files_mib"] == line["parameters_mib"]
    assert line["parameters_mib"] <= line["growth_mib"] < 1.3 * line["parameters_mib"]


def run_aot(*flags, topology="v5e:2x2"):
    """Returns the lines of the programs that are compiled for four chips of a TPU."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.bench.aot", "--topology", topology, *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_programs_compile_for_a_tpu_that_is_not_there():
    (line,) = run_aot("--shape", "tiny", "--length", "64", "--programs", "update", "--mesh.fsdp", "4")
    assert (line["stage"], line["program"], line["mesh"]) == ("sft", "update", {"fsdp": 4})
    assert 0 < line["alias_bytes"] < line["argument_bytes"]  # the state is donated, the batch is not
    assert line["temp_bytes"] > 0 and line["collectives"]["all-gather"] > 0


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_rollout_has_one_cache_and_gathers_nothing(topology):
    """Keys and values are written in place; no token waits for weights or logits of other chips."""
    stage = (
        "--shape 1b --layers 2 --algorithm ppo --rows 512 --length 512 --completion 384 --programs rollout"
    )
    sizes = "--rollout.slots 128 --rollout.refill_size 1 --mesh.data 2 --mesh.tensor 2 --model.dtype bfloat16"
    (line,) = run_aot(*stage.split(), *sizes.split(), topology=topology)
    slots, kv_heads, head_dim = 128 // 2, 8 // 2, 64
    cache = 2 * 2 * slots * kv_heads * 512 * head_dim * 2  # keys and values of two layers in bfloat16
    assert cache < line["alias_bytes"] < 1.1 * cache  # donated, and the rest that slots hold is little
    assert line["temp_bytes"] < 1.1 * cache
    assert (
        max(line["largest_collective_bytes"].values()) < 8 * 128 * 2048 * 2
    )  # a prefilled prompt at the most
    assert line["largest_collective_bytes"].get("all-gather", 0) < 1e4  # no weights, no logits


def test_stages_of_a_configuration_compile_for_a_tpu():
    flags = ("--config", "configs/quickstart.yaml", "--programs", "evaluate", "advantages")
    lines = run_aot(*flags, "--mesh.data", "4")
    assert [(line["stage"], line["program"]) for line in lines] == [
        ("sft", "evaluate"), ("reward", "evaluate"), ("ppo", "advantages"),
    ]  # fmt: skip


def test_memory_of_roles_that_share_a_base():
    """What the compiler is told to keep is what lives; adapters and their moments are a small part of it."""
    flags = (
        "--shape tiny --rank 2 --rows 8 --length 24 --completion 8 --sharing separate hydra --programs score"
    )
    mesh = "--mesh.data 1 --mesh.fsdp 8 --ppo.num_minibatches 1"
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.bench.memory", *flags.split(), *mesh.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    separate, hydra = (json.loads(line) for line in done.stdout.splitlines())
    assert (separate["sharing"], hydra["sharing"], separate["share"]) == ("separate", "hydra", 1)
    for line in (separate, hydra):
        assert line["live_init"] == line["state"] + line["frozen"]
        assert line["live_init"] == line["live_update"]  # nothing is kept of an iteration
        assert line["peak"] == line["live_init"] + line["score"]
    stays = [line["state"] + line["frozen"] for line in (separate, hydra)]
    assert stays[1] < 0.4 * stays[0]  # at this width adapters are a large part: 0.31


def test_long_tailed_completions_have_the_same_lengths_however_rows_are_laid_out():
    sizes = {"shape": "tiny", "steps": 1, "batch": 4, "prompt": 8, "new": 8, "minibatches": 1}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    lines = []
    for layout in ([], ["--sequences_per_row", "2", "--length_buckets", "2"]):
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_jax.bench.train_step", *flags, "--tail", *layout],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.append(json.loads(done.stdout))
    assert lines[0]["mean_new"] == lines[1]["mean_new"] < 8
