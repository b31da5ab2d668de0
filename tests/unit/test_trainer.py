"""The loop with an update that is told what to do: skipped updates, resuming, keys, alarms."""

import dataclasses
import json
import logging
import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Max, Mean, TrainState
from rlhf_jax.checkpoint import Checkpointer
from rlhf_jax.config import CheckpointConfig, RunConfig
from rlhf_jax.evaluation import Evaluation
from rlhf_jax.metrics import MetricWriter
from rlhf_jax.rewards.functions import RewardError
from rlhf_jax.stop_signals import Stopped, StopSignals
from rlhf_jax.trainer import NextBatch, NotFiniteError, Trainer
from tests import tiny


def new_state(step=0, w=0.0):
    return TrainState(
        step=jnp.int32(step),
        position=jnp.int32(4 * step),
        params={"policy": {"w": jnp.float32(w)}},
        opt_state={},
        aux={},
    )


class Run:
    """A stage in a directory; each `train` is one start of the program."""

    utilization = staticmethod(lambda found: {})

    def __init__(self, directory, bad_steps=(), num_steps=9, most_skipped=3, every=2, eval_every=100):
        stage = tiny.stage("sft", settings={"num_steps": num_steps, "eval_every": eval_every})
        run = RunConfig(dir=str(directory), max_skipped_updates=most_skipped)
        self.stage = stage.__class__(
            **vars(stage) | {"run": run, "checkpoint": CheckpointConfig(every=every, keep=9)}
        )
        self.directory = directory
        self.bad_steps = set(bad_steps)
        self.keys, self.positions, self.evaluations = [], [], []

    def train(self):
        with (
            Checkpointer(self.directory / "sft" / "checkpoints", keep=9) as checkpointer,
            MetricWriter(self.directory, "sft", tensorboard=False) as writer,
        ):
            newest = checkpointer.latest()
            state, info = new_state(), {}
            if newest is not None:
                state, info = checkpointer.restore(newest, state), checkpointer.info(newest)
            writer.resume(0 if newest is None else newest + 1)
            programs = SimpleNamespace(update=self.update)
            with StopSignals() as signals:
                self.trainer = Trainer(
                    self.stage,
                    programs,
                    self.source,
                    self.evaluate,
                    writer,
                    checkpointer,
                    info,
                    signals,
                    self.utilization,
                )
                with signals.deferred():
                    state = self.trainer.train(state, {}, jax.random.key(0))
            return state

    def source(self, state, position, key):
        self.keys.append(key)
        self.positions.append(position)
        return NextBatch(int(state.step) + 1, position + 4, {"perf/tokens": 1.0})

    def update(self, state, frozen, step, key):
        """w counts the updates that were made."""
        self.keys.append(key)
        is_bad = step in self.bad_steps
        params = {"policy": {"w": state.params["policy"]["w"] + (not is_bad)}}
        one = jnp.float32(1)
        metrics = {
            "loss/nll": Mean(one, one),
            "not_finite/loss/nll": Max(0 * one),
            "not_finite/policy/grad_norm": Max(jnp.float32(is_bad)),
            "update/skipped": Mean(jnp.float32(is_bad), one),
        }
        return state._replace(step=state.step + 1, params=params), metrics

    def evaluate(self, params, frozen):
        self.evaluations.append(float(params["policy"]["w"]))
        return Evaluation({"eval/w": self.evaluations[-1]}, [])

    def saved(self):
        """Returns {step: w} of the checkpoints."""
        with Checkpointer(self.directory / "sft" / "checkpoints", keep=9) as reader:
            steps = sorted(int(path.name) for path in reader.directory.iterdir())
            return {step: float(reader.restore(step, new_state()).params["policy"]["w"]) for step in steps}

    def lines(self):
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


