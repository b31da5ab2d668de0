"""Public data sets as they are, through the stages that they fit, by a configuration alone."""

import json

import pytest

CONFIGS = {
    "hh_rlhf": """
stages:
  - {name: reward, algorithm: reward_model}
  - {name: ppo, algorithm: ppo, reward_from: reward}
data:
  train: ${RLHF_JAX_TEST_DATA}/hh_rlhf/train.jsonl.gz[:200]
  eval: ${RLHF_JAX_TEST_DATA}/hh_rlhf/test.jsonl.gz
""",
    "wmt19_darr pairs": """
stages:
  - {name: reward, algorithm: reward_model}
  - {name: ppo, algorithm: ppo, reward_from: reward}
data:
  train: ${RLHF_JAX_TEST_DATA}/wmt19_darr/pairs_train.jsonl.gz[:200]
  eval: ${RLHF_JAX_TEST_DATA}/wmt19_darr/pairs_test.jsonl.gz
""",
    "wmt19_darr rankings": """
stages:
  - {name: reward, algorithm: reward_model}
data:
  train: ${RLHF_JAX_TEST_DATA}/wmt19_darr/lists_train.jsonl.gz[:40]
  eval: ${RLHF_JAX_TEST_DATA}/wmt19_darr/lists_test.jsonl.gz
  columns: {completions: candidates.text, scores: candidates.score}
""",
    "gsm8k": """
stages:
  - {name: sft, algorithm: sft}
  - {name: ppo, algorithm: ppo, from: sft}
data:
  train: ${RLHF_JAX_TEST_DATA}/gsm8k/train.jsonl.gz[:200]
  eval: ${RLHF_JAX_TEST_DATA}/gsm8k/test.jsonl.gz
  columns: {prompt: question, completion: answer}
rewards: {function: rlhf_jax.rewards.gsm8k:exact_answer}
""",
}
COMMON = """
run: {{dir: {dir}}}
model: {{path: "${{RLHF_JAX_TEST_DATA}}/tinystories656k"}}
"""
SETTINGS = {
    "sft": {"num_steps": 2, "batch_size": 8},
    "reward_model": {"num_steps": 2, "batch_size": 8, "normalize_on": "chosen"},
    "ppo": {"num_iterations": 1, "batch_size": 8, "num_epochs": 1, "num_minibatches": 1},
}
LENGTHS = {"max_prompt_length": 256, "max_length": 384, "max_eval_records": 32, "prompt_truncation": "left"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_public_data_set_runs_with_nothing_but_a_configuration(name, test_data, run_train, tmp_path):
    text = CONFIGS[name] + COMMON.format(dir=tmp_path / "run")
    (tmp_path / "config.yaml").write_text(text)
    used = [algorithm for algorithm in SETTINGS if f"algorithm: {algorithm}" in text]
    flags = [f"--{a}.{option}={value}" for a in used for option, value in SETTINGS[a].items()]
    flags += [f"--data.{option}={value}" for option, value in LENGTHS.items()]
    flags += ["--rollout.max_new_tokens=16"] if "ppo" in used else []
    done = run_train(["--config", tmp_path / "config.yaml", *flags, "--json"])
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert len(summary) == text.count("algorithm:")
    if "reward" in summary:
        assert 0 < summary["reward"]["eval_accuracy"] < 1
    if "ppo" in summary:
        assert summary["ppo"]["length_after"] > 0
    if name == "gsm8k":
        assert summary["sft"]["eval_perplexity_after"] < summary["sft"]["eval_perplexity_before"]
        assert summary["ppo"]["score_after"] is not None
