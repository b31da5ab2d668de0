"""One stage: its parts are built, trained from its newest checkpoint on, and its result is written."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import distributed, keys, watchdog
from rlhf_jax.agreement import check_alike, on_first
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import (
    JudgedRows,
    Params,
    Prompts,
    RecordRows,
    Rows,
    TrainState,
    rows_of,
    token_counts,
)
from rlhf_jax.checkpoint import Checkpointer, abstract_leaf, read_result, write_result
from rlhf_jax.config import StageConfig
from rlhf_jax.data.loader import Loader, Prefetched
from rlhf_jax.data.records import AnyRecord, Preference, PromptOnly, Ranking
from rlhf_jax.data.tokenize import text_difference
from rlhf_jax.evaluation import Evaluate, evaluate_prompts, evaluate_records
from rlhf_jax.experience import Collector
from rlhf_jax.files import replace_file, to_json
from rlhf_jax.metrics import MetricWriter
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import Ensemble
from rlhf_jax.models.transformer import Model, make_model
from rlhf_jax.offline_config import ReferenceConfig, RewardModelConfig
from rlhf_jax.online import Asynchronous, OnPolicy, PromptBatches, RolloutWorker, ahead_of, with_ptx
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.origins import adapter_info, adapters_of, fingerprint, is_same_base
from rlhf_jax.plan import Plan
from rlhf_jax.programs import Programs, TokenIds, build_programs, reward_program, rows_per_unit
from rlhf_jax.reference import with_reference
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.rewards.external import ExternalReward
from rlhf_jax.rewards.once import scored_once
from rlhf_jax.role_parts import part_shardings
from rlhf_jax.roles import load_frozen_reward, load_roles
from rlhf_jax.rollout.stops import read_stop_ids, read_stop_strings
from rlhf_jax.sharding import gathered, place, place_rows, row_holders, stage_meshes
from rlhf_jax.stop_signals import StopSignals
from rlhf_jax.trainer import NextBatch, Source, Trainer
from rlhf_jax.utilization import utilization


def stage_model(stage: StageConfig, architecture: Architecture) -> Model:
    """Returns a model of this architecture as a stage computes with it, as pure functions."""
    options = stage.model
    return make_model(
        architecture,
        options.dtype,
        options.remat,
        "xla" if stage.settings.forward_mode else options.attention,
        adapters_of(stage, architecture),
        Ensemble(getattr(stage.settings, "num_heads", 1)),
        options.unroll,
    )


def teacher_model(plan: Plan) -> Model | None:
    """Returns the model of a stage's teacher, as pure functions; None where it has none."""
    if plan.teacher is None:
        return None
    options = plan.stage.model
    return make_model(plan.teacher, options.dtype, attention=options.attention, unroll=options.unroll)


def stage_programs(plan: Plan, mesh: Mesh) -> tuple[Model, Programs]:
    """Returns the model of a stage, as pure functions, and its programs; nothing is compiled yet."""
    stage, algorithm = plan.stage, plan.algorithm
    model = stage_model(stage, plan.architecture)
    num_completion = (
        stage.rollout.max_new_tokens
        if stage.is_online
        else max(plan.train.most_loss_tokens, plan.held_out.most_loss_tokens)
    )
    ids = TokenIds(
        eos=plan.text["stop"],
        pad=cast(int, plan.tokenizer.pad_token_id),
        stops=read_stop_ids(stage.rollout, plan.tokenizer),
    )
    prompt_length = _usual_length(plan.train.lengths, getattr(stage.settings, "sequences_per_row", 1))
    programs = build_programs(
        stage,
        algorithm,
        model,
        mesh,
        num_completion,
        ids,
        prompt_length,
        num_demonstrated=0 if plan.ptx is None else plan.ptx.most_loss_tokens,
        teacher=teacher_model(plan),
    )
    stops = read_stop_strings(stage.rollout, plan.tokenizer)
    if stops is not None:
        names = ("rollout", "rollout_of_one", "greedy_rollout")
        cut = {name: getattr(programs, name)._replace(stops=stops) for name in names}
        programs = programs._replace(**cut)
    return model, programs


