"""The command line and the configuration file: what they mean, and what is said of what is wrong."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax import config, config_checks
from rlhf_jax.command_line import ConfigError, help_text, parse, read_command_line, read_config
from rlhf_jax.config_file import dump_config
from rlhf_jax.options import OPTIONS
from tests.conftest import ROOT

CHAIN = """
run: {dir: RUN}
stages:
  - {name: sft, algorithm: sft}
  - {name: reward, algorithm: reward_model, from: sft}
  - {name: ppo, algorithm: ppo, from: sft, reward_from: reward}
"""


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a configuration file with RUN replaced, and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text.replace("RUN", str(tmp_path / "run")))
        return str(path)

    return write


@pytest.fixture
def problems(write):
    """Returns a function that gives the problems of a file's text and flags; none for a good one."""

    def problems(text: str, *flags: str) -> list[str]:
        try:
            read_config(["--config", write(text), *flags])
        except ConfigError as error:
            return error.problems
        return []

    return problems


def stages(cfg: config.Config) -> dict[str, config.StageConfig]:
    return {stage.name: stage for stage in cfg.stages}


# What a good configuration means


def test_a_chain_of_defaults(write):
    cfg = read_config(["--config", write(CHAIN)])
    sft, reward, ppo = cfg.stages
    assert (sft.start_from, reward.start_from, ppo.start_from) == ("", "sft", "sft")
    assert (sft.reward_from, ppo.reward_from) == ("", "reward")
    assert sft.settings == config.SFTConfig()
    assert reward.settings == config.RewardModelConfig()
    assert ppo.settings == config.PPOConfig()
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
            assert f"--{section}.{option.name}  " in text
            assert option.text, f"{section}.{option.name} has no docstring"
    assert "--ppo.clip_eps  a number > 0; default 0.2\n      Clip of the policy ratio." in text
    assert "--sft.num_steps  an integer >= 1; default 300" in text
    assert "Integers are at most 2147483647 where nothing else is said." in text
    assert max(map(len, text.splitlines())) <= 130


def test_jax_is_not_imported_before_the_configuration_is_known(write):
    code = "import sys; from rlhf_jax.command_line import read_config; read_config(sys.argv[1:]); "
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "--config", write(CHAIN)], check=True, cwd=ROOT)


# One problem, one line


