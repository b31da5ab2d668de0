"""A run that was killed in the middle of each stage and repeated is the run that was never interrupted."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.checkpoint import CheckpointReader
from tests.conftest import ROOT
from tests.smoke.test_quickstart import SHORT

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
LAST = {"sft": 6, "reward": 5, "ppo": 6}  # steps
KILLS = (("sft", 5), ("reward", 3), ("ppo", 5))

# Counts what lies on the devices of SFT, which has no frozen models, as it begins to read a state.
ALONE = """
import os, signal, sys
import jax
from rlhf_jax import checkpoint, metrics, train

restore = checkpoint.Checkpointer.restore

def restore_alone(self, step, saved):
    if self.directory.parent.name == "sft":
        held, wanted = (
            sum(x.size * x.dtype.itemsize for x in of) for of in (jax.live_arrays(), jax.tree.leaves(saved))
        )
        assert held < 0.05 * wanted, f"{held} bytes beside a state of {wanted}"
    return restore(self, step, saved)

checkpoint.Checkpointer.restore = restore_alone
"""
# The program, and the program which kills itself as it has written the line of a step.
WHOLE = "sys.exit(train.main(sys.argv[1:]))"
KILLED = """
stage, step = sys.argv[1], int(sys.argv[2])
write = metrics.MetricWriter.write

def write_and_die(self, at, found):
    write(self, at, found)
    if (self.stage, at) == (stage, step):
        os.kill(os.getpid(), signal.SIGKILL)

metrics.MetricWriter.write = write_and_die
sys.exit(train.main(sys.argv[3:]))
"""


def start(directory, *kill):
    """Runs the command in a process of its own, to its end or its death; a state is read where none lies."""
    config = directory / "short.yaml"
    text = SHORT.format(dir=directory / "run").replace(
        "ppo: {num_iterations: 4,",
        "ppo: {num_iterations: 6, kl_controller: adaptive, kl_target: 0.5, kl_horizon: 20, ptx_coef: 0.5, "
        "ptx_from: sft,",
    )
    assert "adaptive" in text
    config.write_text(text)
    program = [ALONE + KILLED, *map(str, kill)] if kill else [ALONE + WHOLE]
    return subprocess.run(
        [sys.executable, "-c", *program, "--config", str(config)],
        cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns (the uninterrupted run, the one that was killed again and again)."""
    whole, parted = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parted")
    done = start(whole)
    assert done.returncode == 0, done.stderr
    for stage, step in KILLS:
        died = start(parted, stage, step)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (parted / "run" / stage / "result.json").exists()
    done = start(parted)
    assert done.returncode == 0, done.stderr
    return whole / "run", parted / "run"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_the_same(runs):
    whole, parted = map(lines, runs)
    assert [(line["stage"], line["step"]) for line in parted] == [
        (stage, step) for stage, last in LAST.items() for step in range(last + 1)
    ]
    assert all(("loss/ptx" in line) == (line["stage"] == "ppo" and line["step"] > 0) for line in whole)
    for found, expected in zip(parted, whole, strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() - {"stage", "time"}:
            if not name.startswith("perf/") or name == "perf/tokens":
                where = (expected["stage"], expected["step"], name)
                assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=1e-8), where


def test_the_summary_is_the_same(runs):
    whole, parted = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert parted.keys() == whole.keys()
    for stage, expected in whole.items():
        timeless = {name: x for name, x in expected.items() if name not in ("seconds", "time")}
        found = {name: x for name, x in parted[stage].items() if name not in ("seconds", "time")}
        assert found == pytest.approx(timeless, rel=TOLERANCE), stage


@pytest.mark.parametrize("stage", LAST)
def test_the_last_checkpoint_is_the_same(runs, stage):
    whole, parted = (CheckpointReader(run / stage / "checkpoints") for run in runs)
    step = LAST[stage]
    assert parted.latest() == whole.latest() == step
    for prefix in ("params", "opt_state", "aux"):
        expected, found = whole.leaves(step, prefix), parted.leaves(step, prefix)
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            gap = np.linalg.norm(np.float64(found[name]) - leaf)
            assert gap <= TOLERANCE * max(np.linalg.norm(leaf), 1e-12), (prefix, name)
    scalar = jax.device_put(jnp.int32(0), jax.devices()[0])
    for name in ("step", "position"):
        expected, found = (int(reader.restore_subtree(step, name, scalar)) for reader in (whole, parted))
        assert found == expected > 0


def test_the_kl_weight_has_moved_and_is_the_same(runs):
    whole, parted = (
        [line["policy/kl_coef"] for line in lines(run) if line["stage"] == "ppo" and line["step"] > 0]
        for run in runs
    )
    assert len(set(whole)) == 6 and whole[0] == pytest.approx(0.05)
    assert parted == pytest.approx(whole, rel=TOLERANCE)
    saved = [CheckpointReader(run / "ppo" / "checkpoints").leaves(6, "aux")["kl_coef"] for run in runs]
    assert float(saved[0]) == pytest.approx(float(saved[1]), rel=TOLERANCE)
    assert float(saved[0]) != pytest.approx(whole[-1], rel=1e-3)  # already that of the next iteration


def test_exports_and_samples_are_the_same(runs):
    whole, parted = (load_file(run / "export" / "model.safetensors") for run in runs)
    assert parted.keys() == whole.keys()
    for name, expected in whole.items():
        np.testing.assert_allclose(parted[name], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    names = [sorted(path.name for path in (run / "samples").iterdir()) for run in runs]
    assert names[0] == names[1]
    for name in names[0]:
        rows = [[json.loads(line) for line in (run / "samples" / name).open()] for run in runs]
        assert [row["completion"] for row in rows[0]] == [row["completion"] for row in rows[1]]
