"""The jitted programs of a stage: rollout, score, advantages, update, and held-out evaluation.

The only place of `jax.jit`, beside initialisation. Each program can be called on its own; shapes are static
for a whole stage, so that each is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import Metrics, Params, PolicyBatch, Prompts, Rollout, Rows, Scored, TrainState
from rlhf_jax.config import StageConfig
from rlhf_jax.config_types import LARGEST_INT
from rlhf_jax.models.forward import RoleFunction, make_forward, policy_parts
from rlhf_jax.models.kv_cache import DecodeWeights, cast_to_decode, unstack
from rlhf_jax.models.transformer import Model
from rlhf_jax.online_config import OnlineConfig, PolicyGradientConfig
from rlhf_jax.ops.importance import importance_weights
from rlhf_jax.ops.packed_rows import RowLayout
from rlhf_jax.ops.sequences import completion_sums
from rlhf_jax.optim import make_optimizer
from rlhf_jax.role_parts import role_parts, state_shardings, weight_shardings
from rlhf_jax.rollout.generate import RolloutPrograms, assemble, make_queue
from rlhf_jax.rollout.sampling import Sampling, read_sampling
from rlhf_jax.rollout.slots import Completions, Engine, Queue, Slots
from rlhf_jax.scoring import rollout_metrics, score_alone, score_metrics, score_rollout
from rlhf_jax.sharding import (
    Memory,
    batch_sharding,
    replicated,
    traced_on,
)
from rlhf_jax.step import Optimizers, init_state, make_update


class TokenIds(NamedTuple):
    """The special tokens that programs know."""

    eos: int
    pad: int
    stops: tuple[int, ...] = ()
    """Others that end completions."""


class Programs(NamedTuple):
    """The programs of one stage on one mesh."""

    init_state: Callable[[Params], TrainState]
    """Parameters by role -> the state before the first step, on the mesh."""
    rollout: RolloutPrograms
    """Trained and frozen parameters, N prompts, key -> G completions of each by the policy."""
    rollout_of_one: RolloutPrograms
    """The same with one completion of each of N * G prompts, for evaluation."""
    greedy_rollout: RolloutPrograms
    """The same with the greedy completion of each of N prompts, for a baseline."""
    to_decode: Callable[[Params], Params]
    """A role's parameters -> the same in the types that decoding reads: what a rollout elsewhere needs."""
    score: Callable[[Params, Params, Rollout], tuple[Scored, Metrics]]
    """Trained and frozen parameters, rollout -> what every role says, and metrics of the rollout."""
    greedy_score: Callable[[Params, Params, Rollout], tuple[Scored, Metrics]]
    """Trained and frozen parameters, rollout -> what the reward model says, and the number of tokens."""
    informative_groups: Callable[[Scored, dict[str, Array]], Array]
    """Scored rollout, aux -> bool[N], the groups from which something is to be learned."""
    merge: Callable[[Scored, Scored, Array | np.ndarray], Scored]
    """Two scored rollouts of B rows, i32[B] -> these of their 2 B rows."""
    advantages: Callable[[Scored, dict[str, Array]], tuple[PolicyBatch | Rows, Metrics]]
    """Scored rollout, aux -> what the update reads."""
    update: Callable[[TrainState, Params, Any, Array], tuple[TrainState, Metrics]]
    """State (donated), frozen parameters, batch, key -> state, metrics. One dispatch for all epochs."""
    evaluate: Callable[[Params, Params, Any], Metrics]
    """Trained and frozen parameters, held-out batch, or rows of a rollout -> the algorithm's sums."""
    ref_logprobs: Callable[[Params, Rows], Array]
    """Frozen parameters -> log-probabilities of completions by the reference: f32[B], packed f32[B * S]."""
    scores: Callable[[Params, Params, Rows], Array]
    """Scores of the reward model, one for each sequence: f32[B], packed f32[B * S]."""
    head_scores: Callable[[Params, Params, Rows], Array]
    """The same of each of its heads: f32[H, B], packed f32[H, B * S]."""


