"""Every file in configs/ says what it is and can start: against a stand-in for the hub, on 8 devices."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlhf_jax import preflight
from rlhf_jax.chips import described_devices, read_topology
from rlhf_jax.command_line import read_config, read_tree
from tests import tiny_hub
from tests.conftest import ROOT
from tests.stand_in_hub import StandIn

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [path for path in CONFIGS if re.fullmatch(r"(sft|reward_model|ppo|grpo)_[^_]+_[^_]+", path.stem)]
FIELDS = ("Paper", "Settings", "Hardware", "Time", "Expected")
ON_SLICES = [path for path in RECIPES if "-on-" in path.stem]
"""Recipes for TPU slices, whose header begins the hardware with their topology."""
EIGHT_CHIPS = "ppo_llama-3.1-8b-on-v6e-8_ultrafeedback"
"""Of those the one whose mesh eight devices have: it is started for all, which differ in sizes alone."""
SIZES = {
    "Qwen2.5-0.5B": tiny_hub.QWEN
    | dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
    | dict(num_attention_heads=14, num_key_value_heads=2),
    "Llama-3.1-8B": tiny_hub.LLAMA
    | dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    | dict(num_attention_heads=32, num_key_value_heads=8),
    "Llama-3.1-70B": tiny_hub.LLAMA
    | dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    | dict(num_attention_heads=64, num_key_value_heads=8),
}
"""The config.json of the models of these, with the real ones' sizes."""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """Returns a hub that has what the recipes name."""
    with StandIn() as stand_in:
        tiny_hub.fill(stand_in, tmp_path_factory.mktemp("models"))
        yield stand_in


@pytest.fixture(scope="module")
def hub(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Returns the environment in which a program finds it."""
    return stand_in.environment(tmp_path_factory.mktemp("home"))


def dry_build(
    path: Path, flags: Sequence[str | Path], hub: dict[str, str | None], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Returns what `python -m tests.dry_build` did on eight devices."""
    variables = os.environ | hub | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "tests.dry_build", path, *flags],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_configs_are_recipes_but_for_those_that_need_no_hub():
    others = {path.stem for path in set(CONFIGS) - set(RECIPES)}
    assert others == {"quickstart", "quickstart_hydra", "stories"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is(path: Path):
    """What it does, then the fields in their order, then its command; its run directory has its name."""
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    lines = [line.removeprefix("#").removeprefix(" ") for line in header[0].splitlines()]
    assert re.match(r"\w.*: .*\.$", " ".join(lines[: lines.index("")]))
    found = [match[1] for line in lines if (match := re.match(r"([A-Z]\w+): +\S", line))]
    assert tuple(found) == FIELDS
    assert lines[-2:] == ["", f"  python -m rlhf_jax.train --config configs/{path.name}"]
    tree = read_tree(str(path))
    assert tree["run"]["dir"] == f"runs/{path.stem}"
    assert tree["stages"][-1]["algorithm"] == re.match(r"(sft|reward_model|ppo|grpo)_", path.stem)[1]


@pytest.mark.parametrize("path", ON_SLICES, ids=lambda path: path.stem)
def test_a_recipe_for_a_slice_has_a_mesh_for_it(path: Path, tmp_path: Path):
    """With the model's real sizes, on the devices of the header's slices; nothing is compiled."""
    pytest.importorskip("libtpu")
    hardware = re.search(
        r"^# Hardware: (?:(\d) x )?(\w+:[\dx]+), ([\w-]+) by", path.read_text(), re.MULTILINE
    )
    assert hardware is not None
    slices = read_topology(hardware[2], int(hardware[1] or 1))
    assert hardware[3] == slices.accelerator_type
    model = read_tree(str(path))["model"]["path"].rpartition("/")[2].removesuffix("-Instruct")
    (tmp_path / "config.json").write_text(json.dumps(SIZES[model]))
    config = read_config(["--config", str(path), "--model.path", str(tmp_path)], runs=False)
    plans = preflight.chosen_plans(config, "")
    preflight.check_hosts(plans, slices)
    devices = described_devices(slices)
    assert preflight.compiled_stages(plans, devices, slices.chip, ["none of them"]) == []


FAST = ("quickstart_hydra", "ppo_pythia-1b_tldr")
"""Of all configurations, two that have between them every kind of stage; the others are slow tests."""
STARTED = [path for path in CONFIGS if path not in ON_SLICES or path.stem == EIGHT_CHIPS]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in FAST else pytest.mark.slow) for path in STARTED],
    ids=lambda path: path.stem,
)
def test_a_config_can_start(path: Path, hub: dict[str, str | None], tmp_path: Path):
    if path.stem == "stories" and not os.environ.get("RLHF_JAX_TEST_DATA"):
        pytest.skip("RLHF_JAX_TEST_DATA is not set")
    done = dry_build(path, ["--run.dir", tmp_path / "run"], hub, tmp_path)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)
    assert list(stages) == [stage["name"] for stage in read_tree(str(path))["stages"]]
    commits = json.loads((tmp_path / "run" / "hub.json").read_text()) if path in RECIPES else {}
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits.values())
    tree = read_tree(str(path))
    named = {tree.get(section, {}).get("path", "") for section in ("model", "tokenizer")}
    assert commits.keys() == {name for name in named if name.startswith("hub:")}


