"""Stages that train adapters on a Hugging Face model: their exports, merged and for PEFT."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import export
from rlhf_jax.checkpoint import load_info
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.lora import merge
from rlhf_jax.models.peft import read_adapter
from rlhf_jax.models.scorers import load_scorer, read_scorer
from rlhf_jax.models.transformer import SCORER, make_model
from rlhf_jax.role_parts import part_shardings
from tests import tiny

pytestmark = pytest.mark.slow  # a minute of training

TOKENIZER = train_tokenizer(["Customer: the pen broke.\nReply: Sorry to hear that."] * 3, 300)
ARCHITECTURE = dataclasses.replace(tiny.ARCHITECTURE, vocab_size=len(TOKENIZER), context_length=96)
MODEL = make_model(ARCHITECTURE)
ADAPTERS = "{rank: 2, alpha: 3.0, targets: [q, o, down]}"
TOKENS = jnp.arange(12)[None] + 5

CONFIG = """
run: {{dir: {dir}/run}}
stages:
  - {{name: whole, algorithm: sft, from: {dir}/base}}
  - {{name: sft, algorithm: sft, from: {dir}/base, lora: {adapters}, model: {{frozen_dtype: float32}}}}
  - {{name: reward, algorithm: reward_model, from: whole, lora: {adapters}, model: {{frozen_dtype: float32}}}}