def _usual_length(lengths: np.ndarray, number: int) -> int:
    """Returns the length that so many records have on average, and a deviation of that average more."""
    return math.ceil(lengths.mean() + lengths.std() / math.sqrt(number))


def run_stage(plan: Plan, mesh: Mesh, signals: StopSignals) -> dict[str, Any]:
    """Returns what the stage measured; trains it first, from its newest checkpoint, unless it is done.

    Args:
        plan: of the stage.
        mesh: where everything lies.
        signals: tell the loop to stop; after the last step the stage is finished all the same.
    Raises:
        Stopped: a signal came; what was trained until then is saved.
        ValueError: a checkpoint does not fit.
        RewardError, NotFiniteError: see experience.py and trainer.py.
    """
    done = on_first(lambda: read_result(plan.directory))
    if done is not None:
        return done[1]
    stage = plan.stage
    read = (plan.train, plan.held_out, plan.demonstrations, plan.ptx)
    check_alike(
        f"stage {stage.name}: the records of data.train and data.eval, or their tokens",
        lambda: ([of and of.fingerprint for of in read], plan.text),
    )
    directories = [*plan.origins, plan.external and plan.external.path]
    check_alike(
        f"stage {stage.name}: the models that it starts from",
        lambda: [fingerprint(directory) for directory in directories if directory],
    )
    with watchdog.watching(stage.distributed.step_timeout):
        return _trained(plan, mesh, signals)


def _trained(plan: Plan, mesh: Mesh, signals: StopSignals) -> dict[str, Any]:
    """Returns what a stage measured that was not done."""
    started = time.time()
    stage, algorithm = plan.stage, plan.algorithm
    root = keys.stage_root(stage.run.seed, plan.number)
    is_online = stage.is_online
    mesh, sampling = stage_meshes(stage, mesh)
    model, programs = stage_programs(plan, mesh)
    teacher = teacher_model(plan)
    trained, frozen = load_roles(stage, algorithm, plan.origins, model, mesh, root, teacher)
    with (
        Checkpointer(
            plan.directory / "checkpoints", stage.checkpoint.keep, stage.distributed.save_timeout
        ) as checkpointer,
        MetricWriter(stage.run.dir, stage.name, stage.run.tensorboard) as writer,
    ):
        start = plan.origins.policy
        info = {
            "architecture": plan.architecture.to_dict(),
            "algorithm": stage.algorithm,
            "data": plan.train.fingerprint,
            "text": plan.text,
            "parts": {role: sorted(weights) for role, weights in trained.items()},
            "num_heads": model.ensemble.num_heads,
            **adapter_info(stage, plan.origins, model.lora),
        }
        if plan.ptx is not None:
            info["ptx"] = plan.ptx.fingerprint
        if start is not None and model.lora is None and has_reference(stage, algorithm):
            info["reference"] = on_first(lambda: fingerprint(start))
        if (taught_by := plan.origins.teacher) is not None:
            info["teacher"] = on_first(lambda: fingerprint(taught_by))
        newest = checkpointer.latest()
        if newest is not None:
            info = _resumed_info(plan, info, checkpointer.info(newest), newest)
        # What follows may take long, and writes: the stage is known to be the same now.
        info["begun"] = on_first(lambda: _first_start(plan.directory, info, started))
        if is_online:
            worker = None if sampling is mesh else _worker(plan, programs, frozen, mesh, sampling)
            source, evaluate = _online(plan, programs, frozen, mesh, root, worker)
        else:
            plan = _with_reference(plan, programs, trained, frozen, mesh)
            source, evaluate = _offline(plan, programs, mesh)
        state = programs.init_state(trained)
        del trained  # of which init_state frees what takes a place in the state alone
        if newest is not None:
            ahead = ahead_of(checkpointer.leaves(newest, "ahead"), mesh)
            saved = jax.tree.map(abstract_leaf, state._replace(ahead=ahead))
            del state, ahead  # else it would lie beside the one that is read
            state = checkpointer.restore(newest, saved)
            if distributed.is_first():
                print(f"[{stage.name}] goes on after step {newest}", file=sys.stderr)
        writer.resume(0 if newest is None else newest + 1)
        used = utilization(plan, mesh, sampling)
        trainer = Trainer(stage, programs, source, evaluate, writer, checkpointer, info, signals, used)
        with signals.deferred():
            state = trainer.train(state, frozen, root)
            if plan.demonstrations is not None and newest != int(state.step):
                state = _normalized(plan, programs, state, frozen, mesh)
            if checkpointer.latest() != int(state.step):
                trainer.save(state)
            checkpointer.wait()
            result = _result(plan, trainer.info) | {"time": trainer.times()}
            write_result(plan.directory, int(state.step), result)
    return result


