"""The same chain in one and in several processes: figures, completions, files, and who scores what."""

import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from rlhf_jax import evaluate, train
from rlhf_jax.checkpoint import CheckpointReader
from tests.contract.test_devices import CHAIN, TOLERANCE, assert_close, figures
from tests.ranks import TRAIN, launch
from tests.recorded_rewards import FAILS, MESSAGE, RECORDS

pytestmark = pytest.mark.slow

REWARDS = 'function: "tests.recorded_rewards:vowels", function_weight: 0.5'
TEXT = CHAIN.replace("rewards: {{", f"rewards: {{{{{REWARDS}, ").replace("iterations: 4", "iterations: 3")
assert REWARDS in TEXT and "iterations: 3" in TEXT
OTHER_DATA = '{"prompt": "a b", "completion": "c d"}\n'
BATCHES = 3 + 3 * 2  # of prompts: three iterations, and three evaluations of two batches

# Processes, CPU devices of each, and the mesh over them.
SPLITS = {
    "two, which divide parameters": (2, 2, {"fsdp": 2, "tensor": 2}),
    "four, of which two hold the same rows": (4, 1, {"data": 2, "tensor": 2}),
}


class Run(NamedTuple):
    """A run of several processes, and the calls of the reward function: {process: rows of each call}."""

    directory: Path
    calls: dict[int, list[list[tuple[str, str]]]]


def start(directory, count, devices, text, flags=(), fails=""):
    """Runs the configuration in `directory` and returns how each process ended."""
    (directory / "calls").mkdir(exist_ok=True)
    (directory / "chain.yaml").write_text(text.format(dir=directory / "run"))
    env = {RECORDS: str(directory / "calls"), FAILS: fails}
    return launch(
        count, [*TRAIN, "--config", directory / "chain.yaml", *flags], devices=devices, env=env, timeout=1200
    )


def finished(directory, count, devices, mesh, text=TEXT):
    flags = [flag for axis, size in mesh.items() for flag in (f"--mesh.{axis}", str(size))]
    for result in start(directory, count, devices, text, flags):
        assert result.returncode == 0, result.stderr
    calls = {
        int(path.stem): [[tuple(row) for row in json.loads(line)] for line in path.open()]
        for path in (directory / "calls").iterdir()
    }
    return Run(directory / "run", calls)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("one"), 1, 4, {"data": 4})


@pytest.fixture(scope="module", params=SPLITS)
def several(request, one, tmp_path_factory):
    """Returns the same run in several processes; its PPO starts from the models that `one` saved."""
    text = TEXT.replace(
        "from: sft, reward_from: reward", f"from: {one.directory}/sft, reward_from: {one.directory}/reward"
    )
    return finished(tmp_path_factory.mktemp("several"), *SPLITS[request.param], text)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_figures(several, one, stage):
    assert_close(figures(several.directory, stage), figures(one.directory, stage))


