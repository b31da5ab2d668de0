"""Times attention over whole rows, forward and backward: XLA's against the device's kernel.

    python -m rlhf_jax.bench.attention --length 8192 --dtype bfloat16

A JSON line for each; `difference` is that of output and gradients to XLA's in float32, as a share of norms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.bench.report import commit
from rlhf_jax.models.row_attention import flash_lack, row_attention
from rlhf_jax.sharding import compute_capability


def passes(q: Array, k: Array, v: Array, towards: Array, **options: Any) -> tuple[Array, ...]:
    """Returns the attended values and the gradients of q, k, v, of a loss that is linear in the values."""
    out, backward = jax.vjp(partial(row_attention, **options), q, k, v)
    return out, *backward(towards.astype(out.dtype))


def difference(found: tuple[Array, ...], expected: tuple[Array, ...]) -> float:
    """Returns the largest ||a - b|| / ||b||."""
    pairs = zip(found, expected, strict=True)
    return max(float(jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b)) for a, b in pairs)


def main() -> None:
    """Prints a line for XLA, and one for the kernel where the device has one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    args = parser.parse_args()

    def random(seed: int, heads: int) -> Array:
        shape = (args.rows, args.length, heads, args.head_dim)
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32)

    inputs = [random(i, args.heads if i in (0, 3) else args.kv_heads) for i in range(4)]
    options = {"scale": args.head_dim**-0.5, "windows": [args.window]}
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(partial(passes, **options, implementation="xla"))(*inputs)
    inputs = [x.astype(args.dtype) for x in inputs]
    pairs = args.rows * args.heads * args.length * min(args.window or args.length, args.length) / 2
    lack = flash_lack(
        jax.default_backend(),
        jnp.dtype(args.dtype),
        head_dim=args.head_dim,
        softcap=0.0,
        is_packed=False,
        capability=compute_capability(),
    )
    for implementation in ("xla",) if lack else ("xla", "flash"):
        run = jax.jit(partial(passes, **options, implementation=implementation)).lower(*inputs).compile()
        found = run(*inputs)
        seconds = []
        for _ in range(args.steps):
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        line = {
            "bench": "attention",
            "commit": commit(),
            "device": jax.devices()[0].device_kind,
            **vars(args),
            "implementation": implementation,
            "ms": round(1000 * median, 2),
            "useful_gflops": round(7 * 2 * pairs * args.head_dim / median / 1e9, 1),  # 2 products, then 5
            "temp_mib": round(cast(Any, run.memory_analysis()).temp_size_in_bytes / 2**20, 1),
            "difference": float(f"{difference(found, expected):.2g}"),
        }
        print(json.dumps(line), flush=True)
    if lack:
        print(json.dumps({"bench": "attention", "implementation": "flash", "not_measured": lack}))


if __name__ == "__main__":
    main()