def rows_per_unit(stage: StageConfig, algorithm: Algorithm) -> int:
    """Returns the rows of what batch_size counts: one of a packed row or prompt, all of a record."""
    return 1 if stage.data.packing or stage.is_online else algorithm.rows_per_record


def optimizers_of(stage: StageConfig, algorithm: Algorithm) -> Optimizers:
    """Returns an optimiser per trained role, which keeps nothing where it has no say; the schedule counts
    optimiser steps.
    """
    settings = stage.settings
    num_steps = settings.num_optimizer_steps
    rates, waits = algorithm.rates(settings), algorithm.waits(settings)
    return {
        role: optax.identity()
        if role in algorithm.without_optimizer
        else make_optimizer(
            stage.optimizer, num_steps, rates.get(role), eps=algorithm.adam_eps, wait=waits.get(role, 0)
        )
        for role in algorithm.trains
    }


def row_layout(stage: StageConfig, num_completion: int, prompt_length: int) -> RowLayout | None:
    """Returns in what rows a stage scores and updates; None where these are those of its batches."""
    settings = stage.settings
    if not isinstance(settings, OnlineConfig) or settings.sequences_per_row == settings.length_buckets == 1:
        return None
    return RowLayout(
        sequences_per_row=settings.sequences_per_row,
        length_buckets=settings.length_buckets,
        num_completion=num_completion,
        prompt_length=prompt_length,
    )


