"""Rollouts on devices of their own: one update old, corrected for it, and the same after any interruption."""

import dataclasses
import functools
import json
import os
import signal

import jax
import numpy as np
import pytest

from rlhf_jax import keys
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import num_rows
from rlhf_jax.checkpoint import Checkpointer
from rlhf_jax.config import CheckpointConfig, MeshConfig, RewardsConfig, RunConfig
from rlhf_jax.data.loader import Loader
from rlhf_jax.evaluation import Evaluation
from rlhf_jax.experience import Collector
from rlhf_jax.metrics import MetricWriter
from rlhf_jax.online import Asynchronous, OnPolicy, PromptBatches, RolloutWorker, ahead_of
from rlhf_jax.rewards.combine import Judge
from rlhf_jax.role_parts import part_shardings, role_parts
from rlhf_jax.sharding import make_mesh, stage_meshes
from rlhf_jax.stop_signals import Stopped, StopSignals
from rlhf_jax.trainer import Trainer, at_position
from tests import tiny
from tests.unit.test_evaluation import Numbers, examples, length

ROOT, NUM_ITERATIONS = jax.random.key(5), 4


class Setting:
    """Programs and parts of a stage that trains on two devices, and with `devices` samples on two others."""

    def __init__(self, devices, rate=0.02, sharing="separate", algorithm="ppo", **options):
        settings = {"num_iterations": NUM_ITERATIONS, "num_epochs": 2, "num_minibatches": 2} | options
        self.stage = tiny.stage(
            algorithm,
            sharing,
            settings=settings,
            mesh={"data": -1},
            rollout={"devices": devices, "slots": 4, "steps_per_call": 5},
            optimizer={"learning_rate": rate},
        )
        whole = make_mesh(MeshConfig(data=-1), devices=jax.devices()[: 2 + devices])
        self.mesh, self.sampling = stage_meshes(self.stage, whole)
        self.programs = tiny.programs(self.stage, self.mesh)
        judge = Judge(
            RewardsConfig(function="unused:here", function_weight=0.5),
            {"unused:here": length},
            has_model=True,
        )
        self.collector = Collector(self.programs, judge, Numbers(), self.mesh, leaves_out=False)
        of_greedy = self.programs._replace(
            rollout=self.programs.greedy_rollout, score=self.programs.greedy_score
        )
        self.greedy_collector = Collector(of_greedy, judge, Numbers(), self.mesh, leaves_out=False)
        self.loader = Loader(examples("prompt_only"), 8, 0)
        self.elsewhere = tiny.programs(self.stage, self.sampling)

    def roles(self):
        """Returns (trained, frozen) anew: what is trained is donated."""
        return tiny.roles(self.stage.algorithm, self.mesh, self.stage.model.sharing)

    def batches(self, mesh):
        return PromptBatches(self.loader, mesh, self.stage.settings.group_size)

    def source(self, frozen):
        algorithm = ALGORITHMS[self.stage.algorithm]
        if not self.stage.rollout.devices:
            greedy = self.greedy_collector if algorithm.reads_greedy(self.stage.settings) else None
            batches = self.batches(self.mesh)
            return OnPolicy(self.programs, frozen, self.collector, batches, greedy=greedy)
        parts, model = role_parts(self.stage, algorithm), tiny.model(self.stage)
        base = {role: tree for role, tree in frozen.items() if role == "base"}
        at = {role: part_shardings(model, self.sampling, parts[role]) for role in ("policy", *base)}
        sampler = RolloutWorker(
            self.elsewhere.rollout, self.programs.to_decode, at, base, self.sampling, self.mesh
        )
        batches = self.batches(self.sampling)
        return Asynchronous(self.programs, frozen, self.collector, batches, sampler, ROOT, NUM_ITERATIONS)

    def train(self, directory, stop=None):
        """Returns the last state, on the host; one start of the program, which goes on where one ended."""
        run = RunConfig(dir=str(directory))
        stage = dataclasses.replace(self.stage, run=run, checkpoint=CheckpointConfig(every=100))
        with (
            Checkpointer(directory / stage.name / "checkpoints", keep=9) as checkpointer,
            MetricWriter(directory, stage.name, tensorboard=False) as writer,
        ):
            trained, frozen = self.roles()
            source = self.source(frozen)
            state, info, newest = self.programs.init_state(trained), {}, checkpointer.latest()
            if newest is not None:
                ahead = ahead_of(checkpointer.leaves(newest, "ahead"), self.mesh)
                state = checkpointer.restore(newest, state._replace(ahead=ahead))
                info = checkpointer.info(newest)
            writer.resume(0 if newest is None else newest + 1)

            def stopped_source(state, position, key):
                if int(state.step) + 1 == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return source(state, position, key)

            with StopSignals() as signals, signals.deferred():
                trainer = Trainer(
                    stage, self.programs, stopped_source, lambda *_: Evaluation({"eval/a": 1.0}, []), writer,
                    checkpointer, info, signals,
                )  # fmt: skip
                return jax.device_get(trainer.train(state, frozen, ROOT))


@functools.cache
def setting(*args, **options):
    return Setting(*args, **options)


