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
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.bench.harness import NEVER, Bench, arguments, tailed_lengths
from rlhf_jax.bench.peers import AGAINST, in_turn, start_peers
from rlhf_jax.bench.report import header, report, resources
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
        **AGAINST,
    }
    bench = Bench(arguments(__doc__ or "", **more))
    params = {"policy": bench.weights("policy", 0)}
    if bench.args.queue:
        long_tailed(bench, params["policy"])
        return
    prompts = place_rows(bench.mesh, bench.prompts())
    report(
        bench,
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

    def completing(engine: Engine) -> Callable[[DecodeWeights, Queue, Array], tuple[Completions, Array]]:
        def complete(weights: DecodeWeights, queue: Queue, key: Array) -> tuple[Completions, Array]:
            slots = engine.run(weights, queue, sampling, key, engine.start(weights, queue.prompts))
            return slots.done, slots.steps

        return jax.jit(traced_on(mesh, complete))

    static = completing(Engine(args.new, NEVER.pad))
    refilled = completing(Engine(args.new, NEVER.pad, args.batch, args.refill))
    key = jax.random.key(0)

    def in_batches() -> list[tuple[Completions, Array]]:
        weights = cast(policy)
        parts = [slice(i, i + args.batch) for i in range(0, args.queue, args.batch)]
        batches = [jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], queue) for rows in parts]
        return [static(weights, place_rows(mesh, batch), key) for batch in batches]

    def in_slots() -> list[tuple[Completions, Array]]:
        return [refilled(cast(policy), place_rows(mesh, queue), key)]

    ways: dict[str, Callable[[], Any]] = {"batches": in_batches, "slots": in_slots}
    job = {
        "prompt": args.prompt,
        "new": args.new,
        "batch": args.batch,
        "prompts": np.asarray(queue.prompts.tokens).tolist(),
        "limits": np.asarray(queue.limits).tolist(),
    }
    ways |= start_peers(args.against, "peer_generate.py", job, bench.architecture)
    found: dict[str, list[tuple[Completions, Array]]] = {}

    def step(name: str, _: int) -> None:
        found[name] = jax.block_until_ready(ways[name]())

    seconds, first = in_turn({name: partial(step, name) for name in ways}, args.warmup, args.steps)
    ours = ("batches", "slots")
    tokens = {name: np.concatenate([done.tokens for done, _ in found[name]]) for name in ours}
    useful = int(limits.sum())
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    line = {
        **header(bench, "generate"),
        "queue": args.queue,
        "mean_new": round(useful / args.queue, 1),
        "rows_alike": float(np.mean((tokens["batches"] == tokens["slots"]).all(axis=1))),
        "decode_steps": {name: sum(int(steps) for _, steps in found[name]) for name in ours},
        "first_s": {name: round(of, 1) for name, of in first.items()},
    }
    line |= {f"{name}_s": round(median, 3) for name, median in medians.items()}
    line |= {f"{name}_tokens_per_s": round(useful / median, 1) for name, median in medians.items()}
    others = {name: median for name, median in medians.items() if name != "slots"}
    line |= {f"slots_against_{name}": round(other / medians["slots"], 2) for name, other in others.items()}
    print(json.dumps(line | resources()), flush=True)


if __name__ == "__main__":
    main()
