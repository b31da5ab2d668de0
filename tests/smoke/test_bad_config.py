"""The real command line with a wrong configuration: every problem on stderr, exit code 2, no traceback."""

from __future__ import annotations

import pytest

from rlhf_jax.command_line import read_config
from rlhf_jax.config_file import dump_config
from tests.configurations import CHAIN


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.replace("RUN", str(tmp_path / "run")))
    return path


@pytest.fixture
def refused(run_train, tmp_path):
    """Returns a function that runs train, expects it to refuse, and gives the lines on stderr."""

    def refused(*args) -> list[str]:
        done = run_train(args)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return done.stderr.splitlines()

    return refused


def test_every_problem_in_one_message(refused, config):
    config.write_text(
        config.read_text() + "sft: {batch_sise: 8}\nppo: {clip_eps: high, gamma: null}\n"
        "data: {train: nowhere.jsonl}\nreward_model: {microbatch_size: 5}\n"
    )
    assert refused(
        "--config", config, "--gae_lambda", "1e-5", "--mesh.tensor", "3", "--ppo.kl_horizon=5"
    ) == [
        f"rlhf_jax: 9 problems in {config}:",
        "  --gae_lambda: no such flag; did you mean --ppo.gae_lambda or --trpo.gae_lambda?",
        "  sft.batch_sise: no such option; did you mean 'batch_size'?",
        "  ppo.clip_eps: expected a number, got 'high'",
        "  ppo.gamma: expected a number, got null",
        "  --mesh.tensor: must divide model.num_heads = 4 and model.num_kv_heads = 4, got 3",
        "  data.train: there is no file or directory 'nowhere.jsonl'",
        "  data.eval: must be given: held-out records, such as a slice of 'nowhere.jsonl'",
        "  reward_model.microbatch_size: must divide batch_size, got 5 for 32; 1, 2, 4, 8, 16, 32 do",
        "  --ppo.kl_horizon: would be ignored: ppo.kl_controller is 'fixed'",
    ]


@pytest.mark.parametrize(
    "args, line",
    [
        ([], "--config: must be given: a YAML file, such as configs/quickstart.yaml"),
        (["--json"], "--config: must be given: a YAML file, such as configs/quickstart.yaml"),
    ],
)
def test_no_configuration(refused, args, line):
    assert refused(*args) == ["rlhf_jax: 1 problem in the command line:", f"  {line}"]
    assert refused("--config", "nowhere.yaml") == [
        "rlhf_jax: 1 problem in nowhere.yaml:",
        "  --config nowhere.yaml: there is no such file",
    ]


def test_a_key_given_twice(refused, config):
    config.write_text(config.read_text() + "run: {dir: elsewhere}\n")
    assert refused("--config", config) == [
        f"rlhf_jax: 1 problem in {config}:",
        f"  {config}:7: key 'run' is given twice",
    ]


def test_a_run_directory_of_another_configuration(refused, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(read_config(["--config", str(config)])))
    (line,) = refused("--config", config, "--run.seed", "7")[1:]
    assert "belongs to a run of another configuration: run.seed was 0, is 7; choose another run.dir" in line


def test_help_and_print_config_go_to_stdout(run_train, config, tmp_path):
    help_ = run_train(["--help"])
    assert (help_.returncode, help_.stderr) == (0, "")
    assert "--ppo.clip_eps  a number > 0; default 0.2" in help_.stdout
    printed = run_train(["--config", config, "--print_config", "--ppo.clip_eps=0.1"])
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    again = run_train(["--config", tmp_path / "printed.yaml", "--print_config"])
    assert again.stdout == printed.stdout
    assert "clip_eps: 0.1" in again.stdout
