"""Times the rollout. `python -m rlhf_jax.bench.generate --shape 15m`.

With --queue N, N prompts on --batch slots: their completions' lengths are geometric, with a mean of 0.35 of
--new, and fixed beforehand, so that all ways make the same tokens. It times, in turn, batches of --batch
prompts one after the other, each until its longest completion has ended, and slots that are refilled; tokens
per second count useful tokens alone.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.batch import Prompts
from rlhf_jax.bench.harness import NEVER, Bench, arguments, commit, tailed_lengths
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.sharding import place_rows, traced_on


def main() -> None:
    """Prefill and decode of prompts, sampled at temperature 1."""
    more = {
        "queue": {"type": int, "default": 0, "help": "prompts of completions of different lengths"},
        "refill": {"type": int, "default": 0, "help": "slots that are refilled at once; 0: an eighth"},
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
    args = bench.args
    queue = bench.prompts(num_prompts=args.queue)
    limits = tailed_lengths(args.queue, args.new)
    made = partial(
        generate,
        bench.model,
        max_new_tokens=args.new,
        pad_id=NEVER.pad,
        sampling=Sampling(1.0, jnp.asarray([-1])),
    )
    static = jax.jit(traced_on(bench.mesh, lambda *x: made(*x[:3], limits=x[3])))
    slots = partial(made, num_slots=args.batch, refill_size=args.refill)
    refilled = jax.jit(traced_on(bench.mesh, lambda *x: slots(*x[:3], limits=x[3])))
    key = jax.random.key(0)

    def in_batches() -> list:
        batches = [slice(i, i + args.batch) for i in range(0, args.queue, args.batch)]
        return [
            static(policy, *place_rows(bench.mesh, (part(queue, rows),)), key, limits[rows])
            for rows in batches
        ]

    def in_slots() -> list:
        return [refilled(policy, place_rows(bench.mesh, queue), key, limits)]

    ways, seconds = {"batches": in_batches, "slots": in_slots}, {"batches": [], "slots": []}
    tokens = {}
    for step in range(args.warmup + args.steps):
        for name, way in ways.items():
            start = time.perf_counter()
            found = jax.block_until_ready(way())
            if step >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
            tokens[name] = np.concatenate([rollout.rows.tokens for rollout in found])
    useful = int(limits.sum())
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    line = {
        "bench": "generate",
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "shape": args.shape,
        "queue": args.queue,
        "slots": args.batch,
        "prompt": args.prompt,
        "new": args.new,
        "mean_new": round(useful / args.queue, 1),
        "rows_alike": float(np.mean((tokens["batches"] == tokens["slots"]).all(axis=1))),
    }
    line |= {f"{name}_s": round(median, 3) for name, median in medians.items()}
    line |= {f"{name}_tokens_per_s": round(useful / median, 1) for name, median in medians.items()}
    print(json.dumps(line | {"ratio": round(medians["batches"] / medians["slots"], 2)}), flush=True)


def part(prompts: Prompts, rows: slice) -> Prompts:
    """Returns some of the prompts."""
    return Prompts(*(x[rows] for x in prompts))


if __name__ == "__main__":
    main()
