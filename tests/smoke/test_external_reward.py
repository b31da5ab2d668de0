"""PPO on the scores of a reward model from outside, which has another tokenizer and another architecture."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models.scorers import Normalizer, save_scorer
from rlhf_jax.models.transformer import make_model
from tests import tiny

CONTEXT = 76  # a part of the texts is longer
TOKENIZER = train_tokenizer(["The other model learned other words from another text."] * 3, 300)
ARCHITECTURE = dataclasses.replace(
    tiny.ARCHITECTURE, vocab_size=len(TOKENIZER), num_layers=1, context_length=CONTEXT
)
MODEL = make_model(ARCHITECTURE)
NORMALIZER = Normalizer(0.25, 2.0)

CONFIG = """
run: {{dir: {dir}/run, log_every: 1, num_samples: 32}}
stages: [{{name: ppo, algorithm: ppo, reward_from: {dir}/judge}}]
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 96}}
tokenizer: {{vocab_size: 400}}
data: {{max_prompt_length: 32, max_eval_records: 32}}
rollout: {{max_new_tokens: 12}}
ppo: {{num_iterations: 2, batch_size: 16, num_epochs: 1, num_minibatches: 2, eval_every: 9}}
"""


@pytest.fixture
def judge(tmp_path):
    """Returns the parameters of HERE/judge, a directory as transformers and others write them."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), MODEL.score_shapes
    )
    params["score_head"]["bias"] = np.float32(0)
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    save_scorer(tmp_path / "judge", ARCHITECTURE, params, "reward", NORMALIZER, token_ids=ids)
    TOKENIZER.save_pretrained(tmp_path / "judge")
    return params


def score(params, text, end):
    """Returns what the reward model says of a text, on one row without padding, and whether it was cut."""
    ids = [*TOKENIZER(text)["input_ids"], *end]
    was_cut = len(ids) > CONTEXT
    if was_cut:
        ids = [TOKENIZER.bos_token_id, *ids[1 - CONTEXT :]]
    last = MODEL.hidden(params["trunk"], jnp.asarray([ids]))[0, -1]
    logit = float(last @ params["score_head"]["kernel"])
    return (logit - NORMALIZER.mean) / NORMALIZER.std, was_cut


@pytest.mark.slow
def test_ppo_trains_on_the_scores_of_a_foreign_reward_model(run_train, tmp_path, judge):
    (tmp_path / "ppo.yaml").write_text(CONFIG.format(dir=tmp_path))
    done = run_train(["--config", tmp_path / "ppo.yaml"])
    assert done.returncode == 0, done.stderr
    assert f"[ppo] the reward model {tmp_path}/judge reads text otherwise than the policy" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["reward/model"] == pytest.approx(line["reward/score"], abs=1e-5) for line in lines[1:])

    files = sorted((tmp_path / "run" / "samples").rglob("*.jsonl"))
    samples = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(samples) == 32
    num_ended = num_cut = 0
    for sample in samples:
        text = sample["prompt"] + sample["completion"]
        ended, open_ = (score(judge, text, end) for end in ([TOKENIZER.eos_token_id], []))
        found, was_cut = min(ended, open_, key=lambda one: abs(one[0] - sample["score"]))
        assert found == pytest.approx(sample["score"], abs=1e-4)
        num_ended += found == ended[0]
        num_cut += was_cut
    before = lines[0]
    assert num_ended == pytest.approx(32 * before["eval/rollout/eos_rate"]) and num_ended > 0
    assert num_cut == pytest.approx(32 * before["eval/reward/cut_rate"]) and 0 < num_cut < 32
    assert before["eval/score"] == pytest.approx(np.mean([sample["score"] for sample in samples]), abs=1e-5)