def test_the_host_works_before_it_waits_for_the_update(tmp_path, monkeypatch):
    """What the next batch can have is made and the last step's line is written, and then only is waited."""
    events = []

    class Online(Run):
        def source(self, state, position, key):
            events.append(f"source {position}")
            made = super().source(state, position, key)
            return made._replace(meanwhile=lambda: events.append(f"prompts {made.position}") or (None, {}))

        def update(self, state, frozen, step, key):
            events.append(f"update {step}")
            return super().update(state, frozen, step, key)

    write = MetricWriter.write
    monkeypatch.setattr(MetricWriter, "write", lambda *args: events.append(f"line {args[1]}") or write(*args))
    monkeypatch.setattr(jax, "block_until_ready", lambda state: events.append(f"wait {int(state.step)}"))
    run = Online(tmp_path, num_steps=3)
    run.train()
    assert events[1:-2] == [  # between an evaluation before the first step and one after the last
        *("source 0", "update 1", "prompts 4", "wait 1"),
        *("source 4", "update 2", "prompts 8", "line 1", "wait 2", "wait 2", "line 2"),  # and saves
        *("source 8", "update 3", "prompts 12", "wait 3"),
    ]
    assert all("perf/update_seconds" in line for line in run.lines()[1:])


def test_too_many_bad_updates_in_a_row_stop_the_run(tmp_path):
    run = Run(tmp_path, bad_steps=range(5, 10), most_skipped=3)
    with pytest.raises(NotFiniteError, match=r"stage sft, step 7: .* 3 steps in a row.*policy/grad_norm"):
        run.train()
    assert [line["step"] for line in run.lines()] == list(range(8))
    assert [line.get("update/skipped", 0) for line in run.lines()] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert not any(name.startswith("not_finite/") for line in run.lines() for name in line)
    assert run.saved() == {2: 2, 4: 4, 6: 4}  # whole, and with the parameters from before


def test_a_good_update_in_between_starts_the_count_anew(tmp_path):
    run = Run(tmp_path, bad_steps=[2, 3, 5, 6, 8, 9], most_skipped=3)
    assert float(run.train().params["policy"]["w"]) == 3


def test_one_bad_update_stops_a_run_that_allows_none(tmp_path):
    with pytest.raises(NotFiniteError, match="step 4"):
        Run(tmp_path, bad_steps=[4], most_skipped=1).train()


def test_a_resumed_run_counts_on(tmp_path):
    """Otherwise the same command would never stop where its checkpoints come more often than its stops."""
    with pytest.raises(NotFiniteError, match="step 7"):
        Run(tmp_path, bad_steps=range(5, 10), most_skipped=3).train()
    again = Run(tmp_path, bad_steps=range(5, 10), most_skipped=3)
    with pytest.raises(NotFiniteError, match="step 7: .* 3 steps in a row"):
        again.train()
    assert again.positions[0] == 24
    mended = Run(tmp_path, most_skipped=3)
    assert float(mended.train().params["policy"]["w"]) == 7
    assert [line["step"] for line in mended.lines()] == list(range(10))


