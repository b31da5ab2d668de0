"""What the benchmarks print: one JSON line of a step's time, its floor, and other libraries' steps beside it.

Every benchmark warms up, blocks until the device is ready, and prints the median and the share of the
ceiling, the matrix rate measured in the same process.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.bench.floor import ADAM_BYTES, matrix_rate, memory_rate, seconds_of, step_products
from rlhf_jax.bench.harness import CACHED, GROUPS, PASSES, ROLLOUTS, Bench
from rlhf_jax.bench.peers import in_turn, start_peers


def report(bench: Bench, task: str, step: Callable[[int], Any], tokens: int = 0) -> None:
    """Times step(i), in turn with the peers' where there are some, and prints the JSON line.

    Args:
        bench: whose step it is.
        task: name of the benchmark.
        step: returns what has to be ready.
        tokens: the useful ones of a step; 0: those of the completions.
    """
    args = bench.args

    def ours(i: int) -> None:
        bench.begin()
        jax.block_until_ready(step(i))

    ways: dict[str, Callable[[int], Any]] = {"ours": ours}
    against = getattr(args, "against", [])
    if against and args.dtype != "float32":
        raise SystemExit(
            f"--dtype {args.dtype}: the others compute in float32; leave out --against or --dtype"
        )
    peers = start_peers(against, "peer_train.py", job(bench, task), bench.architecture)
    for name, peer in peers.items():
        ways[name] = lambda _, peer=peer: peer()
    seconds, first = in_turn(ways, args.warmup, args.steps)
    used = resources()  # before more is measured
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    median = medians["ours"]
    ceiling = matrix_rate(args.dtype)
    tokens = tokens or round(args.batch * bench.mean_new)
    rate = useful_flops(bench, task) / median / 1e9
    line = {
        **header(bench, task),
        **options(args, PASSES, GROUPS, ROLLOUTS, CACHED),
        **({"mean_new": round(bench.mean_new, 1)} if bench.made else {}),
        "ms": round(1000 * median, 1),
        "ms_min": round(1000 * min(seconds["ours"]), 1),
        "ms_max": round(1000 * max(seconds["ours"]), 1),
        "tokens_per_s": round(tokens / median, 1),
        "useful_gflops": round(rate, 1),
        "ceiling_gflops": round(ceiling, 1),
        "share_of_ceiling": round(rate / ceiling, 3),
        **(of_memory(bench, median) if task == "generate" else floor(bench, task, median)),
    }
    if bench.laps:
        laps = {phase: statistics.median(of[args.warmup :]) for phase, of in bench.laps.items()}
        line["phases_s"] = {phase: round(of, 3) for phase, of in laps.items()}
    for name, peer in peers.items():
        line[f"{name}_ms"] = round(1000 * medians[name], 1)
        line[f"against_{name}"] = round(medians[name] / median, 2)
        line[f"{name}_peak_rss_mib"] = peer.peak_rss_mib()
    if peers:
        line["first_s"] = {name: round(of, 1) for name, of in first.items()}
    print(json.dumps(line | {"warmup_s": round(first["ours"], 1)} | used), flush=True)


def header(bench: Bench, task: str) -> dict[str, Any]:
    """Returns what a benchmark's line says of what is measured."""
    args = bench.args
    return {
        "bench": task,
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "mesh": dict(bench.mesh.shape),
        "shape": args.shape,
        "batch": args.batch,
        "prompt": args.prompt,
        "new": args.new,
        "dtype": args.dtype,
    }


def options(args: Namespace, *kinds: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of some kinds, of those that a benchmark has."""
    there = vars(args)
    return {name: there[name] for kind in kinds if kind.keys() <= there.keys() for name in kind}


def job(bench: Bench, task: str) -> dict[str, Any]:
    """Returns what a peer has to know in order to make the same steps."""
    args = bench.args
    count = args.warmup + args.steps
    lengths = [bench.lengths_of(i).tolist() for i in range(count)] if getattr(args, "tail", False) else []
    sizes = {"batch": args.batch, "prompt": args.prompt, "new": args.new, "steps": count, "lengths": lengths}
    return {"task": task} | sizes | options(args, PASSES, GROUPS, CACHED)


def useful_flops(bench: Bench, task: str) -> float:
    """Returns operations of one step by 2ND forward, 6ND forward and backward; no credit for waste.

    The embedding counts as the head's product, where a completion's token is predicted; not at all in models
    with a score head. A group's prompt is computed once, and with one update on a rollout the probabilities
    before it are the update's own.
    """
    n, body = bench.num_parameters()
    args = bench.args
    tokens, predicted = args.batch * (args.prompt + bench.mean_new), args.batch * bench.mean_new
    policy, scorer = body * tokens + (n - body) * predicted, body * tokens
    generate = 2 * n * predicted + 2 * body * args.batch // bench.group_size * args.prompt
    score = 4 * policy + 4 * scorer
    update = getattr(args, "epochs", 1) * 6 * (policy + scorer)
    reference = 0 if getattr(args, "cached_reference", False) else 2 * policy
    return {
        "generate": generate,
        "score": score,
        "ppo_update": update,
        "train_step": generate + score + update,
        "grpo_step": generate + reference + 6 * policy,
        "sft_step": 6 * policy,
        "reward_step": 2 * 6 * scorer,
        "dpo_step": 2 * (reference + 6 * policy),
    }[task]


def floor(bench: Bench, task: str, seconds: float) -> dict[str, Any]:
    """Returns the seconds that a step takes at least, by phase and in all, and their share of its own."""
    args = bench.args
    products = step_products(task, bench.architecture, args, bench.mean_new)
    floors = {phase: seconds_of(of_phase, args.dtype) for phase, of_phase in products.items()}
    if "update" in floors:
        steps = getattr(args, "epochs", 1) * getattr(args, "minibatches", 1)
        floors["optimizer"] = steps * ADAM_BYTES * bench.num_trained() / memory_rate() / 1e9
    total = sum(floors.values())
    return {
        "floor_s": {phase: round(of_phase, 3) for phase, of_phase in floors.items()},
        "floor_ms": round(1000 * total, 1),
        "share_of_floor": round(total / seconds, 3),
    }


def of_memory(bench: Bench, seconds: float) -> dict[str, float]:
    """Returns what decoding has to read of memory, beside what the memory can: GB/s, and the share.

    For each token all weights, once for all rows, and each row's keys and values so far.
    """
    args, architecture = bench.args, bench.architecture
    size = jnp.dtype(args.dtype).itemsize
    per_token = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim * size
    cached = args.batch * (args.prompt + args.new / 2) * per_token
    read = args.new * (bench.num_parameters()[0] * size + cached) / seconds / 1e9
    ceiling = memory_rate()
    return {
        "memory_gb_s": round(read, 1),
        "memory_ceiling_gb_s": round(ceiling, 1),
        "share_of_memory": round(read / ceiling, 3),
    }


def resources() -> dict[str, float]:
    """Returns the process's peak memory so far, and how busy the machine was."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_rss_mib": round(peak), "load_1m": round(os.getloadavg()[0], 2)}


def commit() -> str:
    """Returns the commit that is measured."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
