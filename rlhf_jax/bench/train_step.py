"""Times a PPO iteration: rollout, text, scores, advantages, update. `python -m rlhf_jax.bench.train_step`.

With --against trl=PYTHON:PYTHONPATH tunix=PYTHON, the interpreters that have TRL 1.12 and Tunix, their PPO
makes as many iterations of the same sizes, in turn with ours (peer_train.py). With --tail, completions have
the same long-tailed lengths in all of them.
"""

from __future__ import annotations

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import ROLLOUTS, Bench, arguments
from rlhf_jax.bench.peers import AGAINST
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.experience import Collector
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.sharding import place_rows


def main() -> None:
    """The parts of the trainer's loop, with a reward model, on new random prompts in each iteration."""
    bench = Bench(arguments(__doc__ or "", **ROLLOUTS, **AGAINST))
    programs, args = bench.programs, bench.args
    trained, frozen = bench.roles()
    state = programs.init_state(trained)
    judge = Judge(bench.stage.rewards, {}, has_model=True)
    collector = Collector(programs, judge, bench.tokenizer(), bench.mesh, leaves_out=False)
    records = [PromptOnly(f"prompt {i}") for i in range(args.batch)]

    def step(i: int) -> Metrics:
        nonlocal state
        prompts = place_rows(bench.mesh, bench.prompts(i))
        key = jax.random.key(i)
        rollout = bench.lap("rollout", programs.rollout(state.params, frozen, prompts, key))
        experience = collector.judge(state.params, frozen, rollout, records, 0.0)
        scored = bench.lap("scores", experience.scored)
        batch, _ = bench.lap("advantages", programs.advantages(scored, state.aux))
        state, metrics = bench.lap("update", programs.update(state, frozen, batch, key))
        return metrics

    bench.report("train_step", step)


if __name__ == "__main__":
    main()
