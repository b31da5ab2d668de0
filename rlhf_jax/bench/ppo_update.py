"""Times the PPO update, all epochs of a rollout. `python -m rlhf_jax.bench.ppo_update --shape 15m`."""

from __future__ import annotations

import jax

from rlhf_jax.batch import Metrics
from rlhf_jax.bench.harness import PASSES, ROLLOUTS, Bench, arguments
from rlhf_jax.bench.report import report
from rlhf_jax.sharding import place_rows


def main() -> None:
    """One rollout is made and scored; the update on it is repeated, each time on the state of the last."""
    bench = Bench(arguments(__doc__ or "", **PASSES, **ROLLOUTS))
    programs = bench.programs
    trained, frozen = bench.roles()
    state = programs.init_state(trained)
    rollout = programs.rollout(
        state.params, frozen, place_rows(bench.mesh, bench.prompts()), jax.random.key(0)
    )
    scored, _ = programs.score(state.params, frozen, rollout)
    batch, _ = programs.advantages(scored, state.aux)

    def step(i: int) -> Metrics:
        nonlocal state
        state, metrics = programs.update(state, frozen, batch, jax.random.key(i))
        return metrics

    args = bench.args
    tokens = round(args.batch * (args.prompt + bench.mean_new) * args.epochs)
    report(bench, "ppo_update", step, tokens)


if __name__ == "__main__":
    main()
