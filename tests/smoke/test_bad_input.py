"""Bad input that only shows when the run has begun: a clear line, the right exit code, nothing lost."""

import json
import sys

import pytest

from rlhf_jax import train
from tests.smoke.test_quickstart import SHORT

PPO_ONLY = """
run: {{dir: {dir}, log_every: 1}}
stages: [{{name: ppo, algorithm: ppo}}]
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 96}}
tokenizer: {{vocab_size: 400}}
data: {{max_prompt_length: 32, max_eval_records: 32}}
rewards: {{function: "judges:{function}"}}
rollout: {{max_new_tokens: 12}}
ppo: {{num_iterations: 4, batch_size: 16, num_epochs: 1, num_minibatches: 2, eval_every: 9}}
"""

JUDGES = """
calls = 0

def fails_later(prompts, completions):
    global calls
    calls += 1
    if calls > 4:  # two batches of the first evaluation, two iterations
        raise RuntimeError("the judge is out")
    return [0.0 for _ in completions]

def too_few(prompts, completions):
    return [0.0]

def none(prompts, completions):
    return [None for _ in completions]

def nan(prompts, completions):
    return [float("nan") for _ in completions]

def fills_the_disk(prompts, completions):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return [0.0 for _ in completions]

def wants_label(prompts, completions, label):
    return label

def nothing(prompts, completions):
    pass
"""


