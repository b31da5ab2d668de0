"""`python -m rlhf_jax.preflight`: stages compiled for slices that are not there, and whether they fit."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import pytest

from rlhf_jax import preflight
from tests.conftest import ROOT

pytest.importorskip("libtpu")
QUICKSTART = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--run.dir", "unused"]
HYDRA = ["--config", str(ROOT / "configs" / "quickstart_hydra.yaml"), "--run.dir", "unused"]
MESHES = ("--mesh.data 1 --mesh.fsdp 4", "--mesh.data 2 --mesh.tensor 2")
LARGE = [
    *("--model.hidden_size", "8192", "--model.num_heads", "64", "--model.num_kv_heads", "8"),
    *("--model.mlp_size", "32768", "--model.num_layers", "2"),
]
"""A model of two billion parameters."""


@cache
def run(*flags: str) -> tuple[int, dict]:
    """Returns the exit code, and what --json prints."""
    with contextlib.redirect_stdout(out := io.StringIO()):
        code = preflight.main([*flags, "--json"])
    return code, json.loads(out.getvalue()) if code != 2 else {}


def test_a_program_fits_and_says_what_it_sends():
    flags = ("--topology", "v5e:2x2", "--stage", "sft", "--programs", "evaluate", "--mesh.data", "1")
    code, found = run(*QUICKSTART, *flags, "--mesh.fsdp", "4")
    assert (code, found["fits"], found["accelerator_type"], found["hosts"]) == (0, True, "v5litepod-4", 1)
    stage = found["stages"]["sft"]
    assert stage["mesh"] == {"fsdp": 4} and list(stage["programs"]) == ["evaluate"]
    evaluate = stage["programs"]["evaluate"]
    parts = ("resident", "arguments", "outputs", "temporaries", "code")
    assert evaluate["peak_bytes"] == sum(evaluate[f"{part}_bytes"] for part in parts)
    assert evaluate["resident_bytes"] == sum(stage["resident_bytes"].values())
    gathers = [one for one in evaluate["collectives"] if one["kind"] == "all-gather"]
    assert gathers and all(one["axes"] == ["fsdp"] and one["chips"] == 4 for one in evaluate["collectives"])
    assert max(one["count"] for one in gathers) % 2 == 0  # of two layers
    assert stage["phases"]["update"]["bound"] in ("matrix", "memory", "network")


def test_what_is_too_large_is_refused_and_told(capsys: pytest.CaptureFixture[str]):
    """Two billion parameters with Adam on one chip: 12 bytes each, whatever its programs need besides."""
    flags = ("--topology", "v5e:1x1", "--stage", "ppo", "--programs", "advantages")
    assert preflight.main([*QUICKSTART, *LARGE, *flags]) == preflight.DOES_NOT_FIT
    said = capsys.readouterr().out
    assert "does not fit: advantages needs" in said
    assert "GiB too many; the largest parts: optimizer" in said
    assert "Divide it by more chips (mesh.fsdp, mesh.tensor)" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e:2x2x2"], "has 2 dimensions"),
        (["--topology", "v5e:2x2", "--stage", "sfd"], "did you mean 'sft'"),
        (["--topology", "v5e:2x2", "--mesh.fsdp", "8"], "does not fit the number of devices, 4"),
        (["--topology", "v5e:2x2", "--ppo.clip", "1"], "did you mean"),
        (["--topology", "v5e:2x2", "--slices", "2"], "set mesh.slice to 2"),
        (
            ["--topology", "v5e:2x2", "--data.max_prompt_length", "100"],
            "must be at most model.context_length = 128",
        ),
        (["--topology", "v5e:2x2", "--suggest", "--programs", "update"], "--programs would be ignored"),
        (["--topology", "v5e:2x2", "--compiles", "3"], "--compiles would be ignored"),
        (["--topology", "v5e:4x4", "--rollout.devices", "4"], "4 hosts, and weights are copied"),
    ],
)
def test_a_configuration_that_is_none_for_the_slice(
    flags: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert preflight.main([*QUICKSTART, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, topology, mesh",
    [
        *((QUICKSTART, topology, mesh) for topology in ("v5e:2x2", "v5p:2x2x1") for mesh in MESHES),
        (HYDRA, "v5e:2x2", MESHES[1]),
    ],
)
def test_the_quickstart_compiles_for_a_tpu(config: Sequence[str], topology: str, mesh: str):
    code, found = run(*config, "--topology", topology, *mesh.split())
    assert code == 0
    assert list(found["stages"]) == ["sft", "reward", "ppo"]
    programs = found["stages"]["ppo"]["programs"]
    assert list(programs) == ["rollout_start", "rollout", "score", "advantages", "update"]
    assert all(of["programs"]["update"]["aliased_bytes"] > 0 for of in found["stages"].values())  # the state
    axes = {axis for of in programs.values() for one in of["collectives"] for axis in one["axes"]}
    assert axes == set(found["stages"]["ppo"]["mesh"])
    rollout = programs["rollout"]["collectives"]
    gathered = [one["bytes"] for one in rollout if one["kind"] == "all-gather"]
    assert max(gathered, default=0) < 64 * 72 * 4  # no weights, no logits
    assert all(one["in_open_loop"] for one in rollout if "tensor" in one["axes"])  # of its decode steps


@pytest.mark.slow
def test_what_fits_is_suggested(capsys: pytest.CaptureFixture[str]):
    """Adam's state of the model does not fit a chip; divided it does, and what is suggested then fits."""
    flags = [*LARGE, "--topology", "v5e:2x2", "--stage", "sft"]
    assert preflight.main([*QUICKSTART, *flags, "--programs", "update", "--mesh.data", "4"]) == 3
    capsys.readouterr()
    assert preflight.main([*QUICKSTART, *flags, "--suggest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["suggested_flags"][:2] == ["--mesh.slice", "1"]
    assert list(found["stages"]["sft"]["programs"]) == ["evaluate", "update"]
    assert preflight.main([*QUICKSTART, *flags, *found["suggested_flags"], "--programs", "evaluate"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_that_is_told_is_what_a_step_takes(remat: str):
    """On a CPU, where a step can be made: within a tenth."""
    sizes = "--model.hidden_size 512 --model.num_heads 8 --model.num_kv_heads 8 --model.mlp_size 2048"
    flags = f"{sizes} --model.num_layers 6 --model.remat {remat} --sft.batch_size 24".split()
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.live_memory", QUICKSTART[1], "sft", *QUICKSTART[2:], *flags],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["told"] == pytest.approx(found["live"], rel=0.1)