def lines(directory):
    """Returns the metrics of every step that are no times."""
    read = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: x
            for name, x in line.items()
            if name not in ("stage", "time") and not name.startswith("perf/")
        }
        for line in read
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An asynchronous run that nothing interrupts, and its directory."""
    directory = tmp_path_factory.mktemp("whole")
    return setting(2).train(directory), directory


def by_hand(made):
    """Returns the last state of a loop that samples on the training devices in turn, and all metrics."""
    trained, frozen = made.roles()
    state, batches, told = made.programs.init_state(trained), made.batches(made.mesh), []

    def rollout(number):
        key = keys.named(keys.at_iteration(ROOT, number), "rollout")
        return made.programs.rollout(state.params, frozen, batches(8 * number).prompts, key)

    now = rollout(0)
    for number in range(NUM_ITERATIONS):
        following = rollout(number + 1)
        records = batches(8 * number).records
        scored = made.collector.judge(state.params, frozen, now, records, 0.0).scored
        batch, metrics = made.programs.advantages(scored, state.aux)
        told.append(metrics)
        key = keys.named(keys.at_iteration(ROOT, number), "update")
        state, _ = made.programs.update(state, frozen, batch, key)
        state, now = at_position(state, 8 * (number + 1)), following
    return state, told


@pytest.mark.slow
def test_each_rollout_is_of_the_policy_before_the_last_update(whole):
    state, told = by_hand(setting(2))
    same = [metrics["policy/importance"].value == pytest.approx(1, abs=1e-4) for metrics in told]
    assert same == [True, False, False, False]  # the first is on-policy
    assert tiny.relative_difference(whole[0].params, state.params) < 1e-5
    assert whole[0].position == state.position and whole[0].ahead is None


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["online_dpo", "raft"])
def test_what_is_chosen_of_samples_is_of_the_policy_before_the_last_update(algorithm, tmp_path):
    made = setting(2, algorithm=algorithm, group_size=2)
    found, (state, _) = made.train(tmp_path), by_hand(made)
    assert tiny.relative_difference(found.params, state.params) < 1e-5
    start = jax.device_get(made.roles()[0])
    assert tiny.relative_difference(found.params, start) > 0.01
    assert found.position == state.position and found.ahead is None


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, options", [("remax", {}), ("trpo", {}), ("raft", {"group_size": 2})])
def test_an_interrupted_run_on_policy_is_the_uninterrupted_one(algorithm, options, tmp_path):
    """Bit for bit: with greedy completions in each iteration, and where no optimiser steps the policy."""
    made, parted = setting(0, algorithm=algorithm, **options), tmp_path / "parted"
    expected = made.train(tmp_path / "whole")
    with pytest.raises(Stopped):
        made.train(parted, 2)
    state = made.train(parted)
    assert [x.tobytes() for x in jax.tree.leaves(state)] == [x.tobytes() for x in jax.tree.leaves(expected)]
    assert lines(parted) == lines(tmp_path / "whole")
    assert bool(jax.tree.leaves(state.opt_state.get("policy"))) == (algorithm != "trpo")


@pytest.mark.slow
def test_a_policy_that_does_not_move_is_trained_as_on_policy(tmp_path):
    found, expected = tmp_path / "asynchronous", tmp_path / "on_policy"
    setting(2, rate=0.0).train(found)
    setting(0, rate=0.0).train(expected)
    for line, of_expected in zip(lines(found), lines(expected), strict=True):
        importance = [line.pop(name, None) for name in ("policy/importance", "policy/importance_clip_frac")]
        assert importance in ([None, None], [pytest.approx(1, abs=1e-5), 0])
        assert line == pytest.approx(of_expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_is_the_uninterrupted_one(whole, tmp_path, stop):
    """Bit for bit: the rollout that was made ahead is saved with the state."""
    with pytest.raises(Stopped):
        setting(2).train(tmp_path, stop)
    with Checkpointer(tmp_path / "ppo" / "checkpoints", keep=9) as saved:
        assert saved.latest() == stop
        assert set(saved.leaves(stop, "ahead")) == {
            *("rows/tokens", "rows/prompt_lengths", "rows/lengths", "ended", "sampler_logprobs")
        }
    state = setting(2).train(tmp_path)
    expected, directory = whole
    assert [x.tobytes() for x in jax.tree.leaves(state)] == [x.tobytes() for x in jax.tree.leaves(expected)]
    assert lines(tmp_path) == lines(directory)
    assert [line["step"] for line in lines(tmp_path)] == list(range(NUM_ITERATIONS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["trunk", "hydra"])
def test_other_ways_of_sharing_sample_elsewhere_too(sharing):
    made = setting(2, sharing=sharing)
    trained, frozen = made.roles()
    source, state = made.source(frozen), made.programs.init_state(trained)
    batch = source(state, 0, keys.named(keys.at_iteration(ROOT, 0), "rollout"))
    ahead, _ = batch.meanwhile()
    prompts = PromptBatches(made.loader, made.mesh)(8).prompts
    key = keys.named(keys.at_iteration(ROOT, 1), "rollout")
    expected = made.programs.rollout(state.params, frozen, prompts, key)
    assert num_rows(ahead) == 8
    jax.tree.map(np.testing.assert_array_equal, ahead.rows, expected.rows)


@pytest.mark.parametrize(
    ("devices", "sizes", "problem"),
    [
        (8, {}, "rollout.devices is 8; it must be less than 8, the number of devices, of which the others"),
        (3, {"fsdp": 2}, "the other 5 of 8 devices must be a multiple of 2, the product of the mesh's sizes"),
    ],
)
def test_devices_that_cannot_be_set_aside(devices, sizes, problem):
    stage = tiny.stage("ppo", mesh={"data": -1} | sizes, rollout={"devices": devices})
    with pytest.raises(ValueError, match=problem):
        stage_meshes(stage, make_mesh(stage.mesh))


def test_devices_that_sample_have_rows_and_the_tensor_axis():
    stage = tiny.stage("ppo", mesh={"data": -1, "tensor": 2}, rollout={"devices": 4})
    meshes = stage_meshes(stage, make_mesh(stage.mesh))
    assert [dict(mesh.shape) | {"data": 2, "tensor": 2} == dict(mesh.shape) for mesh in meshes] == [True] * 2
    first, second = (set(mesh.devices.flat) for mesh in meshes)
    assert not first & second and first | second == set(jax.devices())
