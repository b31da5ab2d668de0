"""Bad input that only shows when the run has begun: a clear line, the right exit code, nothing lost."""

import json

import pytest

from tests.smoke.test_quickstart import SHORT

PPO_ONLY = """
run: {{dir: {dir}, log_every: 1}}
stages: [{{name: ppo, algorithm: ppo}}]
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, mlp_size: 48, context_length: 96}}
tokenizer: {{vocab_size: 400}}
data: {{max_prompt_length: 32, max_length: 96, max_eval_records: 32}}
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
        (["--mesh.data", "3"], "mesh.data=3"),
        (["--mesh.data", "1", "--mesh.tensor", "2"], "num_kv_heads"),
        (["--data.max_prompt_length", "4"], "prompts are too long"),
        (["--rollout.max_new_tokens", "90"], "do not fit the model's context of 96"),
        (
            ["--mesh.data", "8", "--ppo.batch_size", "24", "--ppo.num_minibatches", "2"],
            "must be a multiple of 8",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(run_ppo, tmp_path, flags, message):
    done = run_ppo("too_few", *flags, env={"JAX_NUM_CPU_DEVICES": "8"})
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "bad.jsonl:2"),
        ("", "empty"),
        ('{"question": "a", "completion": "b"}\n', "question"),
    ],
)
def test_data_files(run_train, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    config = tmp_path / "short.yaml"
    config.write_text(SHORT.format(dir=tmp_path / "run"))
    flags = [
        "--stages.sft.data.train",
        str(tmp_path / "bad.jsonl"),
        "--stages.sft.data.eval",
        str(tmp_path / "bad.jsonl"),
    ]
    done = run_train(["--config", config, *flags])
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