def build_programs(
    stage: StageConfig,
    algorithm: Algorithm,
    model: Model,
    mesh: Mesh,
    num_completion: int,
    ids: TokenIds,
    prompt_length: int = LARGEST_INT,
    num_demonstrated: int = 0,
    teacher: Model | None = None,
) -> Programs:
    """Returns the programs of a stage; nothing is compiled before the first call.

    Args:
        stage: the stage, resolved.
        algorithm: of the stage.
        model: the transformer's pure functions.
        mesh: where everything lies.
        num_completion: C, the static maximum of completion tokens of a row.
        ids: EOS and pad.
        prompt_length: tokens of a usual prompt, for which ppo.length_buckets are made; the most by default.
        num_demonstrated: C of the rows of demonstrations beside an online batch; 0: there are none.
        teacher: of the frozen role `teacher`; None where there is none.
    """
    settings = stage.settings
    temperature = stage.rollout.temperature if stage.is_online else 1.0
    longest = stage.rollout.max_new_tokens if stage.is_online else 0
    forward = make_forward(
        model,
        num_completion,
        temperature,
        stage.model.logprob_chunk,
        longest,
        num_demonstrated=num_demonstrated,
        teacher=teacher,
    )
    optimizers = optimizers_of(stage, algorithm)
    init = partial(
        init_state,
        optimizers=optimizers,
        aux=algorithm.init_aux(settings),
        param_dtype=stage.model.param_dtype,
        state_dtype=stage.optimizer.state_dtype,
    )
    shardings = state_shardings(model, mesh, role_parts(stage, algorithm), init, optimizers)
    layout = row_layout(stage, num_completion, prompt_length)
    is_judged = stage.has_judge or (isinstance(settings, OnlineConfig) and settings.learns_from_scores)
    rows_on = batch_sharding(mesh)
    constrain = partial(_constrain, sharding=rows_on)

    def counted(rollout: Rollout) -> Array:
        return rollout.rows.sequence_mask & (rollout.ended if algorithm.leaves_out(settings) else True)

    def score(params: Params, frozen: Params, rollout: Rollout) -> tuple[Scored, Metrics]:
        frozen = _on_devices(frozen, stage.model.frozen_memory)
        scored = constrain(score_rollout(forward, params, frozen, rollout, layout))
        is_own = not stage.rollout.devices
        return scored, rollout_metrics(scored, counted(rollout), is_own=is_own)

    def greedy_score(params: Params, frozen: Params, rollout: Rollout) -> tuple[Scored, Metrics]:
        frozen = _on_devices(frozen, stage.model.frozen_memory)
        scored, metrics = score_alone(forward, params, frozen, rollout)
        return constrain(scored), metrics

    def informative_groups(scored: Scored, aux: dict[str, Array]) -> Array:
        assert algorithm.informative_groups is not None
        return algorithm.informative_groups(scored, aux, settings)

    def merge(one: Scored, other: Scored, rows: Array) -> Scored:
        return constrain(jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], one, other))

    def advantages(scored: Scored, aux: dict[str, Array]) -> tuple[PolicyBatch | Rows, Metrics]:
        assert algorithm.prepare is not None
        batch, metrics = algorithm.prepare(scored, aux, settings)
        is_corrected = stage.rollout.importance == "always" or stage.rollout.devices > 0
        if isinstance(batch, PolicyBatch) and is_corrected and stage.rollout.importance_cap:
            sampled = scored.rollout.sampler_logprobs
            mask, cap = batch.completion_mask, stage.rollout.importance_cap
            importance, told = importance_weights(batch.old_logprobs, sampled, mask, cap)
            batch, metrics = batch._replace(importance=importance), metrics | told
        if is_judged:
            metrics = metrics | score_metrics(scored, counted(scored.rollout))
        return constrain(batch), metrics

    def evaluate(params: Params, frozen: Params, batch: Any) -> Metrics:
        assert algorithm.evaluate is not None
        return algorithm.evaluate(forward, params, frozen, batch, settings)

    def ref_logprobs(frozen: Params, rows: Rows) -> Array:
        assert forward.role_logprobs is not None
        (per_token,) = forward.role_logprobs(("reference",), {}, frozen, rows)
        return completion_sums(per_token, rows)

    minibatch_rows = settings.rows_per_update // settings.num_minibatches
    if layout is not None:
        minibatch_rows //= layout.sequences_per_row
    update = (algorithm.make_update or make_update)(
        algorithm,
        forward,
        optimizers,
        settings,
        num_epochs=settings.num_epochs,
        num_minibatches=settings.num_minibatches,
        num_microbatches=minibatch_rows // (settings.microbatch_size or minibatch_rows),
        rows_per_unit=1 if stage.data.packing else algorithm.rows_per_record,
        stochastic_rounding=stage.optimizer.stochastic_rounding,
        max_kl=1.5 * settings.early_stop_kl if isinstance(settings, PolicyGradientConfig) else 0.0,
        layout=layout,
        constrain=constrain,
    )
    compiled = partial(_compiled, mesh)
    group_size = settings.group_size if isinstance(settings, OnlineConfig) else 1
    rollout = rollout_programs(stage, model, mesh, ids, group_size)
    return Programs(
        init_state=compiled(init, donate_argnums=0, out_shardings=shardings),
        rollout=rollout,
        rollout_of_one=rollout if group_size == 1 else rollout_programs(stage, model, mesh, ids),
        greedy_rollout=rollout_programs(stage, model, mesh, ids, is_greedy=True),
        to_decode=compiled(partial(cast_to_decode, dtype=model.dtype)),
        score=compiled(score),
        greedy_score=compiled(greedy_score),
        informative_groups=compiled(informative_groups, out_shardings=replicated(mesh)),
        merge=compiled(merge),
        advantages=compiled(advantages),
        update=compiled(update, donate_argnums=0, out_shardings=(shardings, replicated(mesh))),
        evaluate=compiled(evaluate),
        ref_logprobs=compiled(ref_logprobs),
        scores=compiled(forward.scores),
        head_scores=compiled(cast(RoleFunction, forward.head_scores)),
    )