@pytest.fixture
def run_ppo(run_train, tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)

    def run(function, *args, **changes):
        config = tmp_path / "ppo.yaml"
        config.write_text(PPO_ONLY.format(dir=tmp_path / "run", function=function))
        return run_train(["--config", config, *args], cwd=tmp_path, **changes)

    return run


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Returns a function that gives stderr of the command, run here with eight devices, which ends with 2.

    refused(text of the configuration, *flags); nothing may be written.
    """
    (tmp_path / "judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(text, *flags):
        (tmp_path / "config.yaml").write_text(text)
        code = train.main(["--config", str(tmp_path / "config.yaml"), *map(str, flags)])
        sys.modules.pop("judges", None)
        said = capsys.readouterr().err
        assert code == 2, said
        assert not (tmp_path / "run").exists()
        return said

    return run


@pytest.mark.parametrize(
    "function, message",
    [
        ("too_few", "judges:too_few returned 1 scores; it must return a list of 16 numbers"),
        ("none", "judges:none returned None for row 0, where a finite number must stand"),
        ("nan", "judges:nan returned nan for row 0, where a finite number must stand"),
        ("nothing", "judges:nothing returned None; it must return a list of 16 numbers"),
    ],
)
def test_a_reward_function_that_returns_rubbish(run_ppo, function, message):
    done = run_ppo(function)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_reward_function_that_raises_loses_nothing(run_ppo, tmp_path):
    done = run_ppo("fails_later")
    assert done.returncode == 1
    assert "judges:fails_later raised RuntimeError: the judge is out" in done.stderr
    assert "Traceback" not in done.stderr
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1, 2]
    assert [path.name for path in (tmp_path / "run" / "ppo" / "checkpoints").iterdir()] == ["2"]
    (tmp_path / "judges.py").write_text(JUDGES.replace("calls > 4", "calls > 99"))
    done = run_ppo("fails_later")
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mesh.data", "3"], "must fill the mesh with a multiple of 3 (mesh.data 3)"),
        (
            ["--mesh.data", "16", "--ppo.batch_size", "32"],
            "mesh.data=16 does not fit the number of devices, 8",
        ),
        (["--mesh.tensor", "2"], "--mesh.tensor: must divide model.num_kv_heads = 1, got 2"),
        (["--data.max_prompt_length", "4"], "prompts are too long"),
        (["--rollout.max_new_tokens", "90"], "must be at most model.context_length = 96, got 32 + 90 = 122"),
        (
            ["--mesh.data", "8", "--ppo.batch_size", "24", "--ppo.num_minibatches", "2"],
            "must fill the mesh with a multiple of 8 (mesh.data 8), got 24 / num_minibatches",
        ),
        (
            ["--ppo.batch_size", "24"],
            "ppo.batch_size / num_minibatches is 12; it must be a multiple of 8",
        ),
        (["--rewards.function", "judges:wants_label"], "needs label, which the records do not have"),
        (["--rewards.gold", "judges:wants_label"], "needs label, which the records do not have"),
        (["--run.dir", "gs://bucket/run"], "--run.dir: 'gs://bucket/run' is not on this machine"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(refused, tmp_path, flags, message):
    assert message in refused(PPO_ONLY.format(dir=tmp_path / "run", function="too_few"), *flags)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "bad.jsonl:2"),
        (
            '{"prompt": "a", "completion": "\\ud800"}\n',
            "bad.jsonl:1: broken JSON: '\\ud800' is half of a pair",
        ),
        ("", "holds no records"),
        (
            '{"question": "a", "completion": "b"}\n',
            "no column 'prompt' (this stage reads prompt_completion: columns text or messages or "
            "prompt + completion); columns present: question, completion",
        ),
    ],
)
def test_data_files(refused, tmp_path, content, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    flags = ["--stages.sft.data.train", bad, "--stages.sft.data.eval", bad]
    assert message in refused(SHORT.format(dir=tmp_path / "run"), *flags)


def test_a_damaged_tokenizer(refused, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("[]")
    text = PPO_ONLY.format(dir=tmp_path / "run", function="too_few")
    said = refused(text, "--tokenizer.path", tmp_path / "tokenizer")
    assert f"{tmp_path}/tokenizer holds no tokenizer that transformers can load: TypeError" in said


def test_what_does_not_divide_is_told_together(refused, tmp_path):
    sizes = ["--mesh.data", "-1", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--model.num_kv_heads", "2"]
    flags = [*sizes, "--tokenizer.vocab_size", "401", "--ppo.batch_size", "24", "--ppo.num_minibatches", "4"]
    said = refused(PPO_ONLY.format(dir=tmp_path / "run", function="too_few"), *flags)
    assert "ppo.batch_size / num_minibatches is 6; it must be a multiple of 4" in said
    assert "'vocab' of size 401 is not a multiple of 2" in said


def test_all_that_is_wrong_with_independent_stages_is_told_at_once(refused, tmp_path):
    """The reward and the ppo stage start from sft: nothing is said of them while that has problems."""
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    other = "  - {{name: other, algorithm: sft, data: {{train: BAD, eval: BAD}}}}\nmodel:"
    text = SHORT.replace("model:", other, 1).replace("BAD", str(tmp_path / "bad.jsonl"))
    good = tmp_path / "good.jsonl"
    flags = ["--stages.sft.data.train", tmp_path / "bad.jsonl", "--stages.sft.data.eval", good]
    lines = refused(text.format(dir=tmp_path / "run"), *flags).removeprefix("rlhf_jax: ").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["stage sft", "data.train"], ["stage other", "data.train"], ["stage other", "data.eval"],
    ]  # fmt: skip


def test_dropped_and_cut_records_are_reported(run_ppo):
    done = run_ppo("too_few", "--data.max_prompt_length", "17")
    assert "[ppo] " in done.stderr and "records dropped (prompt longer than 17 tokens)" in done.stderr


def test_a_run_directory_below_a_file(run_ppo, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_ppo("too_few", "--run.dir", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"rlhf_jax: {tmp_path}/file/run: Not a directory"


def test_a_full_disk_during_training(run_ppo, tmp_path):
    """From the first evaluation on no file may have more than 20 kB: no checkpoint fits."""
    done = run_ppo("fills_the_disk")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"rlhf_jax: {tmp_path}/run" in done.stderr and "File too large" in done.stderr


SFT_ONLY = """
run: {{dir: {dir}/run}}
stages: [{{name: sft, algorithm: sft}}]
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 96}}
data: {{train: {dir}/demos.jsonl, eval: {dir}/demos.jsonl, max_length: 32, max_prompt_length: 16}}
sft: {{num_steps: 2, batch_size: 4}}
"""


def test_a_run_is_not_resumed_on_other_records(run_train, tmp_path):
    demos = [json.dumps({"prompt": f"a {i}", "completion": " b"}) for i in range(8)]
    (tmp_path / "demos.jsonl").write_text("\n".join(demos))
    (tmp_path / "sft.yaml").write_text(SFT_ONLY.format(dir=tmp_path))
    done = run_train(["--config", tmp_path / "sft.yaml"])
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "sft" / "result.json").unlink()  # as if it had been killed just before
    (tmp_path / "demos.jsonl").write_text("\n".join(reversed(demos)))
    refused = run_train(["--config", tmp_path / "sft.yaml"])
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "stage sft: the records of data.train are not those" in refused.stderr
    assert "until step 2; restore them, or choose another run.dir" in refused.stderr
    (tmp_path / "demos.jsonl").write_text("\n".join(demos))
    again = run_train(["--config", tmp_path / "sft.yaml"])
    assert again.returncode == 0, again.stderr
    assert "[sft] goes on after step 2" in again.stderr
