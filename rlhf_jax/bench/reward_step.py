"""Times a step of a reward model. `python -m rlhf_jax.bench.reward_step --shape 15m`.

With --against trl=PYTHON, TRL's trainer makes the same step in turn with ours; Tunix has none.
"""

from __future__ import annotations

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import Bench, arguments
from rlhf_jax.bench.peers import AGAINST
from rlhf_jax.bench.report import report


def main() -> None:
    """Pairs of rows of --prompt and --new random tokens; new ones in each step."""
    bench = Bench(arguments(__doc__ or "", **AGAINST), "reward_model")
    programs, args = bench.programs, bench.args
    trained, frozen = bench.roles()
    state = programs.init_state(trained)
    num_rows = 2 * args.batch

    def step(i: int) -> Metrics:
        nonlocal state
        state, metrics = programs.update(state, frozen, bench.rows(num_rows, i), jax.random.key(i))
        return metrics

    report(bench, "reward_step", step, tokens=num_rows * (args.prompt + args.new))


if __name__ == "__main__":
    main()
