"""Builds what a configuration trains, without computing: `python -m tests.dry_build CONFIG [FLAG VALUE ...]`.

Models, tokenizer and data are read, every record is tokenised, the mesh is made, and each program is lowered
for the batches of the configuration. One that cannot start fails with the message that a run would give.
Prints a line of JSON: rows and length of each stage's first batch.
"""

from __future__ import annotations

import json
import sys
from typing import Any, cast

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from rlhf_jax.batch import Params
from rlhf_jax.command_line import read_config
from rlhf_jax.data.loader import Loader
from rlhf_jax.plan import Plan
from rlhf_jax.programs import role_shardings
from rlhf_jax.stage import stage_programs
from rlhf_jax.train import prepare


def lower(plan: Plan, mesh: Mesh) -> dict[str, Any]:
    """Returns figures of a stage whose programs have been lowered."""
    stage, algorithm = plan.stage, plan.algorithm
    is_online = algorithm.records == "prompt_only"
    model, built = stage_programs(plan, mesh)
    programs = cast(Any, built)

    def weights(role: str) -> Params:
        shapes = model.score_shapes if role in ("value", "reward") else model.policy_shapes
        shardings = role_shardings(model, mesh, role)
        return jax.tree.map(lambda s, at: ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)

    trained = {role: weights(role) for role in algorithm.trains}
    absent = () if plan.origins.reward or plan.function is None else ("reward",)
    frozen = {role: weights(role) for role in algorithm.reads if role not in absent}
    key = jax.random.key(0)
    batch, _ = Loader(plan.train, stage.settings.batch_size, stage.run.seed).batch(0)
    figures = {"rows": int(np.shape(batch.tokens)[0]), "length": int(np.shape(batch.tokens)[1])}
    state = programs.init_state.eval_shape(trained)
    if is_online:
        programs.rollout.lower(trained["policy"], batch, key)
        rollout = programs.rollout.eval_shape(trained["policy"], batch, key)
        programs.score.lower(trained, frozen, rollout)
        scored, _ = programs.score.eval_shape(trained, frozen, rollout)
        scored = scored._replace(scores=ShapeDtypeStruct(rollout.ended.shape, np.float32))
        batch, _ = programs.advantages.eval_shape(scored, state.aux)
    else:
        programs.evaluate.lower(trained, frozen, batch)
    programs.update.lower(state, frozen, batch, key)
    return figures


def main(argv: list[str]) -> int:
    """Prints the figures of the stages of a configuration; returns the exit code."""
    try:
        plans, mesh = prepare(read_config(["--config", *argv]))
        figures = {plan.stage.name: lower(plan, mesh) for plan in plans}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
