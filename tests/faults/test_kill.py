"""Killing a run anywhere and repeating the command finishes it: each step is logged once, nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.smoke.test_quickstart import SHORT

pytestmark = pytest.mark.slow


def start(config):
    command = [sys.executable, "-m", "rlhf_jax.train", "--config", str(config), "--json"]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def logged(run):
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_kill_anywhere_and_repeat(tmp_path):
    """Kills after so many logged steps, at a random moment within the next one: evaluation, update, save."""
    run, config = tmp_path / "run", tmp_path / "short.yaml"
    config.write_text(SHORT.format(dir=run))
    rng = random.Random(0)
    kills = 0
    for target in (1, 4, 7, 8, 11, 13, 14, 16, 17):
        process = start(config)
        wait_for(lambda target=target: logged(run) >= target, process)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 6
    process = start(config)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["summary"].keys() == {"sft", "reward", "ppo"}
    counts = Counter(
        (r["stage"], r["step"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    )
    expected = (
        {("sft", s) for s in range(7)} | {("reward", s) for s in range(6)} | {("ppo", s) for s in range(5)}
    )
    assert counts == Counter(expected)
    assert not [
        path for path in run.rglob("*") if path.suffix == ".tmp" or "orbax-checkpoint-tmp" in path.name
    ]
    assert os.path.exists(run / "export" / "model.safetensors")


def test_kill_before_the_first_step_and_repeat(tmp_path):
    """At random moments of the start, and as soon as each file of it appears, half-written ones too."""
    run, config = tmp_path / "run", tmp_path / "short.yaml"
    config.write_text(SHORT.format(dir=run))
    rng = random.Random(1)
    moments = [lambda: run.exists() and any(run.iterdir()), lambda: any(run.glob("*tokenizer*/*"))]
    for moment in [*moments, *(3 * [lambda: False])]:
        process = start(config)
        deadline = time.monotonic() + (60 if moment in moments else rng.uniform(0.2, 8))
        while process.poll() is None and not moment() and not logged(run) and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert process.poll() is None, "it was over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(config)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    steps = [
        (r["stage"], r["step"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]
    assert len(steps) == len(set(steps)) == 7 + 6 + 5
