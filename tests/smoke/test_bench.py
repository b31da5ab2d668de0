"""The benchmarks run and print what docs and comparisons read; no time is asserted."""

import importlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest

from rlhf_jax.bench import harness
from rlhf_jax.bench.floor import step_products
from rlhf_jax.bench.harness import make_architecture
from rlhf_jax.bench.peers import in_turn, start_peers
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

KEYS = {
    "bench", "commit", "device", "mesh", "shape", "batch", "prompt", "new", "dtype",
    "ms", "ms_min", "ms_max", "tokens_per_s", "useful_gflops", "ceiling_gflops", "share_of_ceiling",
    "warmup_s", "peak_rss_mib", "load_1m",
}  # fmt: skip
PASSES = {"epochs", "minibatches"}
GROUPS = {"group_size", "refill_unit"}
ROLLOUTS = {"sequences_per_row", "length_buckets", "slots", "refill", "tail"}
FLOOR = {"floor_s", "floor_ms", "share_of_floor"}


@pytest.fixture
def run_here(monkeypatch, capsys, one_device_mesh):
    """Runs a benchmark in this process, on one of its devices, and returns its line."""
    monkeypatch.setattr(harness, "make_mesh", lambda _: one_device_mesh)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *flags])
        importlib.import_module(f"rlhf_jax.bench.{name}").main()
        (text,) = capsys.readouterr().out.splitlines()
        return json.loads(text)

    return run


@pytest.mark.parametrize(
    "name, dtype, more",
    [
        ("generate", "float32", {"memory_gb_s", "memory_ceiling_gb_s", "share_of_memory"}),
        ("ppo_update", "float32", PASSES | ROLLOUTS | FLOOR),
        ("train_step", "float32", PASSES | ROLLOUTS | FLOOR | {"phases_s"}),
        ("train_step", "bfloat16", PASSES | ROLLOUTS | FLOOR | {"phases_s"}),
        ("grpo_step", "float32", GROUPS | ROLLOUTS | FLOOR | {"phases_s"}),
        ("score", "float32", ROLLOUTS | FLOOR),
        ("sft_step", "float32", FLOOR),
        ("reward_step", "float32", FLOOR),
        ("dpo_step", "float32", FLOOR | {"cached_reference"}),
    ],
)
def test_one_json_line(name, dtype, more, run_here):
    sizes = {"shape": "tiny", "steps": 1, "batch": 4, "prompt": 8, "new": 8, "dtype": dtype}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    line = run_here(name, *flags)
    assert line.keys() == KEYS | more
    assert line["bench"] == name
    assert {key: line[key] for key in sizes if key != "steps"} == {
        key: value for key, value in sizes.items() if key != "steps"
    }
    assert 0 < line["ms_min"] <= line["ms"] <= line["ms_max"]
    for key in ("tokens_per_s", "useful_gflops", "ceiling_gflops", "peak_rss_mib"):
        assert math.isfinite(line[key]) and line[key] >= 0, key
    if "floor_ms" in more:
        assert line["floor_ms"] > 0
    if "phases_s" in more:
        assert line["phases_s"].keys() == {"rollout", "scores", "advantages", "update"}
        assert line["floor_s"].keys() == {"rollout", "scores", "update", "optimizer"}


BODY, HEAD = 4 * 32 * 32 + 3 * 32 * 64, 32 * 512
"""Parameters of one layer's 7 matrices, without grouped heads, and of the LM head."""


def counted_operations(task, **more):
    """Returns the operations of each phase of a step of one layer."""
    architecture = replace(make_architecture("tiny", 16), num_layers=1, num_kv_heads=4)
    args = Namespace(prompt=3, new=5, **more)
    phases = step_products(task, architecture, args, 5).items()
    return {
        name: sum(2 * p.b * p.m * p.k * p.n * count for p, count in products.items())
        for name, products in phases
    }


def attended(rows, length):
    """Returns the operations of attention's two products forward, of one layer 32 wide."""
    return 2 * 2 * rows * length**2 * 32


def test_the_floor_counts_the_products_of_a_step():
    """Two rows of 3 + 5 tokens; of each product there are two more backward."""
    update = 6 * (BODY * 2 * (3 + 5) + HEAD * 2 * 5) + 3 * attended(2, 3 + 5)
    assert counted_operations("sft_step", batch=2) == {"update": update}


@pytest.mark.parametrize("cached", [False, True])
def test_the_floor_of_dpo_has_the_reference_where_it_is_not_cached(cached):
    """Two pairs: four rows."""
    forward = 2 * (BODY * 4 * (3 + 5) + HEAD * 4 * 5) + attended(4, 3 + 5)
    found = counted_operations("dpo_step", batch=2, cached_reference=cached)
    assert found == ({} if cached else {"reference": forward}) | {"update": 3 * forward}


def test_the_floor_of_grpo_has_a_prompt_once_for_its_group_and_the_policy_once():
    """Two prompts of two completions each, on all or on two slots."""
    forward = 2 * (BODY * 4 * (3 + 5) + HEAD * 4 * 5) + attended(4, 3 + 5)
    rollout = 2 * (BODY * (2 * 3 + 4 * 5) + HEAD * 4 * 5) + attended(2, 3)
    for slots in (0, 2):
        found = counted_operations("grpo_step", batch=4, group_size=2, slots=slots)
        assert found == {"rollout": rollout, "scores": forward, "update": 3 * forward}