def has_reference(stage: StageConfig, algorithm: Algorithm) -> bool:
    """Returns whether a stage reads the policy as it was at the start, be it only before the first step."""
    precomputes = isinstance(stage.settings, ReferenceConfig) and stage.settings.precompute_ref
    return precomputes or "reference" in algorithm.reads(stage.settings)


def _first_start(directory: Path, info: dict[str, Any], now: float) -> float:
    """Returns when the stage was first started, which its directory remembers also where nothing is saved.

    Where the directory does not, the info of a checkpoint may.
    """
    path = directory / "begun"
    if not path.exists():
        replace_file(path, f"{info.get('begun', now):.3f}\n")
    return float(path.read_text(encoding="utf-8"))


def _resumed_info(plan: Plan, here: dict[str, Any], stored: dict[str, Any], newest: int) -> dict[str, Any]:
    """Returns the info of a stage's newest checkpoint, with the place of the base as it is now.

    Raises:
        ValueError: text, records, base or reference are not those of that checkpoint.
    """
    name, start = plan.stage.name, plan.origins.policy
    if differing := text_difference(stored.get("text", {}), plan.text):
        raise ValueError(
            f"stage {name}: its text is treated otherwise than until step {newest}: "
            f"{differing}; restore the options of tokenizer and data, or choose another run.dir"
        )
    if stored["data"] != here["data"]:
        raise ValueError(
            f"stage {name}: the records of data.train are not those that it was trained on "
            f"until step {newest}; restore them, or choose another run.dir"
        )
    if stored.get("ptx") != here.get("ptx"):
        raise ValueError(
            f"stage {name}: the training records of {plan.stage.algorithm}.ptx_from are not those that it "
            f"was trained on until step {newest}; restore them, or choose another run.dir"
        )
    if not is_same_base(stored.get("base"), here.get("base")):
        raise ValueError(
            f"stage {name}: {start} is not the model any more to which its "
            f"adapters belonged until step {newest}; put that back, or choose another run.dir"
        )
    for role, path in (("reference", start), ("teacher", plan.origins.teacher)):
        if stored.get(role, here.get(role)) != here.get(role):
            raise ValueError(
                f"stage {name}: {path} is not the model any more that was its {role} until step {newest}; "
                "put that back, or choose another run.dir"
            )
    return stored | ({"base": here["base"]} if "base" in here else {})  # it may have moved


def _offline(plan: Plan, programs: Programs, mesh: Mesh) -> tuple[Source, Evaluate]:
    """Returns where batches of records come from, and the evaluation on held-out records."""
    settings, seed = plan.stage.settings, plan.stage.run.seed
    loader = Prefetched(Loader[RecordRows, AnyRecord](plan.train, settings.batch_size, seed, mesh))

    def source(state: TrainState, position: int, key: Array) -> NextBatch:
        batch, position = loader.batch(position)
        return NextBatch(place_rows(mesh, batch), position, dict(token_counts(batch)))

    return source, evaluate_records(programs, Loader(plan.held_out, settings.batch_size, seed, mesh), mesh)


