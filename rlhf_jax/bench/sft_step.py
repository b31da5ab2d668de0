"""Times a step of supervised fine-tuning. `python -m rlhf_jax.bench.sft_step --shape 15m`.

With --against trl=PYTHON tunix=PYTHON, these libraries' trainers make the same step in turn with ours.
"""

from __future__ import annotations

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import Bench, arguments
from rlhf_jax.bench.peers import AGAINST
from rlhf_jax.bench.report import report


def main() -> None:
    """Rows of --prompt and --new random tokens, of which the latter carry loss; new ones in each step."""
    bench = Bench(arguments(__doc__ or "", **AGAINST), "sft")
    programs, args = bench.programs, bench.args
    trained, frozen = bench.roles()
    state = programs.init_state(trained)
    num_rows = args.batch

    def step(i: int) -> Metrics:
        nonlocal state
        state, metrics = programs.update(state, frozen, bench.rows(num_rows, i), jax.random.key(i))
        return metrics

    report(bench, "sft_step", step, tokens=num_rows * (args.prompt + args.new))


if __name__ == "__main__":
    main()
