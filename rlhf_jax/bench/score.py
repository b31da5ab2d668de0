"""Times what all roles say of a rollout, in one pass. `python -m rlhf_jax.bench.score --shape 15m`."""

from __future__ import annotations

import jax

from rlhf_jax.bench.harness import ROLLOUTS, Bench, arguments
from rlhf_jax.bench.report import report
from rlhf_jax.sharding import place_rows


def main() -> None:
    """Policy, reference, value and reward model score one rollout."""
    bench = Bench(arguments(__doc__ or "", **ROLLOUTS))
    programs, args = bench.programs, bench.args
    params, frozen = bench.roles()
    prompts = place_rows(bench.mesh, bench.prompts())
    rollout = programs.rollout(params, frozen, prompts, jax.random.key(0))
    tokens = round(args.batch * (args.prompt + bench.mean_new))
    report(bench, "score", lambda i: programs.score(params, frozen, rollout), tokens)


if __name__ == "__main__":
    main()
