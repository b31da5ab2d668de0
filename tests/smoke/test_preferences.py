"""Preference algorithms by the real command: each runs, and what it trains is a policy like any other."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax import sample
from rlhf_jax.algos.dpo import DPO
from rlhf_jax.algos.kto import KTO
from rlhf_jax.algos.reference_free import ORPO, SIMPO
from rlhf_jax.algos.registry import ALGORITHMS
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
NAMES = sorted(name for name, of in ALGORITHMS.items() if of in (DPO, KTO, SIMPO, ORPO))
ONE_AFTER_THE_OTHER = """
import sys
from rlhf_jax import train
for name in sys.argv[2:]:
    if code := train.main(["--config", f"configs/smoke/{name}.yaml", "--run.dir", f"{sys.argv[1]}/{name}"]):
        sys.exit(f"{name} ended with {code}")
"""
CHAIN = """
run: {{dir: {dir}}}
stages:
  - {{name: sft, algorithm: sft, lora: {{rank: 0}}}}
  - {{name: dpo, algorithm: dpo, from: sft, lora: {{rank: 0}}, data: {{packing: true}}}}
  - {{name: kto, algorithm: kto, from: dpo, model: {{dtype: bfloat16}}}}
model: {{hidden_size: 16, num_heads: 2, num_kv_heads: 2, mlp_size: 32, context_length: 96}}
lora: {{rank: 2}}
tokenizer: {{vocab_size: 384}}
data: {{max_prompt_length: 32, max_length: 96, max_eval_records: 32}}
optimizer: {{learning_rate: 3.0e-3}}
rewards: {{gold: "rlhf_jax.data.synthetic:gold_reward"}}
sft: {{num_steps: 4, batch_size: 16}}
dpo: {{num_steps: 4, batch_size: 4, microbatch_size: 2, precompute_ref: true}}
kto: {{num_steps: 4, batch_size: 8, microbatch_size: 4}}
"""


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


def test_smoke_configs(tmp_path):
    """All in one process, which starts up once; with them that of sft, from which they start."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, tmp_path, "sft", *NAMES],
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sft = summary_of(tmp_path / "sft")["sft"]
    assert sft["eval_perplexity_after"] < sft["eval_perplexity_before"]
    for name in NAMES:
        found = summary_of(tmp_path / name)[name]
        assert found["eval_loss_after"] < found["eval_loss_before"], name
        assert 0 < found["eval_accuracy_after"] < 1, name
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["stage"] == name and "loss/preference" in line]
        assert [line["step"] for line in steps] == list(range(1, 9)), name
        assert all(line["update/skipped"] == 0 for line in steps), name


def test_a_chain_of_preferences(run_train, tmp_path, capsys):
    """A cached reference beside packed pairs; adapters in bfloat16 on that policy; then it is sampled."""
    config, run = tmp_path / "chain.yaml", tmp_path / "run"
    config.write_text(CHAIN.format(dir=run))
    done = run_train(["--config", config])
    assert done.returncode == 0, done.stderr
    found = summary_of(run)
    # Before the first step policy and reference are one: what was computed beforehand is at the right pairs.
    assert found["dpo"]["eval_loss_before"] == pytest.approx(math.log(2), rel=1e-5)
    assert 0.7 < found["dpo"]["accuracy_ceiling"] < 1
    assert found["kto"]["eval_loss_before"] == pytest.approx(0.5)  # the reference is the policy at the start
    assert found["kto"]["eval_loss_after"] != found["kto"]["eval_loss_before"]
    with np.load(run / "dpo" / "reference" / "train.npz") as stored:
        assert stored["logprobs"].max() < 0
    assert sample.main(["--model", str(run), "--prompt", "Customer: my lamp.", "--json"]) == 0
    assert "completion" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_is_not_resumed_beside_another_reference(run_train, tmp_path):
    """Nor is what that would say computed first."""

    def trained(seed):
        flags = ["--run.dir", tmp_path / seed, "--run.seed", seed, "--dpo.precompute_ref", "true"]
        return run_train(["--config", ROOT / "configs" / "smoke" / "dpo.yaml", *flags])

    assert [trained(seed).returncode for seed in ("0", "1")] == [0, 0]
    run = tmp_path / "0"
    shutil.rmtree(run / "sft")
    shutil.copytree(tmp_path / "1" / "sft", run / "sft")
    (run / "dpo" / "result.json").unlink()  # as if it had been interrupted
    cached = run / "dpo" / "reference" / "train.npz"
    before = cached.read_bytes()
    again = trained("0")
    assert again.returncode == 2
    assert "sft is not the model any more that was its reference until step 8" in again.stderr
    assert cached.read_bytes() == before