def rollout_programs(
    stage: StageConfig,
    model: Model,
    mesh: Mesh,
    ids: TokenIds,
    group_size: int = 1,
    *,
    is_greedy: bool = False,
) -> RolloutPrograms:
    """Returns the rollout of a stage's policy, G completions of each prompt; see `build_programs`."""
    options = stage.rollout
    num_slots, num_columns = -(-options.slots // group_size), options.max_new_tokens
    engine = Engine(num_columns, ids.pad, num_slots, options.refill_size, group_size, is_greedy)

    def start(params: Params, frozen: Params, prompts: Prompts) -> tuple[DecodeWeights, Slots]:
        policy = policy_parts(params, frozen)
        weights = unstack(policy, model.architecture, model.dtype, model.lora)
        weights = jax.lax.with_sharding_constraint(weights, weight_shardings(model, mesh, policy))
        return weights, engine.start(weights, prompts)

    def run(weights: DecodeWeights, prompts: Prompts, key: Array, slots: Slots) -> Slots:
        sampling = read_sampling(options, jnp.asarray([ids.eos, *ids.stops]))
        queue = make_queue(prompts, num_columns)
        return engine.run(weights, queue, sampling, key, slots, options.steps_per_call)

    def finish(prompts: Prompts, done: Completions) -> Rollout:
        queue = make_queue(prompts, num_columns)
        return _constrain(assemble(prompts, engine.in_order(queue, done), ids.pad), batch_sharding(mesh))

    return RolloutPrograms(
        start=_compiled(mesh, start),
        run=_compiled(mesh, run, donate_argnums=3),
        end=_compiled(mesh, engine.end, donate_argnums=0),
        finish=_compiled(mesh, finish),
    )


def reward_program(
    model: Model, mesh: Mesh, memory: Memory = "device"
) -> Callable[[Params, Params, Rows], Array]:
    """Returns the program that scores rows with a frozen reward model of its own architecture, f32[B].

    Args:
        model: the reward model.
        mesh: where everything lies.
        memory: where the parameters lie between its passes.
    """
    forward = make_forward(model, num_completion=1)

    def scores(params: Params, frozen: Params, rows: Rows) -> Array:
        return forward.scores(params, _on_devices(frozen, memory), rows)

    return _compiled(mesh, scores)


class SamplingPrograms(NamedTuple):
    """The compiled rollout of a policy that is not trained; how tokens are drawn is an argument."""

    start: Callable[[DecodeWeights, Prompts], Slots]
    """Weights, prompts -> empty slots."""
    run: Callable[[DecodeWeights, Queue, Sampling, Array, Slots, Array], Slots]
    """Weights, queue, sampling, key, slots (donated), most steps -> the slots some steps later."""
    end: Callable[[Slots, Array], Slots]
    """As in `RolloutPrograms`."""
    in_order: Callable[[Queue, Completions], Completions]
    """Queue, what was drawn -> the same in the queue's order."""


def sampling_programs(engine: Engine, mesh: Mesh) -> SamplingPrograms:
    """Returns the programs of a decode loop; nothing is compiled before the first call."""
    return SamplingPrograms(
        start=_compiled(mesh, engine.start),
        run=_compiled(mesh, engine.run, donate_argnums=4),
        end=_compiled(mesh, engine.end, donate_argnums=0),
        in_order=_compiled(mesh, engine.in_order),
    )


def decode_weights(model: Model, mesh: Mesh, policy: Params) -> DecodeWeights:
    """Returns a policy's weights as decoding wants them: cast, layer by layer, on the devices of the mesh."""
    to_decode = partial(unstack, architecture=model.architecture, dtype=model.dtype, lora=model.lora)
    return _compiled(mesh, to_decode, out_shardings=weight_shardings(model, mesh, policy))(policy)


def _on_devices(frozen: Params, memory: Memory) -> Params:
    """Returns frozen models on the devices, copied there for a pass alone where they lie elsewhere."""
    return frozen if memory == "device" else jax.device_put(frozen, jax.memory.Space.Device)


def _compiled(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
    """Returns the jitted function; while it is traced, models may name logical axes of activations."""
    return jax.jit(traced_on(mesh, function), **options)


def _constrain(tree: Any, sharding: NamedSharding) -> Any:
    """Lays the leading axis of every array over the batch axes of the mesh."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)