@pytest.mark.parametrize(
    "addition, flags, line",
    [
        ("ppo: {clip_epz: 0.1}", [], "ppo.clip_epz: no such option; did you mean 'clip_eps'?"),
        ("", ["--ppo.clip_epz=0.1"], "--ppo.clip_epz: no such option; did you mean 'clip_eps'?"),
        ("ppo: {clip_eps: abc}", [], "ppo.clip_eps: expected a number, got 'abc'"),
        ("ppo: {clip_eps: '0.1'}", [], "ppo.clip_eps: expected a number, got '0.1'"),
        ("ppo: {clip_eps: true}", [], "ppo.clip_eps: expected a number, got true"),
        ("ppo: {clip_eps: null}", [], "ppo.clip_eps: expected a number, got null"),
        ("ppo: {clip_eps: .inf}", [], "ppo.clip_eps: must be a finite number, got inf"),
        ("", ["--ppo.clip_eps", "null"], "--ppo.clip_eps: expected a number, got null"),
        ("sft: {batch_size: 0}", [], "sft.batch_size: must be >= 1, got 0"),
        ("sft: {batch_size: 1.5}", [], "sft.batch_size: expected an integer, got 1.5"),
        ("sft: {batch_size: true}", [], "sft.batch_size: expected an integer, got true"),
        ("optimizer: {beta1: 1}", [], "optimizer.beta1: must be >= 0 and < 1, got 1"),
        ("", ["--run.seed=4294967296"], "--run.seed: must be >= 0 and < 4294967296, got 4294967296"),
        ("", ["--run.seed=-1"], "--run.seed: must be >= 0 and < 4294967296, got -1"),
        ("sft: {num_steps: 3000000000}", [], "sft.num_steps: must be <= 2147483647, got 3000000000"),
        (
            "tokenizer: {vocab_size: 2147483648}",
            [],
            "tokenizer.vocab_size: must be <= 2147483647, got 2147483648",
        ),
        ("mesh: {fsdp: 3000000000}", [], "mesh.fsdp: must be <= 2147483647, got 3000000000"),
        (
            "ppo: {num_iterations: 200000000}",
            [],
            "ppo.num_iterations: num_iterations * num_epochs * num_minibatches must be at most 2147483647, "
            "got 3200000000",
        ),
        (
            "sft: {num_steps: 40000, batch_size: 65536}",
            [],
            "sft.batch_size: 65536 records in each of 40000 updates must be at most 2147483647 in all, "
            "got 2621440000",
        ),
        ("ppo: {whiten_rewards: yes}", [], "ppo.whiten_rewards: expected true or false, got 'yes'"),
        ("ppo: {whiten_rewards: 1}", [], "ppo.whiten_rewards: expected true or false, got 1"),
        ("data: {train: 3}", [], "data.train: expected a string, or a mapping of strings to weights, got 3"),
        (
            "data: {columns: [a]}",
            [],
            "data.columns: expected a mapping of names to strings, got ['a']",
        ),
        (
            "optimizer: {schedule: cosin}",
            [],
            "optimizer.schedule: must be one of 'constant', 'linear', 'cosine', got 'cosin'; "
            "did you mean 'cosine'?",
        ),
        ("ppo:", [], "ppo: expected options and their values, got null"),
        ("modle: {}", [], "modle: no such section; did you mean 'model'?"),
        (
            "ppo: {learning_rate: 1}",
            [],
            "ppo.learning_rate: no such option; did you mean 'optimizer.learning_rate'?",
        ),
        (
            "data: {train: '${NOT_SET_ANYWHERE}/x', eval: '${NOT_SET_ANYWHERE}/y', columns: {text: t}}",
            [],
            "${NOT_SET_ANYWHERE}: the environment variable NOT_SET_ANYWHERE is not set; it stands in "
            "data.train, data.eval",
        ),
        ("", ["--run.dir="], "--run.dir: must not be empty"),
        (
            "",
            ["--ppo.clip_eps"],
            "--ppo.clip_eps: needs a value: --ppo.clip_eps VALUE or --ppo.clip_eps=VALUE",
        ),
        ("", ["--ppo.clip_eps", "0.1", "--ppo.clip_eps=0.2"], "--ppo.clip_eps: is given twice"),
        ("", ["ppo.clip_eps=0.1"], "ppo.clip_eps: expected a flag, such as --ppo.clip_eps 0.1"),
        ("", ["--clip_eps", "0.1"], "--clip_eps: no such flag; did you mean --ppo.clip_eps?"),
        ("", ["--print_confg"], "--print_confg: no such flag; did you mean '--print_config'?"),
        ("", ["--config", "b.yaml"], "--config: is given twice"),
        ("", ["--json=1"], "--json: takes no value, got '1'"),
        (
            "",
            ["--ppo", "3"],
            "--ppo: name an option: --SECTION.OPTION VALUE or --stages.NAME.SECTION.OPTION VALUE",
        ),
        (
            "",
            ["--stages.pop.ppo.clip_eps=1"],
            "--stages.pop.ppo.clip_eps: there is no stage 'pop'; did you mean 'ppo'?",
        ),
        ("", ["--stages.ppo.name", "x"], "--stages.ppo.name: a stage's name can only be changed in the file"),
        (
            "",
            ["--ppo.clip_eps={"],
            "--ppo.clip_eps: the value:1: expected the node content, but found '<stream end>'",
        ),
        # batches and the mesh
        (
            "sft: {microbatch_size: 5}",
            [],
            "sft.microbatch_size: must divide batch_size, got 5 for 32; 1, 2, 4, 8, 16, 32 do",
        ),
        (
            "ppo: {num_minibatches: 3}",
            [],
            "ppo.num_minibatches: must divide batch_size, got 3 for 64; 1, 2, 4, 8, 16, 32, 64 do",
        ),
        (
            "ppo: {microbatch_size: 3}",
            [],
            "ppo.microbatch_size: must divide batch_size / num_minibatches, got 3 for 16; 1, 2, 4, 8, 16 do",
        ),
        (
            "ppo: {batch_size: 1000000007, num_iterations: 2}",
            [],
            "ppo.num_minibatches: must divide batch_size, got 4 for 1000000007; 1, 1000000007 do",
        ),
        (
            "ppo: {batch_size: 36, num_minibatches: 5}",
            [],
            "ppo.num_minibatches: must divide batch_size, got 5 for 36; 2, 3, 4, 6, 9, 12, 18, 36 do",
        ),
        ("mesh: {data: 0}", [], "mesh.data: must be >= 1, or -1 for what is left, got 0"),
        ("mesh: {tensor: -2}", [], "mesh.tensor: must be >= 1, or -1 for what is left, got -2"),
        ("mesh: {tensor: -1}", [], "mesh.tensor: only one axis may be -1, got -1 for data and tensor"),
        (
            "mesh: {tensor: 3}",
            [],
            "mesh.tensor: must divide model.num_heads = 4 and model.num_kv_heads = 4, got 3",
        ),
        (
            "mesh: {data: 4, fsdp: 8}",
            [],
            "ppo.batch_size: must fill the mesh with a multiple of 32 (mesh.data 4 * mesh.fsdp 8), "
            "got 64 / num_minibatches = 16",
        ),
        (
            "mesh: {data: 4, fsdp: 1}\nreward_model: {microbatch_size: 1}",
            [],
            "reward_model.microbatch_size: must fill the mesh with a multiple of 2 "
            "(mesh.data 4 * mesh.fsdp 1), got 1",
        ),
        # the architecture
        (
            "model: {num_kv_heads: 3}",
            [],
            "model.num_kv_heads: must divide num_heads, got 3 for 4; 1, 2, 4 do",
        ),
        ("model: {hidden_size: 66}", [], "model.num_heads: must divide hidden_size, got 4 for 66"),
        (
            "model: {hidden_size: 12}",
            [],
            "model.num_heads: hidden_size / num_heads must be even, as rotary positions turn pairs, "
            "got 12 / 4",
        ),
        (
            "model: {context_length: 190}\ndata: {max_length: 190}",
            [],
            "rollout.max_new_tokens: data.max_prompt_length + max_new_tokens must be at most "
            "model.context_length = 190, got 128 + 64 = 192",
        ),
        (
            "data: {max_length: 300}",
            [],
            "data.max_length: must be at most model.context_length = 256, got 300",
        ),
        # ppo, the schedule
        (
            "ppo: {kl_controller: adaptive, kl_horizon: 12}",
            [],
            "ppo.kl_horizon: must be more than 0.2 * batch_size = 12.8, got 12",
        ),
        (
            "ppo: {kl_controller: adaptive, kl_coef: 0}",
            [],
            "ppo.kl_coef: must be > 0 where ppo.kl_controller is 'adaptive', which multiplies it and so "
            "would leave it at 0, got 0",
        ),
        (
            "sft: {num_steps: 10}\noptimizer: {warmup_steps: 11}",
            [],
            "optimizer.warmup_steps: must be at most the optimiser steps of the stage, sft.num_steps = 10, "
            "got 11",
        ),
        # files and functions
        (
            "data: {train: nowhere.jsonl, eval: hub:a/b:test}",
            [],
            "data.train: there is no file or directory 'nowhere.jsonl'",
        ),
        (
            "data: {train: 'tfds:./nowhere:train', eval: 'hub:a/b:test'}",
            [],
            "data.train: there is no file or directory 'nowhere'",
        ),
        (
            "data: {train: {README.md: 1, READMEE.md: 2}, eval: hub:a/b:test}",
            [],
            "data.train: there is no file or directory 'READMEE.md'; did you mean 'README.md'?",
        ),
        (
            "data: {train: {README.md: 0, Makefile: -1, LICENSE: much}, eval: hub:a/b:test}",
            [],
            "data.train: the weight of 'README.md' must be > 0, got 0; the weight of 'Makefile' must be > 0, "
            "got -1; the weight of 'LICENSE' expected a number, got 'much'",
        ),
        ("data: {train: {}, eval: hub:a/b:test}", [], "data.train: must not be empty"),
        (
            "data: {train: {./README.md: 1, README.md: 2}, eval: hub:a/b:test}",
            [],
            "data.train: './README.md' and 'README.md' are the same; add their weights",
        ),
        (
            "data: {train: {synthetic: 1, README.md: 2}, eval: hub:a/b:test}",
            [],
            "data.train: 'synthetic' cannot be mixed with others",
        ),
        (
            "data: {train: {README.md: 2}}",
            [],
            "data.eval: must be given: held-out records, such as a slice of 'README.md'",
        ),
        (
            "data: {eval: hub:a/b:test}",
            ["--data.train", "{README.md: .inf}"],
            "--data.train: the weight of 'README.md' must be a finite number, got inf",
        ),
        (
            "data: {train: hub:a/b:train}",
            [],
            "data.eval: must be given: held-out records, such as a slice of 'hub:a/b:train'",
        ),
        ("model: {path: nowhere}", [], "model.path: there is no directory 'nowhere'"),
        ("model: {path: tests}", [], "model.path: no Hugging Face checkpoint: 'tests' has no config.json"),
        ("tokenizer: {path: ./nowhere}", [], "tokenizer.path: there is no directory './nowhere'"),
        (
            "data: {prompt_template: 'Question: {question}'}",
            ["--data.train", "hub:a/b:x", "--data.eval", "hub:a/b:y"],
            "data.prompt_template: must have {prompt} once, such as 'Question: {prompt}\\nAnswer:', got "
            "'Question: {question}'",
        ),
        (
            "data: {train: hub:a/b:x, eval: hub:a/b:y, format: text, prompt_template: 'Q: {prompt}'}",
            ["--stages.reward.data.format", "labelled", "--data.prompt_tokens", "4"],
            "data.prompt_template: would be ignored: records of data.format 'text' have no prompt of their "
            "own; records of data.format 'labelled' have no prompt of their own",
        ),
        (
            "tokenizer: {path: org/name}",
            [],
            "tokenizer.path: there is no directory 'org/name'; a model of the hub is named hub:org/name",
        ),
        (
            "model: {path: 'hub:org/name/config'}",
            [],
            "model.path: 'hub:org/name/config' must read hub:OWNER/NAME[@REVISION], such as "
            "hub:EleutherAI/pythia-1b",
        ),
        (
            "",
            ["--stages.ppo.from", "org/name"],
            "stages.ppo.from: 'org/name' is neither an earlier stage nor a directory; a model of the hub is "
            "named hub:org/name",
        ),
        (
            "",
            ["--stages.ppo.reward_from", "hub:org/name@"],
            "stages.ppo.reward_from: 'hub:org/name@' must read hub:OWNER/NAME[@REVISION], such as "
            "hub:EleutherAI/pythia-1b",
        ),
        (
            "rewards: {gold: 'math:sinn'}",
            [],
            "rewards.gold: reward function 'math:sinn': math has no sinn; did you mean 'sin'?",
        ),
        # options that would be ignored
        ("ppo: {kl_target: 6}", [], "ppo.kl_target: would be ignored: ppo.kl_controller is 'fixed'"),
        (
            "ppo: {missing_eos: mask, missing_eos_value: 1}",
            [],
            "ppo.missing_eos_value: would be ignored: ppo.missing_eos is 'mask'",
        ),
        (
            "rewards: {function_weight: 2}",
            [],
            "rewards.function_weight: would be ignored: only a ppo stage trains on scores; "
            "rewards.function is not set",
        ),
        (
            "rewards: {function: 'math:sin', function_weight: 0}",
            [],
            "rewards.function: would be ignored: rewards.function_weight is 0",
        ),
        (
            "rewards: {function: 'math:sin', model_weight: 0}",
            [],
            "stages.ppo.reward_from: would be ignored: rewards.model_weight is 0",
        ),
        (
            "data: {columns: {prompt: question}}",
            [],
            "data.columns: would be ignored: the embedded task (data.train: synthetic) has no columns",
        ),
        (
            "tokenizer: {path: 'hub:org/name@v1', vocab_size: 512}",
            [],
            "tokenizer.vocab_size: would be ignored: tokenizer.path names a trained tokenizer",
        ),
        (
            "reward_model: {normalizer: none, normalize_on: chosen}",
            [],
            "reward_model.normalize_on: would be ignored: reward_model.normalizer is 'none'",
        ),
    ],
)
def test_one_problem_is_one_line(problems, monkeypatch, addition, flags, line):
    monkeypatch.chdir(ROOT)
    assert problems(f"{CHAIN}{addition}\n", *flags) == [line]