def _with_reference(plan: Plan, programs: Programs, trained: Params, frozen: Params, mesh: Mesh) -> Plan:
    """Returns the plan, its records with the reference's log-probabilities where these are computed first.

    The reference is the base, or the policy as it was loaded: nothing has trained it yet.
    """
    stage, settings = plan.stage, plan.stage.settings
    if not isinstance(settings, ReferenceConfig) or not settings.precompute_ref:
        return plan
    start, fresh = plan.origins.policy, f"fresh, seed {stage.run.seed}, stage {plan.number}"
    of = {
        "model": fresh if start is None else fingerprint(start),
        "architecture": plan.architecture.to_dict(),
        "dtype": [stage.model.dtype, stage.model.base_dtype if "base" in frozen else "float32"],
    }
    add = partial(
        with_reference,
        program=programs.ref_logprobs,
        frozen=frozen if "base" in frozen else {"reference": trained["policy"]},
        of=on_first(lambda: to_json(of)),
        batch_size=settings.batch_size,
        seed=stage.run.seed,
        mesh=mesh,
    )
    directory = plan.directory / "reference"
    return plan._replace(
        train=add(plan.train, path=directory / "train.npz"),
        held_out=add(plan.held_out, path=directory / "eval.npz"),
    )


def _online(
    plan: Plan, programs: Programs, frozen: Params, mesh: Mesh, root: Array, worker: RolloutWorker | None
) -> tuple[Source, Evaluate]:
    """Returns where batches of experience come from, and the evaluation on held-out prompts."""
    stage = plan.stage
    settings = stage.settings
    assert isinstance(settings, OnlineConfig)
    loader = Loader[Prompts, PromptOnly](plan.train, settings.batch_size, stage.run.seed)
    external = _external_reward(plan, mesh)
    has_model = "reward" in frozen or external is not None

    def collector_of(programs: Programs, num_rows: int) -> Collector:
        holders = row_holders(mesh, num_rows)
        functions = {spec: scored_once(function, holders) for spec, function in plan.functions.items()}
        return Collector(
            programs,
            Judge(stage.rewards, functions, has_model=has_model) if functions or has_model else None,
            plan.tokenizer,
            mesh,
            leaves_out=plan.algorithm.leaves_out(settings),
            external=external,
        )

    collector = collector_of(programs, settings.rows_per_rollout)
    greedy = None
    if plan.algorithm.reads_greedy(settings):
        of_greedy = programs._replace(rollout=programs.greedy_rollout, score=programs.greedy_score)
        greedy = collector_of(of_greedy, settings.batch_size)
    if worker is None:
        batches = PromptBatches(loader, mesh, settings.group_size)
        most = getattr(settings, "max_rollouts", 1)
        source = OnPolicy(programs, frozen, collector, batches, most, greedy)
    else:
        batches = PromptBatches(loader, worker.mesh, settings.group_size)
        source = Asynchronous(programs, frozen, collector, batches, worker, root, settings.num_updates)
    if plan.ptx is not None:
        source = with_ptx(source, plan.ptx, settings.rows_per_update, stage.run.seed, mesh)
    held_out = Loader(plan.held_out, settings.rows_per_rollout, stage.run.seed)
    holders = row_holders(mesh, settings.rows_per_rollout)
    gold = None if plan.gold is None else scored_once(plan.gold, holders)
    key = keys.named(root, "evaluate")
    compare = None if plan.algorithm.evaluate is None else programs.evaluate
    return source, evaluate_prompts(collector, held_out, mesh, key, stage.run.num_samples, gold, compare)


def _worker(plan: Plan, programs: Programs, frozen: Params, mesh: Mesh, sampling: Mesh) -> RolloutWorker:
    """Returns what samples on a mesh of its own for a stage that trains on another."""
    model, of_sampling = stage_programs(plan, sampling)
    base = {role: tree for role, tree in frozen.items() if role == "base"}
    shardings = {role: part_shardings(model, sampling, plan.parts()[role]) for role in ("policy", *base)}
    return RolloutWorker(of_sampling.rollout, programs.to_decode, shardings, base, sampling, mesh)


