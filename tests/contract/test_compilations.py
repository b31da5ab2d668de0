"""After the second iteration nothing is compiled, whatever the lengths: evaluation and saving included."""

import json
import logging

import pytest

from rlhf_jax.command_line import read_command_line
from rlhf_jax.config import MeshConfig
from rlhf_jax.plan import plan_stages
from rlhf_jax.run_tokenizer import prepare_tokenizer
from rlhf_jax.sharding import make_mesh
from rlhf_jax.stage import run_stage
from rlhf_jax.stop_signals import StopSignals

pytestmark = pytest.mark.slow

RUN = """
run: {{dir: {dir}}}
stages: [{{name: ppo, algorithm: ppo}}]
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 64}}
tokenizer: {{vocab_size: 300}}
data: {{max_prompt_length: 32, max_eval_records: 20}}
rewards: {{function: "rlhf_jax.data.synthetic:gold_reward"}}
rollout: {{max_new_tokens: 24, slots: 8, steps_per_call: 7}}
checkpoint: {{every: 1}}  # the first save slices what several devices hold
ppo: {{num_iterations: 6, batch_size: 16, num_minibatches: 2, num_epochs: 2, eval_every: 3}}
"""
PACKED = ["--ppo.sequences_per_row", "2", "--ppo.length_buckets", "3"]
ELSEWHERE = ["--rollout.devices", "4", "--rollout.stop_strings", "[e]"]


@pytest.mark.parametrize(
    "algorithm, flags",
    [("ppo", []), ("ppo", PACKED), ("ppo", ELSEWHERE), ("remax", [])],
    ids=["rows of one", "packed", "asynchronous", "two rollouts"],
)
def test_nothing_is_compiled_after_the_second_iteration(algorithm, flags, tmp_path, caplog):
    (tmp_path / "run.yaml").write_text(RUN.replace("ppo", algorithm).format(dir=tmp_path / "run"))
    config, _ = read_command_line(["--config", str(tmp_path / "run.yaml"), *flags])
    (plan,) = plan_stages(config, prepare_tokenizer(config))
    with caplog.at_level(logging.WARNING):
        run_stage(plan, make_mesh(MeshConfig()), StopSignals())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["rollout/length"] for line in lines[1:]}) > 3  # lengths vary
    assert lines[1]["perf/compilations"] > 0
    assert [line["perf/compilations"] for line in lines[3:]] == [0] * 4
    assert "were compiled" not in caplog.text