def test_a_skipped_update_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Run(tmp_path, bad_steps=[4]).train()
    assert [r.getMessage() for r in caplog.records if "step 4" in r.getMessage()]


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    """Keys, positions, lines, evaluations; the program dies while it makes the batch after step `stop`."""
    whole = Run(tmp_path / "whole", eval_every=3)
    whole.train()

    class Dies(Run):
        def source(self, state, position, key):
            if int(state.step) == stop:
                raise KeyboardInterrupt
            return super().source(state, position, key)

    with pytest.raises(KeyboardInterrupt):
        Dies(tmp_path / "parted", eval_every=3).train()
    second = Run(tmp_path / "parted", eval_every=3)
    end = second.train()
    assert float(end.params["policy"]["w"]) == 9 and int(end.position) == 36
    start = stop // 2 * 2  # the newest checkpoint
    assert second.positions == [4 * step for step in range(start, 9)]
    expected = whole.keys[2 * start :]
    assert [jax.random.key_data(key).tolist() for key in second.keys] == [
        jax.random.key_data(key).tolist() for key in expected
    ]

    def told(run):
        return [(line["step"], line.get("eval/w")) for line in run.lines()]

    assert told(second) == told(whole)
    assert second.trainer.info["before"] == whole.trainer.info["before"] | {
        "perf/eval_seconds": second.trainer.info["before"]["perf/eval_seconds"]
    }
    assert second.trainer.info["after"]["eval/w"] == 9


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_loses_nothing(tmp_path, signum):
    class Signalled(Run):
        def source(self, state, position, key):
            if int(state.step) == 4:
                os.kill(os.getpid(), signum)
            return super().source(state, position, key)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stopped:
        Signalled(tmp_path, every=100).train()
    assert stopped.value.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = Run(tmp_path, every=100)
    assert run.saved() == {5: 5}
    assert [line["step"] for line in run.lines()] == [0, 1, 2, 3, 4, 5]
    run.train()
    assert run.positions == [20, 24, 28, 32]
    assert [line["step"] for line in run.lines()] == list(range(10))


def test_a_signal_does_not_wait_for_an_evaluation_and_loses_none(tmp_path):
    class Signalled(Run):
        def source(self, state, position, key):
            if int(state.step) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().source(state, position, key)

    run = Signalled(tmp_path, every=100, eval_every=3)
    with pytest.raises(Stopped):
        run.train()
    assert run.evaluations == [0]
    again = Run(tmp_path, every=100, eval_every=3)
    again.train()
    assert again.evaluations == [3, 6, 9]
    assert [line.get("eval/w") for line in again.lines()] == [0, None, None, 3, None, None, 6, None, None, 9]


def test_a_signal_in_the_last_evaluation_lets_the_stage_end_and_stops_then(tmp_path):
    """Its last checkpoint is the stage's to save, with the normaliser."""

    class Signalled(Run):
        def evaluate(self, params, frozen):
            if float(params["policy"]["w"]) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().evaluate(params, frozen)

    run = Signalled(tmp_path, every=100)
    with pytest.raises(Stopped):
        run.train()
    assert run.evaluations == [0, 9]
    assert run.lines()[-1]["eval/w"] == 9


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            signals.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once(tmp_path):
    class Impatient(Run):
        def source(self, state, position, key):
            if int(state.step) == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().source(state, position, key)

    run = Impatient(tmp_path, every=100)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run.train()
    assert not isinstance(stopped.value, Stopped)
    assert len(run.positions) == 4


@pytest.mark.parametrize("at", [6, 9])
def test_an_evaluation_that_failed_is_made_good(tmp_path, at):
    """Of the last step or another: its figures join the step's line when the command is repeated."""

    class Failing(Run):
        def evaluate(self, params, frozen):
            if float(params["policy"]["w"]) == at:
                raise RewardError("the judge is out")
            return super().evaluate(params, frozen)

    with pytest.raises(RewardError):
        Failing(tmp_path, every=100, eval_every=3).train()
    run = Run(tmp_path, every=100, eval_every=3)
    run.train()
    by_step = {line["step"]: line.get("eval/w") for line in run.lines()}
    assert [by_step[step] for step in range(10)] == [0, None, None, 3, None, None, 6, None, None, 9]
    assert all("loss/nll" in line for line in run.lines()[1:])


def test_evaluations_and_saves_have_their_periods(tmp_path):
    run = Run(tmp_path, num_steps=7, every=3, eval_every=2)
    run.train()
    assert run.evaluations == [0, 2, 4, 6, 7]
    assert sorted(run.saved()) == [3, 6]  # the last step's is the stage's to save, with the normaliser
    by_step = {line["step"]: line.get("eval/w") for line in run.lines()}
    assert by_step == {0: 0, 1: None, 2: 2, 3: None, 4: 4, 5: None, 6: 6, 7: 7}


