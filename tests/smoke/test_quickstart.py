"""The whole chain by the real command line, shortened: what a user finds in the run directory afterwards."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rlhf_jax import evaluate, export, sample
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.metrics import format_number
from rlhf_jax.models.scorers import read_scorer

SHORT = """
run: {{dir: {dir}, log_every: 1}}
stages:
  - {{name: sft, algorithm: sft}}
  - {{name: reward, algorithm: reward_model, from: sft}}
  - {{name: ppo, algorithm: ppo, from: sft, reward_from: reward}}
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 96}}
tokenizer: {{vocab_size: 400}}
data: {{max_prompt_length: 32, max_length: 96, max_eval_records: 32}}
rewards: {{gold: "rlhf_jax.data.synthetic:gold_reward"}}
sft: {{num_steps: 6, batch_size: 16, eval_every: 4}}
reward_model: {{num_steps: 5, batch_size: 16}}
rollout: {{max_new_tokens: 12}}
ppo: {{num_iterations: 4, batch_size: 16, num_epochs: 1, num_minibatches: 2, eval_every: 2}}
checkpoint: {{every: 2}}
"""


@pytest.fixture(scope="module")
def finished(run_train, tmp_path_factory):
    """Returns (run directory, configuration file, what the command wrote)."""
    directory = tmp_path_factory.mktemp("quickstart")
    config = directory / "short.yaml"
    config.write_text(SHORT.format(dir=directory / "run"))
    done = run_train(["--config", config, "--json"], optimized=True)
    assert done.returncode == 0, done.stderr
    return directory / "run", config, done


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_summary_has_the_documented_names(finished):
    run, _, done = finished
    summary = json.loads((run / "summary.json").read_text())
    assert {"eval_perplexity_before", "eval_perplexity_after", "seconds"} <= summary["sft"].keys()
    assert {"eval_accuracy", "accuracy_ceiling", "seconds"} <= summary["reward"].keys()
    assert {"gold_before", "gold_after", "kl", "seconds"} <= summary["ppo"].keys()
    assert 0.7 < summary["reward"]["accuracy_ceiling"] < 1
    assert summary["sft"]["eval_perplexity_after"] < summary["sft"]["eval_perplexity_before"]
    assert json.loads(done.stdout) == {"run": str(run), "summary": summary}
    for words in ("eval perplexity", "accuracy ceiling", "gold", "kl", "seconds", str(run)):
        assert words in done.stderr


def test_every_step_is_logged_once(finished):
    run, _, _ = finished
    counts = Counter((line["stage"], line["step"]) for line in lines(run))
    expected = (
        {("sft", s) for s in range(7)} | {("reward", s) for s in range(6)} | {("ppo", s) for s in range(5)}
    )
    assert counts == Counter(expected)


def test_metrics_of_ppo(finished):
    run, _, _ = finished
    last = [line for line in lines(run) if line["stage"] == "ppo"][-1]
    for name in (
        "policy/kl", "policy/kl_per_token", "policy/approx_kl", "policy/ratio", "policy/ratio_gap",
        "policy/clip_frac", "policy/entropy", "policy/grad_norm", "policy/sampler_gap", "value/grad_norm",
        "value/explained_variance", "loss/policy", "loss/value",
        "reward/score", "reward/score_std", "reward/length_correlation",
        "rollout/eos_rate", "rollout/length", "rollout/length_p95", "rollout/distinct_2",
        "perf/tokens_per_s", "perf/rollout_seconds", "perf/score_seconds",
        "eval/gold", "eval/score", "eval/policy/kl",
    ):  # fmt: skip
        assert isinstance(last[name], float), name
    assert last["policy/ratio_gap_first"] < 1e-5
    assert last["policy/sampler_gap_max"] < 1e-4


def test_samples(finished):
    run, _, _ = finished
    files = sorted(path.name for path in (run / "samples").iterdir())
    assert files == ["ppo-000000.jsonl", "ppo-000002.jsonl", "ppo-000004.jsonl"]
    rows = [json.loads(line) for line in (run / "samples" / files[-1]).read_text().splitlines()]
    assert len(rows) == 8
    assert all({"stage", "step", "prompt", "completion", "score", "gold"} <= row.keys() for row in rows)
    assert all("Customer:" in row["prompt"] for row in rows)


def test_export_is_a_hugging_face_directory(finished):
    run, _, _ = finished
    config = AutoConfig.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert config.model_type == "llama" and config.num_key_value_heads == 1
    assert len(tokenizer) <= config.vocab_size == 400
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    generation = GenerationConfig.from_pretrained(run / "export")
    assert (generation.do_sample, generation.max_new_tokens) == (True, 12)
    assert (generation.temperature, generation.top_k, generation.top_p) == (1.0, 0, 1.0)
    card = ModelCard.load(run / "export" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.tags == ["rlhf_jax", "ppo"]
    gold = json.loads((run / "summary.json").read_text())["ppo"]["gold_after"]
    assert "| ppo | gold | " in card.text and f"| {format_number(gold)} |" in card.text


def test_any_stage_with_a_policy_is_exported_by_name(finished, tmp_path, capsys):
    run, _, _ = finished
    flags = ["--run", str(run), "--stage", "sft", "--out", str(tmp_path / "out")]
    assert export.main([*flags, "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "sft"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}
    final = load_file(run / "export" / "model.safetensors")
    assert tensors.keys() == final.keys()
    assert any(np.any(tensors[name] != final[name].astype(tensors[name].dtype)) for name in final)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| sft | eval perplexity |" in card.text and "| ppo |" not in card.text


def test_a_reward_model_is_exported_with_its_normaliser(finished, tmp_path, capsys):
    """Read again from the directory, it has the accuracy and margin of the stage's own checkpoint."""
    run, _, _ = finished
    assert export.main(["--run", str(run), "--stage", "reward", "--out", str(tmp_path / "judge")]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "judge")
    assert (config.num_labels, config.score_role) == (1, "reward")
    assert config.score_normalizer["mean"] != 0
    card = ModelCard.load(tmp_path / "judge" / "README.md")
    assert card.data.pipeline_tag == "text-classification" and "score_normalizer" in card.text
    capsys.readouterr()
    found = []
    for model in (run / "reward", tmp_path / "judge"):
        flags = ["--model", str(model), "--data", "synthetic", "--data.max_eval_records", "32", "--json"]
        assert evaluate.main(flags) == 0
        found.append(json.loads(capsys.readouterr().out))
    for figure in ("accuracy", "margin", "loss"):
        assert found[0][figure] == pytest.approx(found[1][figure], rel=1e-5)


