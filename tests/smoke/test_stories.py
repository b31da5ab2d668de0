"""The recipe on real weights and text, shortened: it finishes, and an independent judge reads its samples."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SHORTER = {
    "sft.num_steps": 3,
    "sft.batch_size": 8,
    "reward_model.num_steps": 3,
    "reward_model.batch_size": 8,
    "ppo.num_iterations": 2,
    "ppo.batch_size": 16,
    "ppo.num_epochs": 1,
    "rollout.max_new_tokens": 24,
    "data.max_eval_records": 24,
    "optimizer.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def finished(run_train, test_data, tmp_path_factory):
    """Returns the run directory of the shortened recipe."""
    run = tmp_path_factory.mktemp("stories") / "run"
    flags = [word for name, value in SHORTER.items() for word in (f"--{name}", str(value))]
    done = run_train(
        ["--config", ROOT / "configs" / "stories.yaml", "--run.dir", run, "--json", *flags],
        env={"RLHF_JAX_TEST_DATA": str(test_data)},
        optimized=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"].keys() == {"sft", "reward", "ppo"}
    return run


def samples(run):
    files = sorted((run / "samples").iterdir())
    return {path.name: [json.loads(line) for line in path.open()] for path in files}


def test_every_prompt_is_sampled_before_and_after(finished):
    found = samples(finished)
    assert list(found) == ["ppo-000000.jsonl", "ppo-000002.jsonl"]
    before, after = found.values()
    assert len(before) == len(after) == 24  # num_samples is more than there are held-out records
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert len({row["prompt"] for row in before}) > 20
    for step, rows in ((0, before), (2, after)):
        for row in rows:
            assert row.keys() == {"stage", "step", "prompt", "completion", "score"}
            assert (row["stage"], row["step"]) == ("ppo", step)
            assert row["prompt"] and row["completion"] and math.isfinite(row["score"])


def test_the_model_is_the_trained_one_and_learns(finished):
    """656k parameters that were trained on such stories: a fresh model's perplexity is 2048."""
    summary = json.loads((finished / "summary.json").read_text())
    assert 2 < summary["sft"]["eval_perplexity_before"] < 60
    assert summary["sft"]["eval_perplexity_after"] < 1.1 * summary["sft"]["eval_perplexity_before"]
    assert 0.2 < summary["reward"]["eval_accuracy"] < 1
    assert 0 < summary["ppo"]["kl"] < 1


def test_the_judge_prints_one_line_of_finite_figures(finished, test_data):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.bench.stories", "--run", finished, "--data", test_data],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (text,) = done.stdout.splitlines()
    line = json.loads(text)
    assert line["bench"] == "stories" and line["stories"] == 24
    assert line["judge_rows"] > 1000
    assert 0.65 < line["judge_accuracy_5_fold"] < 1
    assert line["seconds"].keys() == {"sft", "reward", "ppo"}
    figures = [*line["sft_perplexity"], *line["seconds"].values()]
    figures += [value for value in line.values() if isinstance(value, int | float)]
    assert len(figures) >= 12 and all(math.isfinite(figure) for figure in figures)
