"""Which steps of a stage are traced, and that the trace is there and holds them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.config import RunConfig
from rlhf_jax.step_traces import StepTraces
from tests.unit.test_trainer import Run, new_state


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


def test_other_processes_write_where_all_are_to(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_jax.step_traces.is_first", lambda: False)
    for hosts, expected in (("first", []), ("all", [1])):
        with StepTraces(run_config(tmp_path, "1-1", profile_hosts=hosts), "sft") as traces:
            traces.begin(1, new_state())
            traces.end(1, new_state())
        assert traced(tmp_path) == expected
