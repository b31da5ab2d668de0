"""The command line and the configuration file: what they mean."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax import algo_config, config, offline_config, online_config
from rlhf_jax.command_line import ConfigError, help_text, read_command_line, read_config
from rlhf_jax.config_file import dump_config
from rlhf_jax.options import OPTIONS, SECTIONS
from tests.configurations import CHAIN
from tests.conftest import ROOT


def stages(cfg: config.Config) -> dict[str, config.StageConfig]:
    return {stage.name: stage for stage in cfg.stages}


# What a good configuration means


def test_a_chain_of_defaults(write):
    cfg = read_config(["--config", write(CHAIN)])
    sft, reward, ppo = cfg.stages
    assert (sft.start_from, reward.start_from, ppo.start_from) == ("", "sft", "sft")
    assert (sft.reward_from, ppo.reward_from) == ("", "reward")
    assert sft.settings == offline_config.SFTConfig()
    assert reward.settings == offline_config.RewardModelConfig()
    assert ppo.settings == online_config.PPOConfig()
    assert all(stage.optimizer == config.OptimizerConfig() for stage in cfg.stages)
    assert all(stage.run is cfg.run or stage.run == cfg.run for stage in cfg.stages)


def test_a_stages_own_options_go_before_the_common_ones_key_by_key(write):
    text = CHAIN + "optimizer: {learning_rate: 1e-4, warmup_steps: 7}\n"
    text = text.replace("reward_from: reward}", "reward_from: reward, optimizer: {learning_rate: 3e-5}}")
    found = stages(read_config(["--config", write(text)]))
    assert found["sft"].optimizer.learning_rate == 1e-4
    assert found["ppo"].optimizer.learning_rate == 3e-5
    assert found["ppo"].optimizer.warmup_steps == 7


def test_a_stage_has_the_architecture_of_where_it_starts_and_its_own_dtype(write):
    text = CHAIN + "model: {hidden_size: 32, remat: full}\n"
    text = text.replace("reward_from: reward}", "reward_from: reward, model: {dtype: bfloat16}}")
    found = stages(read_config(["--config", write(text)]))
    assert found["ppo"].model == dataclasses.replace(found["sft"].model, dtype="bfloat16")
    assert (found["ppo"].model.hidden_size, found["ppo"].model.remat) == (32, "full")


@pytest.mark.parametrize(
    "flags, read, value",
    [
        (["--optimizer.learning_rate", "1e-5"], lambda s: s["sft"].optimizer.learning_rate, 1e-5),
        (["--optimizer.learning_rate=1e-5"], lambda s: s["sft"].optimizer.learning_rate, 1e-5),
        (["--ppo.kl_coef", "1"], lambda s: s["ppo"].settings.kl_coef, 1.0),
        (["--ppo.whiten_rewards", "true"], lambda s: s["ppo"].settings.whiten_rewards, True),
        (["--ppo.gamma=0.5"], lambda s: s["ppo"].settings.gamma, 0.5),
        (["--mesh.data", "-1"], lambda s: s["ppo"].mesh.data, -1),
        (["--stages.ppo.ppo.clip_eps", "0.3"], lambda s: s["ppo"].settings.clip_eps, 0.3),
        (["--stages.reward.optimizer.beta1=0.5"], lambda s: s["reward"].optimizer.beta1, 0.5),
        (["--stages.reward.optimizer.beta1=0.5"], lambda s: s["sft"].optimizer.beta1, 0.9),
        (["--run.dir", "2024"], lambda s: s["sft"].run.dir, "2024"),  # text stays text
        (["--run.dir=a=b"], lambda s: s["sft"].run.dir, "a=b"),
        (["--model.num_kv_heads", "2"], lambda s: s["ppo"].model.num_kv_heads, 2),
    ],
)
def test_flags_override_the_file(write, flags, read, value):
    found = read(stages(read_config(["--config", write(CHAIN), *flags])))
    assert found == value
    assert type(found) is type(value)


def test_numbers_of_a_file_are_read_as_yaml_1_2(write):
    text = CHAIN + "optimizer: {learning_rate: 1e-5, eps: 2.5E-6, weight_decay: 010}\n"
    optimizer = read_config(["--config", write(text)]).stages[0].optimizer
    assert (optimizer.learning_rate, optimizer.eps, optimizer.weight_decay) == (1e-5, 2.5e-6, 10.0)


def test_environment_variables_in_strings(write, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").touch()
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    text = CHAIN + "data: {train: '${SOME_DATA}/train.jsonl[:9]', eval: '${SOME_DATA}/train.jsonl[9:]'}\n"
    data = read_config(["--config", write(text)]).stages[0].data
    assert data.train == f"{tmp_path}/train.jsonl[:9]"


FILES = """
run: {dir: RUN, seed: 3, tensorboard: true}
mesh: {data: 2, fsdp: 1, tensor: 2}
tokenizer: {path: 'hub:org/name@v1', eos_token: "no"}
data: {train: "FILE[:7]", eval: "FILE", columns: {prompt: "1e-5", completion: "${}"}}
model: {remat: dots}
stages:
  - {name: reward, algorithm: reward_model, from: DIRECTORY, reward_model: {normalize_on: chosen}}
  - name: again
    algorithm: ppo
    from: DIRECTORY
    reward_from: reward
    ppo: {kl_controller: adaptive, kl_target: 3, missing_eos: subtract, missing_eos_value: 2}
    rewards: {function: "math:sin", function_weight: 0.5}
