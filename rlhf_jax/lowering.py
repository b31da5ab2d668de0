"""A stage's programs lowered from shapes alone: for dry builds, and to compile them for devices elsewhere."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import Params, Prompts, Rows
from rlhf_jax.data.loader import Loader
from rlhf_jax.models.transformer import Model
from rlhf_jax.plan import Plan
from rlhf_jax.programs import Programs, role_shardings
from rlhf_jax.sharding import batch_sharding, replicated
from rlhf_jax.stage import stage_programs


def lower_stage(plan: Plan, mesh: Mesh) -> tuple[dict[str, Lowered], tuple[int, int]]:
    """Returns the programs of a planned stage, see `lower_programs`, and the shape of its first batch."""
    model, programs = stage_programs(plan, mesh)
    settings = plan.stage.settings
    batch, _ = Loader[Any, Any](plan.train, settings.batch_size, plan.stage.run.seed).batch(0)
    has_reward_model = plan.origins.reward is not None
    lowered = lower_programs(programs, plan.algorithm, model, mesh, batch, has_reward_model=has_reward_model)
    return lowered, np.shape(batch.tokens)


def lower_programs(
    built: Programs,
    algorithm: Algorithm,
    model: Model,
    mesh: Mesh,
    batch: Rows | Prompts,
    *,
    has_reward_model: bool = True,
) -> dict[str, Lowered]:
    """Returns what a step of a stage runs, by name, lowered; nothing is compiled, computed or held.

    Online: rollout, score, advantages, update; offline: evaluate, update.

    Args:
        built: the stage's programs.
        algorithm: of the stage.
        model: that the programs were built of.
        mesh: that they were built for; its devices need not be there, see jax.experimental.topologies.
        batch: what the stage takes of its records, arrays or shape structs.
        has_reward_model: whether one of this architecture is among the frozen roles, where one is read.
    """
    programs = cast(Any, built)  # what jax.jit returns

    def weights(role: str) -> Params:
        shapes = model.score_shapes if role in ("value", "reward") else model.policy_shapes
        return jax.tree.map(_placed, shapes, role_shardings(model, mesh, role))

    def rows(tree: Any) -> Any:
        return jax.tree.map(lambda x: _placed(x, batch_sharding(mesh)), tree)

    trained = {role: weights(role) for role in algorithm.trains}
    reads = [role for role in algorithm.reads if role != "reward" or has_reward_model]
    frozen = {role: weights(role) for role in reads}
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    state = programs.init_state.eval_shape(trained)
    learned, lowered = rows(batch), {}
    if algorithm.records == "prompt_only":
        prompts = learned
        lowered["rollout"] = programs.rollout.lower(trained["policy"], prompts, key)
        rollout = rows(programs.rollout.eval_shape(trained["policy"], prompts, key))
        lowered["score"] = programs.score.lower(trained, frozen, rollout)
        scored = rows(programs.score.eval_shape(trained, frozen, rollout)[0])
        scores = ShapeDtypeStruct(rollout.ended.shape, np.float32, sharding=batch_sharding(mesh))
        scored = scored._replace(scores=scores)
        lowered["advantages"] = programs.advantages.lower(scored, state.aux)
        learned = rows(programs.advantages.eval_shape(scored, state.aux)[0])
    else:
        lowered["evaluate"] = programs.evaluate.lower(trained, frozen, learned)
    lowered["update"] = programs.update.lower(state, frozen, learned, key)
    return lowered


def _placed(x: Any, sharding: NamedSharding) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)
