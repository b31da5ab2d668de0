"""Online algorithms by the real command: each runs, and its policy moves."""

import json

import pytest

from rlhf_jax import train
from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.online_config import OnlineDPOConfig, PolicyGradientConfig, RAFTConfig
from tests.conftest import ROOT

NAMES = [name for name, section in ALGORITHM_SECTIONS.items() if issubclass(section, PolicyGradientConfig)]
OTHERS = [
    name for name, section in ALGORITHM_SECTIONS.items() if issubclass(section, (OnlineDPOConfig, RAFTConfig))
]
"""These choose among the samples of a prompt."""
FAST = ("dapo",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES]
)
def test_smoke_config(name, tmp_path):
    config = ROOT / "configs" / "smoke" / f"{name}.yaml"
    assert train.main(["--config", str(config), "--run.dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == name and "loss/policy" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["update/skipped"] == 0
        assert line["policy/grad_norm"] > 0
        assert line["policy/ratio_gap_first"] < 1e-4
    assert ("loss/kl" in steps[0]) == (name in ("grpo", "gspo"))
    assert all(("loss/ptx" in line) == (name == "ppo") for line in steps)
    assert all(line["policy/kl"] is not None for line in steps)
    assert all(("reward/greedy_score" in line) == (name == "remax") for line in steps)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())[name]["score_after"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_smoke_config_of_what_learns_from_chosen_samples(name, tmp_path):
    config = ROOT / "configs" / "smoke" / f"{name}.yaml"
    assert train.main(["--config", str(config), "--run.dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == name and "policy/grad_norm" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["update/skipped"] == 0
        assert line["policy/grad_norm"] > 0
        assert line["rollout/equal_groups"] < 1
    assert steps[-1]["policy/kl"] is not None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())[name]["score_after"] is not None


@pytest.mark.slow
def test_the_policy_comes_nearer_to_its_teacher(tmp_path):
    """Which is larger, and the result of another stage; nothing judges the completions."""
    config = ROOT / "configs" / "smoke" / "distill.yaml"
    assert train.main(["--config", str(config), "--run.dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "distill" and "loss/divergence" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["update/skipped"] == 0
        assert line["policy/grad_norm"] > 0
        assert not any(name.startswith(("reward/", "eval/score")) for name in line)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["distill"]
    assert 0 < found["divergence_after"] < 0.8 * found["divergence_before"]
    assert 0 < found["teacher_kl_after"] < 0.8 * found["teacher_kl_before"]
    samples = (tmp_path / "run" / "samples" / "distill-000006.jsonl").read_text().splitlines()
    assert json.loads(samples[0]).keys() == {"stage", "step", "prompt", "completion"}