"""


MIXED = CHAIN + 'data: {train: {"FILE[:7]": 3, "hub:a/b:train": 0.001}, eval: "FILE"}\n'


@pytest.mark.parametrize("text", [CHAIN, FILES, MIXED])
def test_print_config_is_a_file_of_the_same_configuration(text, write, tmp_path, capsys):
    file = tmp_path / "a$${HOME}.jsonl"
    Path(str(file).replace("$$", "$")).touch()
    text = text.replace("FILE", str(file)).replace("DIRECTORY", str(tmp_path))
    path = write(text)
    cfg = read_config(["--config", path])
    with pytest.raises(SystemExit) as stop:
        read_config(["--config", path, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed == dump_config(cfg)
    assert read_config(["--config", write(printed)]) == cfg


def test_mixture_is_given_by_file_or_flag(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    mixture = "{'~/a.jsonl[:5]': 3, '${SOME_DATA}/b.jsonl': 1}"
    by_file = write(CHAIN + f"data: {{train: {mixture}, eval: ~/a.jsonl}}\n")
    data = read_config(["--config", by_file]).stages[0].data
    assert data.train == data.sources == {f"{tmp_path}/a.jsonl[:5]": 3.0, f"{tmp_path}/b.jsonl": 1.0}
    by_flag = write(CHAIN + "data: {eval: ~/a.jsonl}\n")
    assert read_config(["--config", by_flag, "--data.train", mixture]).stages[0].data == data
    one = read_config(["--config", by_flag, "--data.train", "~/b.jsonl"]).stages[0].data
    assert one.train == f"{tmp_path}/b.jsonl"
    assert one.sources == {f"{tmp_path}/b.jsonl": 1.0}


@pytest.mark.parametrize(
    "options",
    [
        "optimizer: {name: muon, momentum: 0.9, eps: 1e-6}",
        "optimizer: {schedule: wsd, decay_fraction: 0.2, end_fraction: 0.1}",
        "optimizer: {name: lion, beta2: 0.95, state_dtype: bfloat16, stochastic_rounding: false}",
        "model: {param_dtype: bfloat16}\noptimizer: {name: adafactor, stochastic_rounding: true}",
    ],
)
def test_options_of_the_optimiser_that_are_read(write, problems, options):
    assert problems(f"{CHAIN}{options}\n") == []
    cfg = read_config(["--config", write(f"{CHAIN}{options}\n")])
    assert read_config(["--config", write(dump_config(cfg))]) == cfg


def test_variable_that_makes_two_sources_one_is_a_problem(problems, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_DATA", "README.md")
    monkeypatch.chdir(ROOT)
    text = CHAIN + "data: {train: {'${SOME_DATA}': 1, README.md: 2}, eval: README.md}"
    assert problems(text) == ["data.train: '${SOME_DATA}' and 'README.md' are the same"]


def test_the_quickstart_file_is_good_and_round_trips(write):
    cfg = read_config(["--config", str(ROOT / "configs" / "quickstart.yaml")])
    assert read_config(["--config", write(dump_config(cfg))]) == cfg


def test_json_is_told_beside_the_configuration(write):
    path = write(CHAIN)
    assert read_command_line(["--config", path])[1] is False
    cfg, wants_json = read_command_line(["--json", f"--config={path}"])
    assert wants_json
    assert len(cfg.stages) == 3


def test_help_names_every_option_with_a_text(capsys):
    with pytest.raises(SystemExit) as stop:
        read_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text == help_text() + "\n"
    for section, options in OPTIONS.items():
        for option in options.values():
            alike = [of for of, cls in SECTIONS.items() if issubclass(SECTIONS[section], cls)]
            assert any(f"--{of}.{option.name}  " in text for of in alike)
            assert option.text, f"{section}.{option.name} has no docstring"
    assert "--ppo.clip_eps  a number > 0; default 0.2\n      Clip of the policy ratio." in text
    assert "--dapo.clip_eps_high  a number >= 0; default 0.28\n" in text  # its text is with grpo's
    assert "--dapo.clip_eps  " not in text
    assert "--sft.num_steps  an integer >= 1; default 300" in text
    assert "Integers are at most 2147483647 where nothing else is said." in text
    assert max(map(len, text.splitlines())) <= 130


def test_jax_is_not_imported_before_the_configuration_is_known(write):
    code = "import sys; from rlhf_jax.command_line import read_config; read_config(sys.argv[1:]); "
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "--config", write(CHAIN)], check=True, cwd=ROOT)


# The file itself


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "PATH: expected sections such as `run:` and `stages:`, got null"),
        ("- a\n- b\n", "PATH: expected sections such as `run:` and `stages:`, got ['a', 'b']"),
        ("run: {dir: x}\nsft: {}\nrun: {dir: y}\n", "PATH:3: key 'run' is given twice"),
        ("run:\n  dir: x\n  seed: 1\n  dir: y\n", "PATH:4: key 'dir' is given twice"),
        ("run: {dir: x}\nsft: {a: 1\n", "PATH:3: "),
        ("run: {dir: x}\n sft: 3\n", "PATH:2: "),
        ("a: !!python/object/apply:os.getcwd []\n", "PATH:1: could not determine a constructor for the tag"),
        ("{a: 1}: 2\n", "PATH:1: a key must be a name"),
    ],
)
def test_broken_files(write, text, line):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        read_config(["--config", path])
    (found,) = error.value.problems
    assert found.startswith(line.replace("PATH", path))


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"--config nowhere.yaml: there is no such file"):
        read_config(["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match=r"is a directory; name a file in it"):
        read_config(["--config", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--config: must be given"):
        read_config([])
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: \xe9}\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: not UTF-8 text: .* at byte 11"):
        read_config(["--config", str(tmp_path / "latin.yaml")])


# The schema


def test_defaults_are_valid_and_every_field_has_a_reader():
    nodes = [
        node
        for path in (ROOT / "rlhf_jax").rglob("*.py")
        if path.name != "unread.py"
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"]
    read |= {ast.literal_eval(call.args[1]) for call in calls if isinstance(call.args[1], ast.Constant)}
    for section, options in OPTIONS.items():
        for option in options.values():
            assert option.name in read, f"nothing reads {section}.{option.name}"
            if isinstance(option.default, str | int | float | bool | dict):
                assert option.read(option.default) == option.default


def test_each_algorithm_has_a_section():
    from rlhf_jax.algos.registry import ALGORITHMS

    assert algo_config.ALGORITHM_SECTIONS.keys() == ALGORITHMS.keys()


def test_what_is_printed_as_yaml_reads_the_same():
    from rlhf_jax import strict_yaml

    values = {
        "a": [
            "1e-5",
            1e-5,
            "no",
            "true",
            True,
            "010",
            10,
            "",
            "~",
            None,
            "null",
            "1:30",
            "2024-01-01",
            ".inf",
        ]
    }
    assert strict_yaml.load(strict_yaml.dump(values), "text") == values
    assert json.dumps(strict_yaml.load("[1_000, 0x10, 1:30, 1., .5, +1]", "text")) == (
        '["1_000", "0x10", "1:30", 1.0, 0.5, 1]'
    )