def test_a_value_model_is_exported_on_demand(finished, tmp_path):
    run, _, _ = finished
    flags = ["--run", str(run), "--stage", "ppo", "--role", "value", "--out", str(tmp_path / "value")]
    assert export.main(flags) == 0
    scorer = read_scorer(tmp_path / "value")
    assert scorer.role == "value" and scorer.normalizer.mean != 0  # the bias, which was trained
    assert "score.weight" in load_file(tmp_path / "value" / "model.safetensors")


def test_a_padding_token_that_ends_texts_gives_way_to_another():
    tokenizer = train_tokenizer(["text"] * 9, 260)
    tokenizer.pad_token = tokenizer.eos_token
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    assert export.own_pad(tokenizer, stop=2) == ids and tokenizer.pad_token_id == 1
    tokenizer.pad_token = "<|pad|>"
    assert export.own_pad(tokenizer, stop=2) == ids | {"pad_token_id": 0}
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's
    assert export.own_pad(tokenizer, stop=2) == {"bos_token_id": 2, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--run", "{run}/sft", "--out", "{new}"],
            "/sft is not the directory of a run: it has no config.yaml",
        ),
        (["--run", "{run}", "--stage", "stf", "--out", "{new}"], "has no stage 'stf'; did you mean 'sft'"),
        (["--run", "{run}", "--out", "{run}"], "exists already; choose another directory"),
        (
            ["--run", "{run}", "--stage", "sft", "--role", "value", "--out", "{new}"],
            "trains no value; name the",
        ),
    ],
)
def test_an_export_that_cannot_be_made_is_one_line(finished, tmp_path, capsys, flags, message):
    names = {"run": finished[0], "new": tmp_path / "new"}
    assert export.main([flag.format(**names) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("stage", "figure", "key"),
    [("sft", "perplexity", "eval_perplexity_after"), ("reward", "accuracy", "eval_accuracy")],
)
def test_evaluate_finds_what_the_stage_found(finished, capsys, stage, figure, key):
    run, _, _ = finished
    flags = ["--model", str(run / stage), "--data", "synthetic", "--data.max_eval_records", "32", "--json"]
    assert evaluate.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert found[figure] == pytest.approx(summary[stage][key], rel=1e-4)
    assert (found["records"], found["dropped"], found["cut"]) == (32, 0, 0)


def test_evaluate_takes_of_a_run_the_stage_that_the_data_fit(finished, tmp_path, capsys):
    run, _, _ = finished
    texts = {"text": "Customer: the pen broke.\nReply: Sorry."}
    pairs = {"question": "Customer: the pen broke.\nReply:", "chosen": " Sorry.", "rejected": " So?"}
    for record, role in ((texts, "policy"), (pairs, "reward")):
        (tmp_path / "data.jsonl").write_text(json.dumps(record))
        flags = ["--model", str(run), "--data", str(tmp_path / "data.jsonl"), "--json"]
        flags += ["--data.columns.prompt", "question"] if role == "reward" else []
        assert evaluate.main([*flags, "--mesh.data", "1", "--mesh.fsdp", "-1"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["role"], found["records"]) == (role, 1)
        assert found["model"] == str(run / ("ppo" if role == "policy" else "reward"))


def test_evaluate_puts_the_template_of_training_around_prompts(finished, tmp_path, capsys):
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    (manifest,) = (tmp_path / "run" / "sft" / "checkpoints").glob("6/manifest.json")
    told = json.loads(manifest.read_text())
    told["info"]["text"] |= {"prompt_template": "Q: {prompt}", "pad": 7}
    manifest.write_text(json.dumps(told))
    found = []
    for where, prompt in ((tmp_path / "run", "my cup broke."), (run, "Q: my cup broke.")):
        (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": prompt, "completion": " Sorry."}))
        flags = ["--model", str(where / "sft"), "--data", str(tmp_path / "data.jsonl"), "--json"]
        assert evaluate.main([*flags, "--mesh.data", "1", "--mesh.fsdp", "-1"]) == 0
        found.append(json.loads(capsys.readouterr().out)["nll"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{run}"], "no file or directory|no such file"),
        (["--model", "{run}/none"], "not a Hugging Face model directory: it has no config.json"),
        (["--model", "{run}/reward", "--data", "{config}"], "known extensions"),
        (["--model", "{run}/sft", "--data", "synthetic", "--data.formt", "text"], "did you mean 'format'"),
        (["--model", "{run}/sft", "--data", "synthetic", "--sft.num_steps", "3"], "--sft.num_steps: is not"),
        (["--model", "{run}/sft", "--data", "synthetic", "--model.num_layers", "3"], "would be ignored"),
        (["--model", "{run}/sft", "--data", "synthetic", "--data.length_buckets", "2"], "is not read here"),
        (["--model", "{run}/sft", "--data", "synthetic", "--data.max_length", "97"], "model's context of 96"),
        (
            ["--model", "{run}/export", "--data", "synthetic", "--tokenizer.path", "{big}"],
            "has 401 tokens, but",
        ),
        (["--model", "{run}/sft", "--data", "synthetic", "--tokenizer.path", "{big}"], "another tokenizer"),
        (["--model", "{run}/sft", "--data", "synthetic", "--batch_size", "0"], "batch_size: must be >= 1"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(finished, tmp_path, capsys, flags, message):
    run, config, _ = finished
    larger = AutoTokenizer.from_pretrained(run / "tokenizer")
    larger.add_tokens([f"<|{i}|>" for i in range(401 - len(larger))])
    larger.save_pretrained(tmp_path / "big")
    flags = [flag.format(run=run, config=config, big=tmp_path / "big") for flag in flags]
    assert evaluate.main([*flags, *([] if "--data" in flags else ["--data", "none.jsonl"])]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_a_run_is_sampled_as_its_export_is(finished, capsys):
    """Of a run the last policy, on the held-out prompts of its task."""
    run, _, _ = finished
    found = []
    for model in (run, run / "export"):
        flags = ["--model", str(model), "--data", "synthetic", "--rollout.max_new_tokens", "6", "--json"]
        assert sample.main(flags) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    of_run, of_export = found
    assert len(of_run) == 192 and all(line["prompt"].startswith("Customer:") for line in of_run)
    assert [line["completion"] for line in of_run] == [line["completion"] for line in of_export]


def test_the_same_command_again_trains_nothing(finished, run_train):
    run, config, first = finished
    before = (run / "metrics.jsonl").read_text()
    done = run_train(["--config", config, "--json"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == first.stdout
    assert (run / "metrics.jsonl").read_text() == before


def test_another_run_starts_from_this_ones_stages(finished, run_train, tmp_path):
    """A stage in another run's directory serves as `from` and `reward_from`: the first evaluation agrees."""
    run, _, _ = finished
    config = tmp_path / "ppo.yaml"
    text = SHORT.format(dir=tmp_path / "run")
    start = f"  - {{name: ppo, algorithm: ppo, from: {run}/sft, reward_from: {run}/reward}}\n"
    text = "".join(
        start if "name: ppo" in line else line.replace("max_length: 96, ", "")
        for line in text.splitlines(keepends=True)
        if not line.startswith(
            ("model", "tokenizer", "sft", "reward_model", "  - {name: sft", "  - {name: reward")
        )
    )
    config.write_text(text)
    done = run_train(["--config", config, "--ppo.num_iterations", "1"])
    assert done.returncode == 0, done.stderr
    first, again = (
        next(line for line in lines(where) if line["stage"] == "ppo") for where in (run, tmp_path / "run")
    )
    for name in ("eval/policy/nll", "eval/rollout/length"):
        assert again[name] == pytest.approx(first[name], rel=0.2), name
    # The samples differ, as another place in the chain has another key: 4 standard errors of two means of 32.
    std = next(line["reward/score_std"] for line in lines(run) if "reward/score_std" in line)
    assert again["eval/score"] == pytest.approx(first["eval/score"], abs=4 * std * (2 / 32) ** 0.5)
    assert np.isclose(again["eval/policy/kl"], 0, atol=1e-4)


def test_a_run_directory_of_another_configuration_is_refused(finished, run_train):
    _, config, _ = finished
    done = run_train(["--config", config, "--ppo.clip_eps", "0.3"])
    assert done.returncode == 2
    assert "ppo.clip_eps" in done.stderr and "run.dir" in done.stderr and "Traceback" not in done.stderr
