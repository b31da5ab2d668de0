"""Times a PPO iteration: rollout, text, scores, advantages, update. `python -m rlhf_jax.bench.train_step`.

With --against trl=PYTHON:PYTHONPATH tunix=PYTHON, the interpreters that have TRL 1.12 and Tunix, their PPO
makes as many iterations of the same sizes, in turn with ours (peer_train.py). With --tail, completions have
the same long-tailed lengths in all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import PASSES, ROLLOUTS, Bench, arguments
from rlhf_jax.bench.peers import AGAINST
from rlhf_jax.bench.report import report
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.experience import Collector
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.rewards.functions import load_function
from rlhf_jax.sharding import place_rows


def main() -> None:
    """Iterations with a reward model."""
    bench = Bench(arguments(__doc__ or "", **PASSES, **ROLLOUTS, **AGAINST))
    report(bench, "train_step", iteration(bench))


def iteration(bench: Bench) -> Callable[[int], Metrics]:
    """Returns what makes the i-th iteration: the parts of the trainer's loop, on new random prompts."""
    programs, rewards = bench.programs, bench.stage.rewards
    trained, frozen = bench.roles()
    state = programs.init_state(trained)
    functions = {spec: load_function(spec) for spec in rewards.functions}
    judge = Judge(rewards, functions, has_model=not functions)
    collector = Collector(programs, judge, bench.tokenizer(), bench.mesh, leaves_out=False)
    records = [PromptOnly(f"prompt {i}") for i in range(bench.args.batch)]

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

    return step


if __name__ == "__main__":
    main()
