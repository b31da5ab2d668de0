"""Times a PPO iteration: rollout, text, scores, advantages, update. `python -m rlhf_jax.bench.train_step`."""

from __future__ import annotations

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import PACKING, Bench, arguments
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.experience import Collector
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.sharding import place_rows


def main() -> None:
    """The parts of the trainer's loop, with a reward model, on new random prompts in each iteration."""
    bench = Bench(arguments(__doc__ or "", **PACKING))
    programs, args = bench.programs, bench.args
    trained, frozen = bench.roles()
    state = programs.init_state(trained)
    judge = Judge(bench.stage.rewards, None, has_model=True)
    collector = Collector(programs, judge, bench.tokenizer(), bench.mesh, leaves_out=False)
    records = [PromptOnly(f"prompt {i}") for i in range(args.batch)]

    def step(i: int) -> Metrics:
        nonlocal state
        prompts = place_rows(bench.mesh, bench.prompts(i))
        experience = collector.collect(state.params, frozen, prompts, records, jax.random.key(i))
        batch, _ = programs.advantages(experience.scored, state.aux)
        state, metrics = programs.update(state, frozen, batch, jax.random.key(i))
        return metrics

    bench.report("train_step", step)


if __name__ == "__main__":
    main()