def test_each_iteration_and_each_use_has_its_own_key(tmp_path):
    run = Run(tmp_path)
    run.train()
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in run.keys}
    assert len(run.keys) == len(data) == 18


def test_a_run_that_is_done_makes_no_update(tmp_path):
    run = Run(tmp_path, num_steps=4, every=1)
    end = run.train()
    with Checkpointer(tmp_path / "sft" / "checkpoints", keep=9) as checkpointer:
        checkpointer.save(4, end, run.trainer.info)
    again = Run(tmp_path, num_steps=4, every=1)
    again.train()
    assert again.keys == []
    assert [line["step"] for line in again.lines()] == [0, 1, 2, 3, 4]


class PPORun(Run):
    """Its updates report what is given as the ratio's gap before the first step."""

    def __init__(self, directory, gaps):
        super().__init__(directory, num_steps=len(gaps))
        settings = {"num_iterations": len(gaps), "eval_every": 100}
        self.stage = dataclasses.replace(tiny.stage("ppo", settings=settings), run=self.stage.run)
        self.gaps = gaps

    def update(self, state, frozen, step, key):
        state, metrics = super().update(state, frozen, step, key)
        figures = dict.fromkeys(ALGORITHMS["ppo"].figures, 1.0)
        return state, metrics | figures | {"policy/ratio_gap_first": Max(jnp.float32(self.gaps[step - 1]))}


def test_a_first_ratio_that_is_not_one_is_told(tmp_path, caplog):
    """NUMERICS 11: an alarm above 0.05."""
    with caplog.at_level(logging.WARNING):
        PPORun(tmp_path, gaps=[0.01, 0.049, 0.06, 0.0]).train()
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("rlhf_jax")]
    assert "step 3: policy/ratio_gap_first is 0.06, above 0.05" in told


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda directory: Run(directory, num_steps=2), [None, None, None]),  # a reward model's own score
        (lambda directory: PPORun(directory, gaps=[0.0, 0.0]), [0, None, 0]),
    ],
)
def test_the_score_of_the_reference_is_told_where_a_policy_is_scored(tmp_path, make, told):
    run = make(tmp_path)
    run.evaluate = lambda params, frozen: Evaluation({"eval/score": float(params["policy"]["w"])}, [])
    run.train()
    assert [line.get("eval/ref_score") for line in run.lines()] == told


class Compiling(Run):
    """Compiles a program in some updates; batches are wider from some step on."""

    def __init__(self, directory, steps, wider_from=100):
        super().__init__(directory, num_steps=9, eval_every=4)
        self.steps, self.wider_from = steps, wider_from

    def source(self, state, position, key):
        batch = super().source(state, position, key)
        return batch._replace(batch=np.full(1 + (batch.batch >= self.wider_from), batch.batch))

    def update(self, state, frozen, batch, key):
        step = int(batch[0])
        if step in self.steps:
            jax.jit(lambda x: x + step)(1.0)
        return super().update(state, frozen, step, key)


def test_what_is_compiled_again_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        Compiling(tmp_path, steps=[1, 2, 4, 7]).train()
    told = [r.getMessage() for r in caplog.records if "compiled" in r.getMessage()]

    assert [message.partition(":")[0] for message in told] == ["stage sft, step 4", "stage sft, step 7"]


