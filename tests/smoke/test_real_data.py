"""Public data sets as they are, through the stages that they fit, by a configuration alone."""

import json

import numpy as np
import pytest

from rlhf_jax.rewards.gsm8k import no_answer

SFT = {"name": "sft", "algorithm": "sft", "sft": {"num_steps": 2, "batch_size": 8}}
REWARD = {
    "name": "reward",
    "algorithm": "reward_model",
    "reward_model": {"num_steps": 2, "batch_size": 8, "normalize_on": "chosen"},
}
PPO = {
    "name": "ppo",
    "algorithm": "ppo",
    "ppo": {"num_iterations": 1, "batch_size": 8, "num_epochs": 1, "num_minibatches": 1},
    "rollout": {"max_new_tokens": 16},
}
SCORED = PPO | {"reward_from": "reward"}
JUDGED = PPO | {"from": "sft", "rewards": {"function": "rlhf_jax.rewards.gsm8k:exact_answer"}}
VERIFIED = {
    "name": "grpo",
    "algorithm": "grpo",
    "from": "sft",
    "grpo": {"num_iterations": 2, "batch_size": 4, "group_size": 4},
    "rollout": {"max_new_tokens": 16},
    "rewards": {
        "function": {"rlhf_jax.rewards.gsm8k:exact_answer": 1, "rlhf_jax.rewards.gsm8k:no_answer": 0}
    },
}
RANKED = {"columns": {"completions": "candidates.text", "scores": "candidates.score"}}
ASKED = {"columns": {"prompt": "question", "completion": "answer"}}
DATA_SETS = {  # stages, training and held-out records, further options of the data section
    "hh_rlhf": ([REWARD, SCORED], "train.jsonl.gz[:200]", "test.jsonl.gz", {}),
    "wmt19_darr pairs": ([REWARD, SCORED], "pairs_train.jsonl.gz[:200]", "pairs_test.jsonl.gz", {}),
    "wmt19_darr rankings": ([REWARD], "lists_train.jsonl.gz[:40]", "lists_test.jsonl.gz", RANKED),
    "gsm8k": ([SFT, JUDGED], "train.jsonl.gz[:200]", "test.jsonl.gz", ASKED),
    "gsm8k in groups": ([SFT, VERIFIED], "train.jsonl.gz[:200]", "test.jsonl.gz", ASKED),
}
LENGTHS = {"max_prompt_length": 256, "max_length": 384, "max_eval_records": 32, "prompt_truncation": "left"}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_SETS)
def test_a_public_data_set_runs_with_nothing_but_a_configuration(name, test_data, run_train, tmp_path):
    stages, train, held_out, options = DATA_SETS[name]
    directory = test_data / name.split()[0]
    is_online = any("rollout" in stage for stage in stages)
    config = {
        "run": {"dir": str(tmp_path / "run")} | ({"num_samples": 32} if is_online else {}),
        "stages": stages,
        "model": {"path": str(test_data / "tinystories656k")},
        "data": {"train": str(directory / train), "eval": str(directory / held_out)} | options | LENGTHS,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = run_train(["--config", tmp_path / "config.yaml", "--json"])
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert list(summary) == [stage["name"] for stage in stages]
    if "reward" in summary:
        assert 0 < summary["reward"]["eval_accuracy"] < 1
    if "ppo" in summary:
        assert summary["ppo"]["length_after"] > 0
    if "grpo" in summary:  # what could not be read as an answer is counted, and is no part of the score
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["stage"] == "grpo" and line["step"] > 0]
        assert len(steps) == 2
        for line in steps:
            assert line["reward/score"] == line["reward/function/exact_answer"]
            assert 0 <= line["reward/function/no_answer"] <= 1 - line["reward/function/exact_answer"]
        samples = (tmp_path / "run" / "samples" / "grpo-000002.jsonl").read_text().splitlines()
        completions = [json.loads(sample)["completion"] for sample in samples]
        assert len(completions) == 32
        assert steps[-1]["eval/reward/function/no_answer"] == pytest.approx(
            np.mean(no_answer([], completions))
        )
    if name.startswith("gsm8k"):
        assert summary["sft"]["eval_perplexity_after"] < summary["sft"]["eval_perplexity_before"]
        assert summary[stages[-1]["name"]]["score_after"] is not None
