"""TRPO by the real command."""

import json

import pytest

from rlhf_jax import train
from tests.conftest import ROOT

HYDRA = """
run: {{dir: {dir}}}
stages:
  - {{name: sft, algorithm: sft, lora: {{rank: 0}}}}
  - {{name: reward, algorithm: reward_model, from: sft}}
  - {{name: trpo, algorithm: trpo, from: sft, reward_from: reward, model: {{sharing: hydra}}}}
model: {{hidden_size: 16, num_heads: 2, num_kv_heads: 2, mlp_size: 32, context_length: 96, remat: full,
  logprob_chunk: 64}}
lora: {{rank: 2}}
tokenizer: {{vocab_size: 384}}
data: {{max_prompt_length: 32, max_length: 96, max_eval_records: 32}}
sft: {{num_steps: 4, batch_size: 16}}
reward_model: {{num_steps: 2, batch_size: 8}}
rollout: {{max_new_tokens: 12, slots: 8}}
trpo: {{num_iterations: 2, batch_size: 32, num_minibatches: 2, num_epochs: 1, sequences_per_row: 2,
  length_buckets: 2, missing_eos: subtract}}
"""


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "trpo" and "loss/value" in line]


@pytest.mark.slow
@pytest.mark.parametrize("is_hydra", [True, False])
def test_every_step_keeps_to_the_kl(tmp_path, is_hydra):
    config, run = ROOT / "configs" / "smoke" / "trpo.yaml", tmp_path / "run"
    if is_hydra:
        config = tmp_path / "hydra.yaml"
        config.write_text(HYDRA.format(dir=run))
    assert train.main(["--config", str(config), "--run.dir", str(run)]) == 0
    steps = steps_of(run)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["update/skipped"] == step["policy/line_search_failed"] == 0
        assert 0.0001 < step["policy/approx_kl"] <= 0.001 and step["policy/surrogate_gain"] > 0
        assert step["policy/ratio_gap_first"] < 1e-4 < step["policy/ratio_gap"]
        assert step["policy/cg_residual"] < 1 and step["value/grad_norm"] > 0
    summary = json.loads((run / "summary.json").read_text())["trpo"]
    assert {"score_before", "score_after", "kl", "seconds"} <= summary.keys()