def test_a_config_that_cannot_start_is_found(hub: dict[str, str | None], tmp_path: Path):
    """What only the models and the mesh tell: rows that do not divide, and more than the context holds."""
    flags = ["--rollout.max_new_tokens", "1600", "--stages.sft.sft.microbatch_size", "4", "--run.dir", "run"]
    done = dry_build(ROOT / "configs" / "ppo_pythia-1b_tldr.yaml", flags, hub, tmp_path)
    assert done.returncode == 2
    assert "stage ppo: rows of up to 2112 tokens do not fit the model's context of 2048" in done.stderr
    done = dry_build(ROOT / "configs" / "ppo_pythia-1b_tldr.yaml", flags[2:], hub, tmp_path)
    assert done.returncode == 2
    assert "sft.microbatch_size is 4; it must be a multiple of 8" in done.stderr


def test_models_of_the_hub_are_measured_and_their_records_shown(hub: dict[str, str | None], tmp_path: Path):
    variables = os.environ | hub | {"PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in variables.items() if value is not None}

    def said(*command: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", *command, "--json"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    model, data = "hub:google/gemma-2-2b-it", "hub:HuggingFaceH4/ultrafeedback_binarized:test_sft"
    found = said("rlhf_jax.evaluate", "--model", model, "--data", data)
    assert found["records"] == 24 and 100 < found["perplexity"] < 1000  # of random weights, 512 tokens
    recipe = ROOT / "configs" / "reward_model_gemma-2-2b_ultrafeedback.yaml"
    row = said("rlhf_jax.preview", "--config", str(recipe), "--stage", "reward")["reward"]["rows"][0]
    assert "".join(row["tokens"]) == (
        "<bos><start_of_turn>user\nWhat is 0 and 0?<end_of_turn>\n<start_of_turn>model\n0.<end_of_turn>"
    )


def test_a_run_goes_on_with_the_commit_that_it_began_with(
    stand_in: StandIn, hub: dict[str, str | None], tmp_path: Path
):
    """Also when the branch has moved, to something that could not even be read."""
    recipe, name = ROOT / "configs" / "ppo_qwen2.5-1.5b_gsm8k.yaml", "Qwen/Qwen2.5-1.5B"
    commits = stand_in.commits["models", name]
    (old,) = commits
    began = dry_build(recipe, ["--run.dir", "run"], hub, tmp_path)
    assert began.returncode == 0, began.stderr
    assert f"hub:{name} is commit {old}, where a branch may move: pin it as hub:{name}@{old}" in began.stderr
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"path: hub:{name}\n" in config  # as written
    new = stand_in.add("models", name, {"config.json": b"{}", "model.safetensors": b""})
    try:
        again = dry_build(recipe, ["--run.dir", "run"], hub, tmp_path)
        other = dry_build(recipe, ["--run.dir", "other"], hub, tmp_path)
    finally:
        del commits[new]
    assert again.returncode == 0 and name not in again.stderr
    assert json.loads((tmp_path / "run" / "hub.json").read_text()) == {f"hub:{name}": old}
    assert other.returncode == 2 and new in other.stderr
