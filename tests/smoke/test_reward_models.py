"""The real command line on every kind of judgement, and PPO on the mean of heads less a deviation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_jax import evaluate
from rlhf_jax.checkpoint import load_aux
from rlhf_jax.data.synthetic import synthetic_records
from rlhf_jax.train import main
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
FIELDS = ("prompt", "completion", "rating")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "rewards"
    config = ROOT / "configs" / "smoke" / "reward_model.yaml"
    assert main(["--config", str(config), "--run.dir", str(directory)]) == 0
    return directory


def test_every_stage_has_its_figures(run):
    summary = json.loads((run / "summary.json").read_text())
    for name in ("pairs", "rankings"):
        assert 0 < summary[name]["eval_accuracy"] < 1
    assert "eval_accuracy" not in summary["ratings"]
    assert summary["ratings"]["eval_squared_error_before"] != summary["ratings"]["eval_squared_error_after"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {
        line["stage"]: [name for name in line if name.startswith("loss/")]
        for line in metrics
        if "time" in line
    }
    assert losses["pairs"] == ["loss/bradley_terry", "loss/centering"]
    assert losses["ratings"] == ["loss/regression"]
    assert losses["rankings"] == ["loss/plackett_luce"]
    scores = [line["reward/model"] for line in metrics if line["stage"] == "ppo" and "reward/model" in line]
    assert scores and np.isfinite(scores).all()


def test_ratings_are_measured_as_in_the_run(run, tmp_path, capsys):
    held_out = [of._asdict() for of in synthetic_records("rating", "eval", 0)[:32]]
    text = "".join(json.dumps({name: of[name] for name in FIELDS}) + "\n" for of in held_out)
    (tmp_path / "ratings.jsonl").write_text(text)
    flags = ["--data", str(tmp_path / "ratings.jsonl"), "--data.max_length", "96", "--json"]
    assert evaluate.main(["--model", str(run / "ratings"), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    after = json.loads((run / "summary.json").read_text())["ratings"]["eval_squared_error_after"]
    assert (found["role"], found["records"]) == ("reward", 32) and found["loss"] == found["squared_error"]
    assert found["squared_error"] == pytest.approx(after, rel=1e-4)


def test_each_head_has_its_normaliser(run):
    aux = load_aux(run / "rankings")
    assert aux["normalizer_mean"].shape == (3,)
    assert len(np.unique(aux["normalizer_mean"])) == 3
    assert (load_aux(run / "ratings")["normalizer_mean"], load_aux(run / "ratings")["normalizer_std"]) == (
        0,
        1,
    )