PEER = """
import json, sys
job = json.loads(sys.stdin.readline())
print("noise; peer: not at the start", flush=True)
print("peer: ready", flush=True)
for turn, _ in enumerate(sys.stdin):
    if turn == job["ends"]:
        break
    print("peer: done", flush=True)
"""


def test_peers_make_steps_in_turn_with_ours_and_an_early_end_is_told(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    architecture = make_architecture("tiny", 16)
    peers = start_peers([f"other={sys.executable}"], str(script), {"ends": 3}, architecture)
    order = []
    ways = {"ours": lambda i: order.append(i), "other": lambda _: order.append(peers["other"]())}
    seconds, first = in_turn(ways, warmup=1, steps=2)
    assert order == [0, None, 1, None, 2, None]
    assert {name: len(of) for name, of in seconds.items()} == {"ours": 2, "other": 2}
    assert first.keys() == ways.keys()
    assert 0 < peers["other"].peak_rss_mib() < 200  # and not what this process needs
    with pytest.raises(SystemExit, match="other ended"):
        peers["other"]()


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
    queue = 512 * 128 * 4  # prompts that are dealt to the chips, once in a call
    assert line["largest_collective_bytes"].get("all-gather", 0) <= queue  # no weights, no logits


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


def test_long_tailed_completions_have_the_same_lengths_however_rows_are_laid_out(run_here):
    sizes = {"shape": "tiny", "steps": 1, "batch": 4, "prompt": 8, "new": 8, "minibatches": 1}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    layouts = [], ["--slots", "2", "--sequences_per_row", "2", "--length_buckets", "2"]
    as_rows, packed = (run_here("train_step", *flags, "--tail", *layout) for layout in layouts)
    assert as_rows["mean_new"] == packed["mean_new"] < 8


def test_completions_of_groups_have_the_same_lengths_by_either_unit_of_refilling(run_here):
    sizes = {"shape": "tiny", "steps": 1, "batch": 4, "group_size": 2, "prompt": 8, "new": 8, "slots": 2}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    units = "group", "completion"
    groups, alone = (run_here("grpo_step", *flags, "--tail", "--refill_unit", unit) for unit in units)
    assert groups["mean_new"] == alone["mean_new"] < 8


def test_a_dpo_step_with_a_cached_reference(run_here):
    sizes = {"shape": "tiny", "steps": 1, "batch": 2, "prompt": 8, "new": 8}
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    line = run_here("dpo_step", *flags, "--cached_reference")
    assert line["cached_reference"] and line["floor_s"].keys() == {"update", "optimizer"}


CHAIN = """
stages:
  - {name: first, algorithm: sft}
  - {name: judge, algorithm: reward_model, from: first}
model: {hidden_size: 16, num_heads: 2, num_kv_heads: 2, mlp_size: 32, context_length: 80}
tokenizer: {vocab_size: 384}
data: {train: synthetic, max_prompt_length: 32, max_length: 80, max_eval_records: 16}
rewards: {gold: "rlhf_jax.data.synthetic:gold_reward"}
rollout: {max_new_tokens: 48}
sft: {num_steps: 4, batch_size: 16}
reward_model: {num_steps: 4, batch_size: 8}
"""
SETTINGS = """
online: {optimizer: {learning_rate: 1.0e-3}}
offline: {optimizer: {learning_rate: 1.0e-3}}
algorithms:
  rloo: {rloo: {batch_size: 4}}
  ipo: {ipo: {beta: WRONG}}
"""


def test_the_table_of_algorithms_goes_on_where_it_was_stopped(tmp_path):
    """A run that fails is told of and tried again; the others are not."""
    chain, settings, results = (
        tmp_path / "chain.yaml",
        tmp_path / "settings.yaml",
        tmp_path / "out" / "results",
    )
    chain.write_text(CHAIN)
    settings.write_text(SETTINGS.replace("WRONG", "-1"))
    command = [
        sys.executable, "-m", "rlhf_jax.bench.algorithms", "--config", chain, "--settings", settings,
        "--dir", tmp_path / "out", "--seeds", "0", "--completions", "64",
    ]  # fmt: skip

    def run(*names):
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 600, "check": False}
        return subprocess.run([*command, "--algorithms", *names], **options)

    done = run("ipo", "rloo")
    assert done.returncode == 1
    assert "ipo, seed 0 failed: " in done.stderr and "beta" in done.stderr, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == ["`sft`", "`rloo`"]
    kept = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    sft, rloo = (json.loads((results / f"{name}-0.json").read_text()) for name in ("sft", "rloo"))
    assert (sft["kl"], sft["seconds"]) == (0, None)
    assert rloo["kl"] > 0 and rloo["seconds"] > 0 and len(rloo["gold"]) == len(sft["gold"]) == 192

    settings.write_text(SETTINGS.replace("WRONG", "1"))
    done = run("ipo", "rloo")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert {name: (results / name).stat().st_mtime_ns for name in kept} == kept
