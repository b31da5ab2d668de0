"""Times the rollout. `python -m rlhf_jax.bench.generate --shape 15m`.

With --queue N, N prompts on --batch slots: their completions' lengths are geometric, with a mean of 0.35 of
--new, and fixed beforehand, so that all ways make the same tokens. It times, in turn, batches of --batch
prompts one after the other, each until its longest completion has ended, and slots that are refilled; tokens
per second count useful tokens alone. With --fixed all completions have --new tokens. With --against
transformers=PYTHON tunix=PYTHON, the interpreters that have them, these libraries complete the same queue in
the same batches, in turn with the others (peer_generate.py).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.bench.harness import NEVER, Bench, arguments, resources, tailed_lengths
from rlhf_jax.models.kv_cache import DecodeWeights, unstack
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.rollout.slots import Completions, Engine, Queue
from rlhf_jax.sharding import place_rows, traced_on


def main() -> None:
    """Prefill and decode of prompts, sampled at temperature 1."""
    more = {
        "queue": {"type": int, "default": 0, "help": "prompts of completions of different lengths"},
        "refill": {
            "type": int,
            "default": 0,
            "help": "prompts prefilled at once; 0: for a quarter of the slots",
        },
        "fixed": {"action": "store_true", "help": "all completions of the queue have --new tokens"},
        "against": {
            "nargs": "*",
            "default": [],
            "metavar": "PEER=PYTHON",
            "help": "transformers=..., tunix=...",
        },
    }
    bench = Bench(arguments(__doc__ or "", **more))
    params = {"policy": bench.weights("policy", 0)}
    if bench.args.queue:
        long_tailed(bench, params["policy"])
        return
    prompts = place_rows(bench.mesh, bench.prompts())
    bench.report(
        "generate",
        lambda i: bench.programs.rollout(params, {}, prompts, jax.random.key(i)),
        tokens=bench.args.batch * bench.args.new,
    )


def long_tailed(bench: Bench, policy: dict) -> None:
    """Prints a line that compares batches with refilled slots."""
    args, mesh = bench.args, bench.mesh
    limits = np.full(args.queue, args.new) if args.fixed else tailed_lengths(args.queue, args.new)
    queue = Queue(bench.prompts(num_prompts=args.queue), jnp.asarray(limits))
    sampling = Sampling(1.0, jnp.asarray([-1]))
    cast = jax.jit(traced_on(mesh, lambda params: unstack(params, bench.architecture, args.dtype)))

    def completing(engine: Engine) -> Callable[[DecodeWeights, Queue, Array], Completions]:
        def complete(weights: DecodeWeights, queue: Queue, key: Array) -> Completions:
            return engine.run(weights, queue, sampling, key, engine.start(weights, queue.prompts)).done

        return jax.jit(traced_on(mesh, complete))

    static = completing(Engine(args.new, NEVER.pad))
    refilled = completing(Engine(args.new, NEVER.pad, args.batch, args.refill))
    key = jax.random.key(0)

    def in_batches() -> list[Completions]:
        weights = cast(policy)
        parts = [slice(i, i + args.batch) for i in range(0, args.queue, args.batch)]
        batches = [jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], queue) for rows in parts]
        return [static(weights, place_rows(mesh, batch), key) for batch in batches]

    def in_slots() -> list[Completions]:
        return [refilled(cast(policy), place_rows(mesh, queue), key)]

    ways: dict[str, Callable[[], Any]] = {"batches": in_batches, "slots": in_slots}
    for peer in args.against:
        name, python = peer.split("=", 1)
        ways[name] = start_peer(name, python, bench, queue)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found, first_s = {}, {}
    for step in range(args.warmup + args.steps):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = jax.block_until_ready(way())
            elapsed = time.perf_counter() - start
            first_s.setdefault(name, round(elapsed, 1))
            if step >= args.warmup:
                seconds[name].append(elapsed)
    tokens = {name: np.concatenate([done.tokens for done in found[name]]) for name in ("batches", "slots")}
    useful = int(limits.sum())
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    line = {
        **bench.header("generate"),
        "queue": args.queue,
        "mean_new": round(useful / args.queue, 1),
        "rows_alike": float(np.mean((tokens["batches"] == tokens["slots"]).all(axis=1))),
        "first_s": first_s,
    }
    line |= {f"{name}_s": round(median, 3) for name, median in medians.items()}
    line |= {f"{name}_tokens_per_s": round(useful / median, 1) for name, median in medians.items()}
    others = {name: median for name, median in medians.items() if name != "slots"}
    line |= {f"slots_against_{name}": round(other / medians["slots"], 2) for name, other in others.items()}
    print(json.dumps(line | resources()), flush=True)


def start_peer(name: str, python: str, bench: Bench, queue: Queue) -> Callable[[], None]:
    """Returns what makes another library complete the queue; it runs in a process that waits in between."""
    architecture, args = bench.architecture, bench.args
    sizes = ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads")
    job = {size: getattr(architecture, size) for size in sizes} | {
        "prompt": args.prompt,
        "new": args.new,
        "batch": args.batch,
        "threads": os.cpu_count(),
        "prompts": np.asarray(queue.prompts.tokens).tolist(),
        "limits": np.asarray(queue.limits).tolist(),
    }
    script = Path(__file__).with_name("peer_generate.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    peer = subprocess.Popen([python, str(script), name], env=environment, **pipes)
    assert peer.stdin is not None and peer.stdout is not None
    to_peer, from_peer = peer.stdin, peer.stdout

    def tell(line: str) -> str:
        print(line, file=to_peer, flush=True)
        while not (said := from_peer.readline()).startswith("peer: "):
            if not said:
                raise SystemExit(f"{name} ended; its messages are above")
        return said

    def complete() -> None:
        tell("go")

    tell(json.dumps(job))
    return complete


if __name__ == "__main__":
    main()
