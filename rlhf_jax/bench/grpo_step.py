"""Times a GRPO step: rollout, texts, a reward function, scores, advantages, one update.

`python -m rlhf_jax.bench.grpo_step --shape 15m`. With --against trl=PYTHON tunix=PYTHON, the interpreters
that have these libraries, their GRPO makes as many steps of the same sizes, in turn with ours
(peer_train.py). With --tail, completions have the same long-tailed lengths in all of them.
With --refill_unit completion each completion has a slot of its own, for which its prompt is prefilled, where
else those of a prompt share slots and wait for the longest. Only this benchmark has it: a stage's slots take
groups.
"""

from __future__ import annotations

from rlhf_jax.bench import peer_models
from rlhf_jax.bench.harness import GROUPS, ROLLOUTS, Bench, arguments
from rlhf_jax.bench.peers import AGAINST
from rlhf_jax.bench.report import report
from rlhf_jax.bench.train_step import iteration


def main() -> None:
    """Iterations with a reward function on groups of completions, --batch in all."""
    args = arguments(__doc__ or "", "completions", **GROUPS, **ROLLOUTS, **AGAINST)
    if args.batch % args.group_size:
        raise SystemExit(f"--batch {args.batch} must be a multiple of --group_size {args.group_size}")
    if args.refill_unit == "group" and args.slots % args.group_size:
        raise SystemExit(f"--slots {args.slots} must be a multiple of --group_size {args.group_size}")
    reward = peer_models.text_reward
    bench = Bench(args, "grpo", reward=f"{peer_models.__name__}:{reward.__name__}")
    report(bench, "grpo_step", iteration(bench))


if __name__ == "__main__":
    main()