@pytest.mark.parametrize(
    "entries, line",
    [
        ("5", "stages: must be given: a list of stages such as [{name: sft, algorithm: sft}, "),
        ("{sft: {algorithm: sft}}", "stages: must be given: a list of stages such as [{name: sft, "),
        ("[]", "stages: must be given: a list of stages such as [{name: sft, algorithm: sft}, "),
        ("[5]", "stages[0]: expected a stage such as {name: sft, algorithm: sft}, got 5"),
    ],
)
def test_a_flag_for_a_stage_of_a_list_that_is_none(problems, entries, line):
    (found,) = problems(f"run: {{dir: RUN}}\nstages: {entries}\n", "--stages.sft.sft.num_steps", "3")
    assert found.startswith(line)


REWARD_ONLY = "run: {dir: RUN}\nstages: [{name: reward, algorithm: reward_model}]\n"
PPO_ONLY = "run: {dir: RUN}\nstages: [{name: ppo, algorithm: ppo}]\n"
TWO = "run: {dir: RUN}\nstages: [{name: a, algorithm: sft}, {name: a, algorithm: sft}]\n"
FUNCTION = "rewards: {function: 'math:sin'}\n"


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "run: {dir: RUN}",
            "stages: must be given: a list of stages such as [{name: sft, algorithm: sft}, "
            "{name: ppo, algorithm: ppo, from: sft}]",
        ),
        (
            "stages: [{name: sft, algorithm: sft}]",
            "run.dir: must be given: the directory that the run is written to",
        ),
        (
            TWO,
            "stages[1].name: another stage is called 'a'; names must differ",
        ),
        (
            TWO.replace("name: a", "name: s.f", 1),
            "stages[0].name: must be made of letters, digits, '_' and '-', ",
        ),
        (CHAIN.replace("algorithm: sft", "algorithm: sfr"), "stages.sft.algorithm: must be one of 'sft', "),
        (CHAIN.replace(", algorithm: sft", ""), "stages.sft.algorithm: must be given: one of 'sft', "),
        (
            CHAIN.replace("from: sft, r", "form: sft, r"),
            "stages.ppo.form: no such key of a stage; did you mean 'from'?",
        ),
        (
            CHAIN.replace("from: sft, r", "from: sff, r"),
            "stages.ppo.from: 'sff' is neither an earlier stage nor a directory; did you mean 'sft'?",
        ),
        (
            CHAIN.replace("from: sft}", "from: ppo}"),
            "stages.reward.from: 'ppo' comes later in the list; name an earlier stage or a directory",
        ),
        (
            CHAIN.replace("from: sft, r", "from: reward, r"),
            "stages.ppo.from: 'reward' is a reward model; ppo starts from a policy, the result of an sft or "
            "ppo stage",
        ),
        (
            CHAIN.replace("reward_from: reward", "reward_from: sft"),
            "stages.ppo.reward_from: 'sft' runs sft; name a reward_model stage",
        ),
        (
            CHAIN.replace("from: sft}", "from: sft, reward_from: sft}"),
            "stages.reward.reward_from: would be ignored: only a ppo stage trains on scores",
        ),
        (
            CHAIN.replace("reward_from: reward}", "reward_from: reward, mesh: {data: 1}}"),
            "stages.ppo.mesh: is common to all stages; set it outside of the list of stages",
        ),
        (
            CHAIN.replace("reward_from: reward}", "reward_from: reward, sft: {num_steps: 1}}"),
            "stages.ppo.sft: would be ignored: this stage runs ppo",
        ),
        (
            CHAIN.replace("reward_from: reward}", "reward_from: reward, model: {hidden_size: 32}}"),
            "stages.ppo.model.hidden_size: would be ignored: a stage has the model that it starts from",
        ),
        (
            CHAIN.replace("reward_from: reward}", "reward_from: reward, ppo: {clip_eps: no}}"),
            "stages.ppo.ppo.clip_eps: expected a number, got 'no'",
        ),
        (
            REWARD_ONLY,
            "reward_model.normalize_on: 'demonstrations' are the training records of the sft stage that "
            "this one starts from, but stage 'reward' has no from; set reward_model.normalize_on: chosen, or "
            "reward_model.normalizer: none",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\nrollout: {temperature: 2, max_new_tokens: 9}",
            "rollout: would be ignored: only a ppo stage samples",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\nrewards: {gold: 'math:sin', model_weight: 2}",
            "rewards.model_weight: would be ignored: only a ppo stage trains on scores",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\nmodel: {logprob_chunk: 64}",
            "model.logprob_chunk: would be ignored: a reward_model stage computes no log-probabilities",
        ),
        (
            REWARD_ONLY.replace("RUN", "RUN, num_samples: 3") + "reward_model: {normalizer: none}",
            "run.num_samples: would be ignored: only a ppo stage writes samples",
        ),
        (
            CHAIN.replace("from: sft}", "from: sft, model: {logprob_chunk: 64}}"),
            "stages.reward.model.logprob_chunk: would be ignored: a reward_model stage computes no "
            "log-probabilities",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\nsft: {num_steps: 2, loss_on: all}",
            "sft: would be ignored: no stage runs sft",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\ndata: {format: text}",
            "data.format: would be ignored: the embedded task (data.train: synthetic) has no columns",
        ),
        (
            REWARD_ONLY
            + "reward_model: {normalizer: none}\ndata: {train: hub:a/b:x, eval: hub:a/b:y, format: text}",
            "data.format: a stage that runs reward_model reads preference, ranking, labelled (or auto), got "
            "'text'",
        ),
        (
            REWARD_ONLY.replace("reward_model}", "reward_model, from: tests}")
            + "reward_model: {normalizer: none}\nmodel: {hidden_size: 32}",
            "model.hidden_size: would be ignored: a stage has the model that it starts from",
        ),
        (
            PPO_ONLY,
            "stages.ppo: nothing gives its completions a score; set reward_from to a reward_model stage or a "
            "directory, or rewards.function to package.module:name",
        ),
        (
            PPO_ONLY + "rewards: {function: 'math:sin', model_weight: 0.5}",
            "rewards.model_weight: would be ignored: stage 'ppo' has no reward_from",
        ),
        (
            PPO_ONLY + FUNCTION + "data: {train: hub:a/b:x, eval: hub:a/b:y, format: text}",
            "data.prompt_tokens: must be >= 1 where data.format is 'text' and a stage needs prompts, got 0",
        ),
        (
            PPO_ONLY
            + FUNCTION
            + "data: {train: hub:a/b:x, eval: hub:a/b:y, format: prompt_only, prompt_tokens: 4}",
            "data.prompt_tokens: would be ignored: records of data.format 'prompt_only' have prompts",
        ),
        (
            PPO_ONLY + FUNCTION + "data: {max_length: 99}",
            "data.max_length: would be ignored: ppo has max_prompt_length and rollout.max_new_tokens",
        ),
    ],
)
def test_stages_are_checked(problems, monkeypatch, text, line):
    monkeypatch.chdir(ROOT)
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_good_files_that_are_near_the_bad_ones(problems, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert problems(PPO_ONLY + FUNCTION) == []
    assert problems(PPO_ONLY + "rewards: {function: 'math:sin', model_weight: 0}") == []
    assert problems(REWARD_ONLY + "reward_model: {normalize_on: chosen}\nrewards: {gold: 'math:sin'}") == []
    assert problems(CHAIN + "mesh: {data: 2, fsdp: 2, tensor: 2}") == []
    assert problems(CHAIN + "ppo: {kl_controller: adaptive, kl_horizon: 13}") == []
    assert problems(CHAIN + "ppo: {}\nrollout: {}") == []
    assert problems(CHAIN.replace("RUN", "RUN, num_samples: 3") + "model: {logprob_chunk: 64}") == []
    assert problems(CHAIN + "ppo: {kl_coef: 0}") == []


# Options that a flag and a file both speak of


def test_a_flag_that_a_stage_of_the_file_overrules_is_a_problem(problems):
    text = CHAIN.replace("reward_from: reward}", "reward_from: reward, ppo: {clip_eps: 0.3}}")
    assert problems(text, "--ppo.clip_eps", "0.1") == [
        "--ppo.clip_eps: would be ignored: stages.ppo.ppo.clip_eps wins; "
        "on the command line use --stages.ppo.ppo.clip_eps"
    ]
    assert problems(text, "--stages.ppo.ppo.clip_eps", "0.1") == []
    assert problems(text + "ppo: {clip_eps: 0.1}")[0].startswith(
        "ppo.clip_eps: would be ignored: stages.ppo.ppo."
    )
    both = text.replace("ppo: {clip_eps: 0.3}", "optimizer: {eps: 1e-6}")
    assert problems(both, "--optimizer.eps", "1e-7") == []  # the other stages read it


def test_what_a_flag_makes_idle_in_the_file_is_no_problem(write):
    text = CHAIN + "ppo: {kl_controller: adaptive, kl_target: 3}\nrewards: {model_weight: 2}\n"
    path = write(text)
    flags = ["--ppo.kl_controller", "fixed", "--stages.ppo.reward_from=", "--rewards.function", "math:sin"]
    ppo = stages(read_config(["--config", path, *flags]))["ppo"]
    assert ppo.reward_from == ""
    assert ppo.settings.kl_target == config.PPOConfig().kl_target
    assert ppo.rewards.model_weight == 1.0
    with pytest.raises(ConfigError) as error:
        read_config(["--config", path, *flags, "--ppo.kl_horizon", "77"])
    assert error.value.problems == ["--ppo.kl_horizon: would be ignored: ppo.kl_controller is 'fixed'"]
    path = write(PPO_ONLY.replace("RUN", "RUN, num_samples: 3") + FUNCTION)
    cfg = read_config(["--config", path, "--stages.ppo.algorithm=sft"])
    assert cfg.run == cfg.stages[0].run == config.RunConfig(dir=cfg.run.dir)


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


# Everything at once, and nothing that only follows


def test_all_problems_come_at_once(problems, write):
    text = (
        CHAIN.replace("from: sft}", "from: sftt}") + "sft: {batch_size: 0, microbatch_size: 3}\nmodle: {}\n"
    )
    flags = [
        "--ppo.clip_epz",
        "1",
        "--ppo.num_minibatches=5",
        "--optimizer.eps",
        "x",
        "--rewards.function=a:b",
    ]
    found = problems(text, *flags)
    assert [line.split(":")[0] for line in found] == [
        "--optimizer.eps",
        "sft.batch_size",
        "--ppo.clip_epz",
        "modle",
        "stages.reward.from",
        "--ppo.num_minibatches",
        "--rewards.function",
    ]
    with pytest.raises(ConfigError) as error:
        read_config(["--config", write(text), *flags])
    first, *lines = str(error.value).splitlines()
    assert first == f"rlhf_jax: 7 problems in {write(text)}:"
    assert lines == [f"  {line}" for line in found]


def test_parse_gives_texts_by_path():
    line = parse(["--config=a.yaml", "--ppo.clip_eps", "0.1", "--mesh.data=-1", "--json"])
    assert line.config == "a.yaml"
    assert line.overrides == {"ppo.clip_eps": "0.1", "mesh.data": "-1"}
    assert (line.json, line.print_config, line.help) == (True, False, False)


# The run directory


def test_a_run_directory_belongs_to_one_configuration(write, problems, tmp_path):
    cfg = read_config(["--config", write(CHAIN)])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(cfg))
    assert problems(CHAIN) == []
    may_differ = [
        "--mesh.fsdp=2",
        "--checkpoint.every=7",
        "--stages.ppo.checkpoint.keep=9",
        "--run.log_every=1",
    ]
    assert problems(CHAIN, *may_differ, "--run.tensorboard=true", "--run.num_samples=0") == []
    with pytest.raises(SystemExit):  # what only shows a configuration runs into no directory
        read_config(["--config", write(CHAIN), "--ppo.clip_eps=0.1", "--print_config"])
    (found,) = problems(CHAIN, "--ppo.clip_eps", "0.1", "--run.seed=4")
    assert found == (
        f"run.dir: {str(tmp_path / 'run')!r} belongs to a run of another configuration: run.seed was 0, "
        "is 4; stages.ppo.ppo.clip_eps was 0.2, is 0.1; choose another run.dir, or the configuration that "
        "it was started with to resume it"
    )
    fewer = CHAIN.replace("  - {name: ppo, algorithm: ppo, from: sft, reward_from: reward}\n", "")
    assert "stages.ppo.from was 'sft', is null" in problems(fewer)[0]
    (tmp_path / "run" / "config.yaml").write_text("a: 1\na: 2\n")
    assert problems(CHAIN)[0].endswith("config.yaml:2: key 'a' is given twice; choose another run.dir")


