"""Times a DPO step, the reference's forward pass included. `python -m rlhf_jax.bench.dpo_step --shape 15m`.

With --against trl=PYTHON tunix=PYTHON, these libraries' trainers make the same step in turn with ours. With
--cached_reference the reference's log-probabilities are computed before the steps, as dpo.precompute_ref
does; TRL then does so too. Tunix cannot, and is refused.
"""

from __future__ import annotations

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import CACHED, Bench, arguments
from rlhf_jax.bench.peers import AGAINST
from rlhf_jax.bench.report import report


def main() -> None:
    """Pairs of rows of --prompt and --new random tokens, of which the latter count; new ones in each step."""
    args = arguments(__doc__ or "", "pairs", **CACHED, **AGAINST)
    if args.cached_reference and any(peer.startswith("tunix") for peer in args.against):
        raise SystemExit(
            "--cached_reference: Tunix computes the reference in each step; leave one of them out"
        )
    bench = Bench(args, "dpo")
    programs = bench.programs
    num_rows = 2 * args.batch
    known = []
    if args.cached_reference:
        reference = {"reference": bench.weights("reference", 8)}
        batches = (bench.rows(num_rows, i) for i in range(args.warmup + args.steps))
        known = [programs.ref_logprobs(reference, rows) for rows in batches]
        jax.block_until_ready(known)
        del reference
    trained, frozen = bench.roles()
    state = programs.init_state(trained)

    def step(i: int) -> Metrics:
        nonlocal state
        rows = bench.rows(num_rows, i)
        if known:
            rows = rows._replace(ref_logprobs=known[i])
        state, metrics = programs.update(state, frozen, rows, jax.random.key(i))
        return metrics

    report(bench, "dpo_step", step, tokens=num_rows * (args.prompt + args.new))


if __name__ == "__main__":
    main()
