"""A stage's programs lowered from shapes alone: for dry builds, and to compile them for devices elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params, Prompts, Rollout, Rows, TrainState
from rlhf_jax.config import StageConfig
from rlhf_jax.data.examples import Batch
from rlhf_jax.data.loader import Loader
from rlhf_jax.models.forward import policy_parts
from rlhf_jax.models.transformer import POLICY, Model
from rlhf_jax.offline_config import ReferenceConfig
from rlhf_jax.plan import Plan
from rlhf_jax.programs import Programs
from rlhf_jax.role_parts import Parts, part_structs, weight_shardings
from rlhf_jax.rollout.slots import slot_shardings
from rlhf_jax.sharding import batch_sharding, placed_structs, replicated, stage_meshes
from rlhf_jax.stage import stage_programs, teacher_model


class Call(NamedTuple):
    """A program, and placed shape structs of what it is called with."""

    program: Any
    """Of jax.jit."""
    resident: tuple[Any, ...]
    """The first arguments: parameters and state, which live all the while."""
    own: tuple[Any, ...]
    """The others, which are made for the call."""

    def lower(self) -> Lowered:
        """Returns the program, lowered; nothing is compiled, computed or held."""
        return self.program.lower(*self.resident, *self.own)


class StageCalls(NamedTuple):
    """What a step of a stage runs."""

    calls: dict[str, Call]
    """Online: rollout_start, rollout, score, advantages, update, greedy_ of the first three where greedy
    completions are read, and evaluate where the algorithm has it; offline: evaluate, update."""
    state: TrainState
    frozen: Params
    """Placed shape structs, as the programs are given them."""
    batch_shape: tuple[int, ...]
    """Of the first array of a batch: rows, length."""


def lower_stage(plan: Plan, mesh: Mesh) -> tuple[dict[str, Lowered], tuple[int, ...]]:
    """Returns the programs of a planned stage, lowered, and the shape of its first batch."""
    of = stage_calls(plan, mesh)
    return {name: call.lower() for name, call in of.calls.items()}, of.batch_shape


def stage_calls(plan: Plan, mesh: Mesh) -> StageCalls:
    """Returns what a step of a planned stage runs, on a mesh over all devices."""
    mesh, _ = stage_meshes(plan.stage, mesh)
    model, programs = stage_programs(plan, mesh)
    settings = plan.stage.settings
    examples = plan.train
    if isinstance(settings, ReferenceConfig) and settings.precompute_ref:
        blank = np.zeros((len(examples), examples.rows_per_record), np.float32)
        examples = dataclasses.replace(examples, ref_logprobs=blank)
    batch, _ = Loader[Any, Any](examples, settings.batch_size, plan.stage.run.seed).batch(0)
    ptx = None
    if plan.ptx is not None:
        ptx, _ = Loader[Rows, Any](plan.ptx, settings.rows_per_update, plan.stage.run.seed).batch(0)
    teacher = teacher_model(plan)
    return calls_of(programs, plan.stage, plan.parts(), model, mesh, batch, ptx=ptx, teacher=teacher)


def lower_programs(
    built: Programs, stage: StageConfig, parts: Parts, model: Model, mesh: Mesh, batch: Batch
) -> dict[str, Lowered]:
    """Returns what a step of a stage runs, by name, lowered; see `calls_of`."""
    calls = calls_of(built, stage, parts, model, mesh, batch).calls
    return {name: call.lower() for name, call in calls.items()}


def calls_of(
    built: Programs,
    stage: StageConfig,
    parts: Parts,
    model: Model,
    mesh: Mesh,
    batch: Batch,
    ptx: Rows | None = None,
    teacher: Model | None = None,
) -> StageCalls:
    """Returns what a step of a stage runs.

    Args:
        built: the stage's programs.
        stage: reads the algorithm, and the types of frozen models.
        parts: of each role's parameters.
        model: that the programs were built of.
        mesh: that they were built for; its devices need not be there, see jax.experimental.topologies.
        batch: what the stage takes of its records, arrays or shape structs.
        ptx: the demonstrations that an online stage takes with them.
        teacher: that the programs were built of.
    """
    programs = cast(Any, built)  # what jax.jit returns

    def rows(tree: Any) -> Any:
        return jax.tree.map(lambda x: _placed(x, batch_sharding(mesh)), tree)

    def judged(scored: Any) -> Any:
        count = scored.rollout.ended.shape
        return rows(scored._replace(scores=ShapeDtypeStruct(count, np.float32)))

    trained, frozen = abstract_roles(stage, parts, model, mesh, teacher)
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    state = programs.init_state.eval_shape(trained)
    learned = rows(batch)
    calls: dict[str, Call] = {}
    if stage.is_online:
        calls, rollout = rollout_calls(built, model, mesh, trained, frozen, learned)
        calls["score"] = Call(programs.score, (trained, frozen), (rollout,))
        scored = judged(programs.score.eval_shape(trained, frozen, rollout)[0])
        if ALGORITHMS[stage.algorithm].reads_greedy(stage.settings):
            of_greedy = built._replace(rollout=built.greedy_rollout)
            greedy_calls, rollout = rollout_calls(of_greedy, model, mesh, trained, frozen, learned)
            calls |= {f"greedy_{name}": call for name, call in greedy_calls.items()}
            calls["greedy_score"] = Call(programs.greedy_score, (trained, frozen), (rollout,))
            greedy = judged(programs.greedy_score.eval_shape(trained, frozen, rollout)[0])
            scored = scored._replace(greedy=greedy)
        calls["advantages"] = Call(programs.advantages, (), (scored, state.aux))
        learned = rows(programs.advantages.eval_shape(scored, state.aux)[0])
        if ptx is not None:
            learned = learned._replace(ptx=rows(ptx))
        if ALGORITHMS[stage.algorithm].evaluate is not None:
            calls["evaluate"] = Call(programs.evaluate, (trained, frozen), (rollout.rows,))
    else:
        calls["evaluate"] = Call(programs.evaluate, (trained, frozen), (learned,))
    calls["update"] = Call(programs.update, (state, frozen), (learned, key))
    return StageCalls(calls, state, frozen, np.shape(jax.tree.leaves(batch)[0]))


def rollout_calls(
    built: Programs, model: Model, mesh: Mesh, trained: Params, frozen: Params, prompts: Prompts
) -> tuple[dict[str, Call], Rollout]:
    """Returns the programs of a rollout, and the placed shapes of what it gives; trained ... are placed."""
    start, run, _, finish, _ = cast(Any, built.rollout)
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    weights, slots = start.eval_shape(trained, frozen, prompts)
    weights_at = weight_shardings(model, mesh, policy_parts(trained, frozen))
    weights, slots = placed_structs((weights, slots), (weights_at, slot_shardings(mesh, slots)))
    calls = {
        "rollout_start": Call(start, (trained, frozen), (prompts,)),
        "rollout": Call(run, (), (weights, prompts, key, slots)),
    }
    rollout = finish.eval_shape(prompts, slots.done)
    return calls, jax.tree.map(lambda x: _placed(x, batch_sharding(mesh)), rollout)


def abstract_roles(
    stage: StageConfig, parts: Parts, model: Model, mesh: Mesh, teacher: Model | None = None
) -> tuple[Params, Params]:
    """Returns (trained, frozen): each role's parameters as they are loaded, as placed shape structs."""
    trains, cfg = ALGORITHMS[stage.algorithm].trains, stage.model

    def frozen(role: str) -> Params:
        if role == "base":
            return part_structs(model, mesh, parts[role], cfg.base_dtype)
        return part_structs(model, mesh, parts[role], cfg.role_dtype, cfg.frozen_memory)

    trained = {role: part_structs(model, mesh, parts[role]) for role in trains}
    read = {role: frozen(role) for role in parts if role not in trains}
    if teacher is not None:
        read["teacher"] = part_structs(teacher, mesh, POLICY, cfg.role_dtype)
    return trained, read


def _placed(x: Any, sharding: NamedSharding) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)