data: {{max_prompt_length: 32, max_length: 96, max_eval_records: 8}}
optimizer: {{learning_rate: 0.03}}
sft: {{num_steps: 2, batch_size: 8}}
reward_model: {{num_steps: 2, batch_size: 8}}
"""


@pytest.fixture(scope="module")
def finished(run_train, tmp_path_factory):
    """Returns a directory with the base, and a run on it."""
    directory = tmp_path_factory.mktemp("adapters")
    params = MODEL.init_policy(jax.random.key(0))
    ids = {name: getattr(TOKENIZER, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hf.save_policy(directory / "base", ARCHITECTURE, params, token_ids=ids)
    TOKENIZER.save_pretrained(directory / "base")
    (directory / "config.yaml").write_text(CONFIG.format(dir=directory, adapters=ADAPTERS))
    done = run_train(["--config", directory / "config.yaml"])
    assert done.returncode == 0, done.stderr
    return directory


def exported(finished, out, stage, *flags):
    """Returns the directory that a stage is exported to."""
    where = ["--run", str(finished / "run"), "--stage", stage, "--out", str(out)]
    assert export.main([*where, *flags]) == 0
    return out


def hidden(trunk):
    return MODEL.hidden(trunk, TOKENS)


def test_the_adapter_on_its_base_is_the_merged_export(finished, tmp_path):
    adapter = exported(finished, tmp_path / "adapter", "sft", "--adapter")
    merged = exported(finished, tmp_path / "merged", "sft")
    base, whole = (tiny.load_policy(directory, tiny.mesh())[1] for directory in (finished / "base", merged))
    lora, params, head = read_adapter(adapter, ARCHITECTURE)
    assert (lora.rank, lora.alpha, lora.targets, head) == (2, 3.0, ("q", "o", "down"), None)
    adapted = hidden(merge(base["trunk"], params, lora))
    np.testing.assert_allclose(adapted, hidden(whole["trunk"]), rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(adapted - hidden(base["trunk"]))) > 1e-3

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(finished / "base"), "CAUSAL_LM")
    card = (adapter / "README.md").read_text()
    assert "library_name: peft\nbase_model: base\n" in card and "lora.rank 2, lora.alpha 3.0" in card
    assert (adapter / "tokenizer_config.json").is_file() and not (adapter / "config.json").exists()


def test_an_adapter_is_exported_without_its_base(finished, tmp_path, capsys):
    """What is written does not depend on it; where another model lies in its place, that is told."""
    whole = exported(finished, tmp_path / "whole", "sft", "--adapter")
    (finished / "base").rename(tmp_path / "base")
    try:
        alone = exported(finished, tmp_path / "alone", "sft", "--adapter")
        hf.save_policy(finished / "base", ARCHITECTURE, MODEL.init_policy(jax.random.key(1)))
        flags = ["--run", str(finished / "run"), "--stage", "sft", "--adapter", "--out", str(tmp_path / "x")]
        assert export.main(flags) == 2
        assert "base, which is not the model any more that it was; put that back" in capsys.readouterr().err
        exported(finished, tmp_path / "named", "sft", "--adapter", "--base", "hub:owner/base")
        shutil.rmtree(finished / "base")
    finally:
        (tmp_path / "base").rename(finished / "base")
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in alone.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (alone / path.name).read_bytes(), path.name
    named = tmp_path / "named" / "adapter_model.safetensors"
    assert named.read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_run_goes_on_after_its_base_has_moved(finished, run_train, tmp_path):
    """The same model in another place is its base from then on; another model in its place is refused."""
    text = CONFIG.format(dir=".", adapters=ADAPTERS)
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(finished / "base", here / "base")
    keep = [line for line in text.splitlines() if not re.search("name: (whole|reward),|^reward_model", line)]
    (here / "config.yaml").write_text("\n".join([*keep, "checkpoint: {every: 1, keep: 9}"]))
    command = ["--config", "config.yaml"]
    done = run_train(command, cwd=here)
    assert done.returncode == 0, done.stderr
    here.rename(there)
    stage = there / "run" / "sft"
    metrics = (there / "run" / "metrics.jsonl").read_text()
    (stage / "result.json").unlink()
    shutil.rmtree(stage / "checkpoints" / "2")
    (there / "base").rename(tmp_path / "base")
    hf.save_policy(there / "base", ARCHITECTURE, MODEL.init_policy(jax.random.key(1)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "base" / name, there / "base" / name)
    refused = run_train(command, cwd=there)
    assert refused.returncode == 2
    assert "base is not the model any more to which its adapters belonged until step 1" in refused.stderr
    shutil.rmtree(there / "base")
    (tmp_path / "base").rename(there / "base")
    done = run_train(command, cwd=there)
    assert done.returncode == 0, done.stderr
    assert "[sft] goes on after step 1" in done.stderr
    losses = [
        [json.loads(line)["loss/nll"] for line in text.splitlines() if "loss/nll" in line]
        for text in (metrics, (there / "run" / "metrics.jsonl").read_text())
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0]
    assert load_info(stage)["base"]["path"] == str(there / "base")


def test_a_reward_models_adapter_has_its_head_and_names_the_export_that_it_is_for(finished, tmp_path, capsys):
    flags = [
        "--run",
        str(finished / "run"),
        "--stage",
        "reward",
        "--adapter",
        "--out",
        str(tmp_path / "none"),
    ]
    assert export.main(flags) == 2
    assert "it is for the model of the stage whole, which PEFT cannot load; export" in capsys.readouterr().err
    below = exported(finished, tmp_path / "whole", "whole")
    adapter = exported(finished, tmp_path / "adapter", "reward", "--adapter", "--base", str(below))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(below), "SEQ_CLS")

    merged = exported(finished, tmp_path / "merged", "reward")
    scorer = read_scorer(merged)
    whole = load_scorer(merged, scorer, part_shardings(MODEL, tiny.mesh(), SCORER))
    _, base = tiny.load_policy(below, tiny.mesh())
    lora, params, head = read_adapter(adapter, ARCHITECTURE)
    adapted = hidden(merge(base["trunk"], params, lora))
    np.testing.assert_allclose(adapted, hidden(whole["trunk"]), rtol=1e-5, atol=1e-5)
    mean, std = scorer.normalizer
    assert head is not None and mean != 0
    np.testing.assert_allclose(head["kernel"] / std, whole["score_head"]["kernel"], rtol=1e-6)
    assert f"score: (logits[0, 0] - {mean}) / {std}" in (adapter / "README.md").read_text()


def test_another_run_goes_on_with_the_adapter(finished, run_train, tmp_path):
    """Its first evaluation is the last of the stage that wrote it."""
    adapter = exported(finished, tmp_path / "adapter", "sft", "--adapter")
    config, stage = CONFIG.format(dir=finished, adapters=ADAPTERS), "  - {name: sft, algorithm: sft, "
    before, after = config.split("stages:\n")[0], config.split("\ndata:")[1]
    sft = next(line for line in config.splitlines() if line.startswith(stage))
    sft = sft.replace("lora: {", f"lora: {{path: {adapter}, ")
    text = f"{before}stages:\n{sft}\ndata:{after}".replace("/run}", "/more}")
    (tmp_path / "config.yaml").write_text(text.replace("reward_model: {num_steps: 2, batch_size: 8}\n", ""))
    done = run_train(["--config", tmp_path / "config.yaml"])
    assert done.returncode == 0, done.stderr
    first, more = (
        json.loads((finished / run / "summary.json").read_text())["sft"] for run in ("run", "more")
    )
    assert more["eval_perplexity_before"] == pytest.approx(first["eval_perplexity_after"], rel=1e-5)
    assert first["eval_perplexity_before"] > 1.05 * first["eval_perplexity_after"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "whole", "--adapter"], "--adapter: the stage whole has none, for all its weights were"),
        (["--stage", "sft", "--base", "x"], "--base x: would be ignored without --adapter"),
        (["--stage", "sft", "--adapter", "--role", "value"], "trains no value"),
    ],
)
def test_an_adapter_that_cannot_be_written_is_one_line(finished, tmp_path, capsys, flags, message):
    assert export.main(["--run", str(finished / "run"), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