def _external_reward(plan: Plan, mesh: Mesh) -> ExternalReward | None:
    """Returns the reward model that is not among the stage's roles, if there is one, on the mesh."""
    if plan.external is None:
        return None
    path, architecture, reader, ensemble = plan.external
    options = plan.stage.model
    model = make_model(
        architecture, options.dtype, attention=options.attention, ensemble=ensemble, unroll=options.unroll
    )
    program = reward_program(model, mesh, options.frozen_memory)
    return ExternalReward(reader, program, load_frozen_reward(options, path, model, mesh), mesh)


def _normalized(plan: Plan, programs: Programs, state: TrainState, frozen: Params, mesh: Mesh) -> TrainState:
    """Returns the state with mean and deviation of each head's scores on demonstrations in aux."""
    settings = plan.stage.settings
    assert plan.demonstrations is not None and isinstance(settings, RewardModelConfig)
    of = plan.demonstrations
    # As many rows as the mesh is known to divide.
    rows = rows_per_unit(plan.stage, plan.algorithm) * settings.batch_size
    loader = Loader[Rows | JudgedRows, AnyRecord](
        of, max(rows // of.rows_per_unit, 1), plan.stage.run.seed, mesh
    )
    scores = []
    for batch, _ in loader.eval_batches():
        found = gathered(programs.head_scores(state.params, frozen, place_rows(mesh, rows_of(batch))))
        scores.append(found[:, _best(batch, of.rows_per_record)])
        watchdog.beat()
    every = np.concatenate(scores, axis=1)
    std = every.std(axis=1) if settings.normalizer == "mean_std" else np.ones(len(every))
    found = {"normalizer_mean": every.mean(axis=1), "normalizer_std": np.maximum(std, 1e-6)}
    aux = {name: np.float32(of).reshape(state.aux[name].shape) for name, of in found.items()}
    return state._replace(aux=place(aux, jax.tree.map(lambda x: x.sharding, state.aux)))


def _best(batch: Rows | JudgedRows, rows_per_record: int) -> np.ndarray:
    """Returns bool[B], packed bool[B * S]: the completions that none is better than; of pairs the chosen."""
    present = np.asarray(rows_of(batch).sequence_mask)
    if isinstance(batch, JudgedRows):
        better = np.asarray(batch.better).reshape(-1, rows_per_record, rows_per_record)
        return present & ~better.any(axis=1).ravel()
    return present & (np.arange(len(present)) % rows_per_record == 0)


def _result(plan: Plan, info: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of summary.json: what the algorithm reports, before and after, and its seconds."""
    before, after = info["before"], info["after"]
    result: dict[str, Any] = {}
    for measure in plan.algorithm.reports:
        if measure.metric not in after:
            continue
        if measure.is_compared:
            result[f"{measure.name}_before"] = before[measure.metric]
            result[f"{measure.name}_after"] = after[measure.metric]
        else:
            result[measure.name] = after[measure.metric]
    if plan.gold is not None and _held_out_pairs(plan):
        result["accuracy_ceiling"] = on_first(lambda: _gold_accuracy(plan))
    return result | {"seconds": info["seconds"]}


def _gold_accuracy(plan: Plan) -> float:
    """Returns the gold function's accuracy on the held-out pairs: what noise lets a perfect model reach."""
    assert plan.gold is not None
    pairs = _held_out_pairs(plan)
    prompts = [PromptOnly(pair.prompt) for pair in pairs]
    margins = plan.gold(prompts, [pair.chosen for pair in pairs]) - plan.gold(
        prompts, [pair.rejected for pair in pairs]
    )
    return float(np.mean(np.where(margins == 0, 0.5, margins > 0)))


def _held_out_pairs(plan: Plan) -> list[Preference]:
    """Returns the held-out pairs, those of rankings among them."""
    found = []
    for record in plan.held_out.records:
        if isinstance(record, Preference):
            found.append(record)
        elif isinstance(record, Ranking):
            of = record.completions
            found += [Preference(record.prompt, of[i], of[j]) for i, j in record.pairs]
    return found