@pytest.mark.parametrize("content", [b"hello\n", b"[a, b]\n", b"", b"\xff\xfe", b"run: 5\n", b"a: {b: 1}\n"])
def test_a_run_directory_whose_file_is_no_runs_configuration(problems, tmp_path, content):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.yaml"
    file.write_bytes(content)
    assert problems(CHAIN) == [f"run.dir: {str(file)!r} is no run's configuration; choose another run.dir"]


def test_only_local_paths_are_taken(problems):
    text = (
        CHAIN.replace("dir: RUN", "dir: 'gs://bucket/run'")
        + "data: {train: 's3://b/a.jsonl', eval: synthetic}"
    )
    assert [line.split(" is not on this machine")[0] for line in problems(text)] == [
        "run.dir: 'gs://bucket/run'",
        "data.train: 's3://b/a.jsonl'",
    ]
    text = CHAIN + "data: {train: {'gs://b/a.jsonl': 1, README.md: 1}, eval: hub:a/b:test}"
    assert problems(text)[0].startswith("data.train: 'gs://b/a.jsonl' is not on this machine")
    text = CHAIN.replace("algorithm: sft", "algorithm: sft, from: 'gs://bucket/sft'")
    assert problems(text)[0].startswith(
        "stages.sft.from: 'gs://bucket/sft' is not on this machine; only local"
    )