def test_each_completion_is_scored_by_one_process(several, one):
    """Completions are those of one process: no draw of this seed falls on a tie."""
    (expected,) = one.calls.values()
    assert len(expected) == BATCHES and {len(rows) for rows in expected} == {16}
    assert {len(calls) for calls in several.calls.values()} == {BATCHES}
    for number, rows in enumerate(expected):
        scored = [calls[number] for calls in several.calls.values()]
        assert Counter(itertools.chain.from_iterable(scored)) == Counter(rows), number
        assert {len(part) for part in scored} == {len(rows) // len(scored)}


def test_the_lowest_process_scores_what_several_hold(several, request):
    count, _, mesh = SPLITS[request.node.callspec.params["several"]]
    parts = int(np.prod([mesh.get(axis, 1) for axis in ("data", "fsdp")]))
    assert sorted(several.calls) == list(range(0, count, max(count // parts, 1)))


def test_what_is_written_is_the_same(several, one):
    found, expected = (
        {
            str(path.relative_to(run.directory))
            for path in run.directory.rglob("*")
            if "/state/" not in str(path)
        }
        for run in (several, one)
    )
    assert found == expected
    found, expected = (json.loads((run.directory / "summary.json").read_text()) for run in (several, one))
    for stage, result in expected.items():
        timeless = {name: x for name, x in result.items() if name not in ("seconds", "time")}
        assert {name: found[stage][name] for name in timeless} == pytest.approx(timeless, rel=TOLERANCE)
    found, expected = (load_file(run.directory / "export" / "model.safetensors") for run in (several, one))
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=TOLERANCE * np.abs(tensor).max())
    for path in (one.directory / "samples").iterdir():
        found, expected = (
            [json.loads(line) for line in (run.directory / "samples" / path.name).open()]
            for run in (several, one)
        )
        for a, b in zip(found, expected, strict=True):
            assert (a["prompt"], a["completion"]) == (b["prompt"], b["completion"])
            assert (a["score"], a["gold"]) == pytest.approx((b["score"], b["gold"]), abs=TOLERANCE)


@pytest.mark.parametrize("first, second", [((2, 2), (1, 4)), ((1, 4), (2, 2))], ids=["two-one", "one-two"])
def test_what_one_number_of_processes_saved_another_goes_on_from(one, tmp_path, first, second):
    """The reward function fails on the last process in the second iteration: all end, the first is saved."""
    shutil.copytree(one.directory, tmp_path / "run")
    for name in ("ppo", "export"):
        shutil.rmtree(tmp_path / "run" / name)
    for result in start(tmp_path, *first, TEXT, fails=f"{first[0] - 1}:4"):
        assert result.returncode == 1 and MESSAGE in result.stderr, result
    assert CheckpointReader(tmp_path / "run" / "ppo" / "checkpoints").latest() == 1
    for result in start(tmp_path, *second, TEXT):
        assert result.returncode == 0, result.stderr
    assert_close(figures(tmp_path / "run", "ppo"), figures(one.directory, "ppo"))
    assert (tmp_path / "run" / "export").is_dir()


def test_where_the_parameters_lie_is_printed_once_and_as_by_one(tmp_path, capsys):
    tree = yaml.safe_load(TEXT.format(dir=""))
    tree["stages"] = tree["stages"][:1]
    for section in ("reward_model", "ppo", "rollout", "rewards"):
        del tree[section]
    tree["run"]["dir"] = "{dir}"
    flags = ["--print_sharding", "--mesh.data", "2", "--mesh.fsdp", "4"]
    first, second = start(tmp_path, 2, 4, yaml.safe_dump(tree, default_flow_style=False), flags)
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    assert not (tmp_path / "run").exists()
    assert train.main(["--config", str(tmp_path / "chain.yaml"), *flags]) == 0
    assert first.stdout == capsys.readouterr().out
    assert "trunk/embed/embedding" in first.stdout


def test_a_model_is_measured_by_two_processes_as_by_one(one):
    run = one.directory / "sft"
    flags = ["--data.max_eval_records", "30"]
    arguments = ["--model", run, "--data", "synthetic", "--batch_size", "8", *flags, "--json"]
    first, second = launch(2, ["-m", "rlhf_jax.evaluate", *arguments])
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    assert "perplexity" in first.stderr and "perplexity" not in second.stderr
    expected = evaluate.measure(str(run), "synthetic", 8, flags)
    found = json.loads(first.stdout)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    "text, said",
    [(OTHER_DATA, "models, records, their tokens or the flags are not the same"), ("", "own.jsonl")],
)
def test_records_that_one_process_alone_has_are_not_measured(one, tmp_path, text, said):
    """Process 1 reads others, or finds none."""
    run = one.directory / "sft"
    (tmp_path / "all.jsonl").write_text(OTHER_DATA * 8)
    if text:
        (tmp_path / "own.jsonl").write_text(text)
    own = [["--data", tmp_path / "all.jsonl"], ["--data", tmp_path / "own.jsonl"]]
    arguments = ["-m", "rlhf_jax.evaluate", "--model", run, "--batch_size", "2"]
    results = launch(2, arguments, devices=1, flags=own, timeout=60)
    assert [result.returncode for result in results] == [2, 2], results
    assert all(said in result.stderr for result in results)


def test_parts_on_two_processes(tmp_path):
    for result in launch(2, ["-m", "tests.contract.on_two_processes", tmp_path], env=dict(os.environ)):
        assert result.returncode == 0, result.stderr
