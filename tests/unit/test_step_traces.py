"""Which steps of a stage are traced, and that the trace is there and holds them."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.config import RunConfig
from rlhf_jax.step_traces import StepTraces
from tests.unit.test_trainer import Clock, Run, new_state


def run_config(directory, steps, **options):
    return RunConfig(dir=str(directory), profile_steps=steps, **options)


def traced(directory, stage="sft"):
    """Returns the numbers of the steps that a stage's newest trace holds."""
    files = list((directory / "profile" / stage).rglob("*.xplane.pb"))
    if not files:
        return []
    (file,) = files
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    return [dict(event.stats)["step_num"] for event in events if event.name == "step"]


def test_the_traced_steps_are_those_that_are_named():
    run = run_config("run", "10-12", profile_stage="ppo")
    assert list(run.profiled_steps("ppo")) == [10, 11, 12]
    assert not run.profiled_steps("sft") and not RunConfig(dir="run").profiled_steps("sft")
    assert list(run_config("run", "3-3").profiled_steps("sft")) == [3]


def test_a_stage_writes_the_trace_of_its_steps(tmp_path):
    run = Run(tmp_path, num_steps=5)
    run.stage = dataclasses.replace(run.stage, run=run_config(tmp_path, "2-3"))
    run.train()
    assert traced(tmp_path) == [2, 3]
    assert [path.name for path in (tmp_path / "profile" / "sft" / "plugins" / "profile").iterdir()] == [
        "steps_2-3"
    ]


@pytest.mark.parametrize("first, expected", [(3, [3, 4]), (5, [])], ids=["in the middle", "behind them"])
def test_a_run_that_goes_on_traces_the_rest(tmp_path, first, expected):
    state = new_state()
    with StepTraces(run_config(tmp_path, "2-4"), "sft") as traces:
        for step in range(first, 7):
            traces.begin(step, state)
            traces.end(step, state)
    assert traced(tmp_path) == expected


def test_what_an_error_ends_is_written(tmp_path):
    def fail():
        with StepTraces(run_config(tmp_path, "1-9"), "sft") as traces:
            traces.begin(1, new_state())
            jnp.ones(3).block_until_ready()
            traces.end(1, new_state())
            traces.begin(2, new_state())
            raise KeyError("step 2")

    with pytest.raises(KeyError):
        fail()
    assert traced(tmp_path)[:1] == [1]
    with StepTraces(run_config(tmp_path / "next", "1-1"), "sft") as traces:  # and nothing is left open
        traces.begin(1, new_state())
        traces.end(1, new_state())


def test_one_process_of_each_host_writes_where_all_hosts_are_to(tmp_path, monkeypatch):
    """Two of a host would write the same file."""
    monkeypatch.setattr("rlhf_jax.step_traces.is_first", lambda: False)
    monkeypatch.setattr("rlhf_jax.step_traces.exchanged", lambda host: ["a", "b", "b", "a"])
    for rank, hosts, expected in ((1, "first", []), (2, "all", []), (3, "all", []), (1, "all", [1])):
        monkeypatch.setattr("rlhf_jax.step_traces.process_id", lambda rank=rank: rank)
        with StepTraces(run_config(tmp_path, "1-1", profile_hosts=hosts), "sft") as traces:
            traces.begin(1, new_state())
            traces.end(1, new_state())
        assert traced(tmp_path) == expected


def test_a_run_that_goes_on_leaves_the_trace_of_the_steps_before(tmp_path):
    for steps in ((2, 3), (4,)):
        with StepTraces(run_config(tmp_path, "2-4"), "sft") as traces:
            for step in steps:
                traces.begin(step, new_state())
                traces.end(step, new_state())
    assert sorted(path.parent.name for path in tmp_path.rglob("*.xplane.pb")) == ["steps_2-4", "steps_4-4"]


@pytest.mark.parametrize("step", [2, 3], ids=["when it begins", "when it ends"])
def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path, caplog, step):
    """A file is where its directory is to be."""

    class Full(Run):
        def update(self, state, frozen, number, key):
            if number == step - 1:
                shutil.rmtree(tmp_path / "profile", ignore_errors=True)
                (tmp_path / "profile").write_text("")
            return super().update(state, frozen, number, key)

    run = Full(tmp_path, num_steps=5)
    run.stage = dataclasses.replace(run.stage, run=run_config(tmp_path, "2-3"))
    run.train()
    assert [line["step"] for line in run.lines()] == list(range(6))
    (told,) = [r.getMessage() for r in caplog.records if "trace" in r.getMessage()]
    assert told.startswith(f"stage sft: there is no trace of its steps in {tmp_path / 'profile' / 'sft'}: ")


def test_starting_and_writing_a_trace_is_no_part_of_a_step(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("rlhf_jax.trainer.time", clock)

    def wait(*unused, **options):
        clock.now += 10

    monkeypatch.setattr(jax.profiler, "start_trace", wait)
    monkeypatch.setattr(jax.profiler, "stop_trace", wait)
    run = Run(tmp_path, num_steps=4)
    run.stage = dataclasses.replace(run.stage, run=run_config(tmp_path, "2-3"))
    run.train()
    assert clock.now == 1020
    assert [line["perf/step_seconds"] for line in run.lines()[1:]] == [0, 0, 0, 0]