def test_home_stands_for_its_directory_in_every_path(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "start").mkdir()
    text = CHAIN.replace("RUN", "~/run").replace("algorithm: sft}", "algorithm: sft, from: ~/start}")
    write(text + "data: {train: '~/a.jsonl[:5]', eval: ~/a.jsonl}")
    cfg = read_config(["--config", "~/config.yaml", "--run.dir=~/run"])
    assert (cfg.run.dir, cfg.stages[0].start_from) == (f"{tmp_path}/run", f"{tmp_path}/start")
    assert cfg.stages[0].data.train == f"{tmp_path}/a.jsonl[:5]"


@pytest.mark.parametrize("name", ["tokenizer", "export", "samples", "tensorboard", "checkpoints"])
def test_a_stage_may_not_have_the_name_of_a_directory_of_the_run(problems, name):
    (line,) = problems(f"run: {{dir: RUN}}\nstages: [{{name: {name}, algorithm: sft}}]\n")
    assert line.startswith(f"stages.{name}.name: '{name}' is a directory of the run itself, as are ")


def test_a_run_directory_that_is_a_file(problems, tmp_path):
    (tmp_path / "run").touch()
    assert problems(CHAIN) == [f"run.dir: {str(tmp_path / 'run')!r} is not a directory"]


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


def test_the_checks_know_what_each_algorithm_reads():
    from rlhf_jax.algos.registry import ALGORITHMS

    assert {name: algorithm.records for name, algorithm in ALGORITHMS.items()} == config_checks.KINDS
    assert config.ALGORITHM_SECTIONS.keys() == ALGORITHMS.keys()


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