def test_a_batch_of_a_new_shape_may_be_compiled_for(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = Compiling(tmp_path, steps=[1, 6, 7, 9], wider_from=6)
        run.train()
    told = [r.getMessage() for r in caplog.records if "compiled" in r.getMessage()]
    assert [message.partition(":")[0] for message in told] == ["stage sft, step 9"]
    assert [line["perf/compilations"] for line in run.lines()[6:]] == [1, 1, 0, 1]


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    time = perf_counter


def test_goodput_is_the_share_of_the_time_in_steps_that_last(tmp_path, monkeypatch):
    """Of 137 seconds six steps took one each; of the rest evaluations are 20, saves 10, a step that was lost
    is 1, and 100 passed until the run went on.
    """
    clock, compiled = Clock(), [0.0]
    monkeypatch.setattr("rlhf_jax.trainer.time", clock)
    monkeypatch.setattr("rlhf_jax.trainer.compilations.seconds", lambda: compiled[0])
    save = Checkpointer.save

    def slow_save(*args):
        clock.now += 5
        save(*args)

    monkeypatch.setattr(Checkpointer, "save", slow_save)

    class Clocked(Run):
        has_failed = False

        def update(self, state, frozen, step, key):
            clock.now += 1
            if step == 5 and not self.has_failed:
                self.has_failed = True
                raise KeyError("lost")
            return super().update(state, frozen, step, key)

        def evaluate(self, params, frozen):
            clock.now += 10
            compiled[0] += 4  # is part of the evaluation
            return super().evaluate(params, frozen)

    run = Clocked(tmp_path, num_steps=6)
    with pytest.raises(KeyError):
        run.train()
    clock.now += 100
    run.train()
    assert run.trainer.times() == {"goodput": 6 / 137, "in_steps": 6, "since_begun": 137}
    assert run.lines()[-1]["perf/goodput"] == 6 / 137
    assert sum(line.get("perf/step_seconds", 0) for line in run.lines()) == 6


def test_goodput_is_at_most_one_where_a_clock_was_set_back(tmp_path):
    run = Run(tmp_path, num_steps=1)
    run.train()
    run.trainer.info |= {"begun": time.time() + 100, "in_steps": 5.0}
    assert run.trainer.times()["goodput"] == 1


def test_what_a_step_compiles_is_no_part_of_goodput(tmp_path, monkeypatch):
    clock, compiled = Clock(), [0.0]
    monkeypatch.setattr("rlhf_jax.trainer.time", clock)
    monkeypatch.setattr("rlhf_jax.trainer.compilations.seconds", lambda: compiled[0])

    class Compiling(Run):
        def update(self, state, frozen, step, key):
            clock.now += 1 + 7 * (step == 1)
            compiled[0] += 7 * (step == 1)
            return super().update(state, frozen, step, key)

    run = Compiling(tmp_path, num_steps=4)
    run.train()
    assert run.trainer.times() == {"goodput": 4 / 11, "in_steps": 4, "since_begun": 11}


def test_figures_of_use_are_told_with_the_other_metrics_of_a_step(tmp_path):
    run = Run(tmp_path, num_steps=2)
    run.utilization = lambda found: {"perf/mfu": found["perf/step_seconds"] + found["perf/tokens"]}
    run.train()
    assert [line["perf/mfu"] - line["perf/step_seconds"] for line in run.lines()[1:]] == [1.0, 1.0]


def test_every_online_step_has_the_seconds_of_its_own_batch_and_update(tmp_path, monkeypatch):
    """Though its line is written at once where it is saved or evaluated, else behind the next rollout."""
    clock, compiled = Clock(), [0.0]
    monkeypatch.setattr("rlhf_jax.trainer.time", clock)
    monkeypatch.setattr("rlhf_jax.trainer.compilations.seconds", lambda: compiled[0])

    class Online(Run):
        def source(self, state, position, key):
            clock.now += 3
            compiled[0] += 2
            return super().source(state, position, key)._replace(meanwhile=lambda: (None, {}))

        def update(self, state, frozen, step, key):
            clock.now += 1
            return super().update(state, frozen, step, key)

        def evaluate(self, params, frozen):
            clock.now += 10
            return super().evaluate(params, frozen)

    run = Online(tmp_path, num_steps=6, every=2, eval_every=5)
    run.train()
    assert [line["perf/step_seconds"] for line in run.lines()[1:]] == [4] * 6
    assert run.trainer.info["in_steps"] == 6 * 2
