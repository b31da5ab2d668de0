"""Times the rollout program. `python -m rlhf_jax.bench.generate --shape 15m`."""

from __future__ import annotations

import jax

from rlhf_jax.bench.harness import Bench, arguments
from rlhf_jax.sharding import place_rows


def main() -> None:
    """Prefill and decode of a batch of prompts, sampled at temperature 1."""
    bench = Bench(arguments(__doc__ or ""))
    params = {"policy": bench.weights("policy", 0)}
    prompts = place_rows(bench.mesh, bench.prompts())
    bench.report(
        "generate",
        lambda i: bench.programs.rollout(params, {}, prompts, jax.random.key(i)),
        tokens=bench.args.batch * bench.args.new,
    )


if __name__ == "__main__":
    main()
