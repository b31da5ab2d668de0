"""What is said of a configuration that is wrong: each problem in a line, and all of them at once."""

from __future__ import annotations

import pytest

from rlhf_jax import config, online_config, run_checks
from rlhf_jax.command_line import ConfigError, parse, read_config
from tests.configurations import CHAIN
from tests.conftest import ROOT

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
            "optimizer.schedule: must be one of 'constant', 'linear', 'cosine', 'wsd', got 'cosin'; "
            "did you mean 'cosine'?",
        ),
        (
            "optimizer: {name: adam}",
            [],
            "optimizer.name: must be one of 'adamw', 'adafactor', 'lion', 'muon', got 'adam'; did you mean "
            "'adamw'?",
        ),
        ("optimizer: {decay_fraction: 0}", [], "optimizer.decay_fraction: must be > 0 and <= 1, got 0"),
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
        (
            "",
            ["--gae_lambda", "0.1"],
            "--gae_lambda: no such flag; did you mean --ppo.gae_lambda or --trpo.gae_lambda?",
        ),
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
            "ppo: {sequences_per_row: 3}",
            [],
            "ppo.sequences_per_row: must divide batch_size / num_minibatches, got 3 for 16; "
            "1, 2, 4, 8, 16 do",
        ),
        (
            "ppo: {sequences_per_row: 2, microbatch_size: 16}",
            [],
            "ppo.microbatch_size: must divide batch_size / num_minibatches / sequences_per_row, got 16 for "
            "8; 1, 2, 4, 8 do",
        ),
        (
            "mesh: {data: 4}\nppo: {sequences_per_row: 8}",
            [],
            "ppo.batch_size: must fill the mesh with a multiple of 4 (mesh.data 4), got 64 / num_minibatches "
            "/ sequences_per_row = 2",
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
            "mesh: {axes: {mpl: tensor}}",
            [],
            "mesh.axes.mpl: no logical axis of the models; did you mean 'mlp'?",
        ),
        (
            "mesh: {axes: {embed: [fsdp, tensro]}}",
            [],
            "mesh.axes.embed: must name axes of the mesh (slice, data, fsdp, expert, sequence, tensor) or "
            "'none', got 'tensro'; did you mean 'tensor'?",
        ),
        (
            "",
            ["--mesh.axes.batch", "[data, sequence]"],
            "--mesh.axes.batch: activations have 'batch' and 'length', which would both be on mesh.sequence",
        ),
        (
            "mesh: {axes: {mlp: null}}",
            [],
            "mesh.axes: expected a mapping of names to a string or a list of strings, got {'mlp': None}",
        ),
        (
            "mesh: {tensor: 3}",
            [],
            "mesh.tensor: must divide model.num_heads = 4 and model.num_kv_heads = 4, got 3",
        ),
        (
            "mesh: {tensor: 2}\nmodel: {num_kv_heads: 1}",
            [],
            "mesh.tensor: must divide model.num_kv_heads = 1, got 2; "
            "with mesh.axes.kv_heads: none each device has all keys and values",
        ),
        (
            "mesh: {data: 4, fsdp: 8}",
            [],
            "ppo.batch_size: must fill the mesh with a multiple of 32 (mesh.data 4 * mesh.fsdp 8), "
            "got 64 / num_minibatches = 16",
        ),
        (
            "mesh: {slice: 2, expert: 16}",
            [],
            "ppo.batch_size: must fill the mesh with a multiple of 32 (mesh.slice 2 * mesh.expert 16), "
            "got 64 / num_minibatches = 16",
        ),
        (
            "mesh: {data: 4, fsdp: 1}\nreward_model: {microbatch_size: 1}",
            [],
            "reward_model.microbatch_size: must fill the mesh with a multiple of 2 (mesh.data 4), got 1",
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
        ("rewards: {function: {'': 1}}", [], "rewards.function: a name must not be empty, got ''"),
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
            "rewards.function_weight: would be ignored: only an online stage, such as ppo, trains on scores; "
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
            "optimizer: {name: lion, eps: 1e-8}",
            [],
            "optimizer.eps: would be ignored: optimizer.name is 'lion'",
        ),
        (
            "optimizer: {name: adafactor, beta1: 0.9}",
            [],
            "optimizer.beta1: would be ignored: optimizer.name is 'adafactor'",
        ),
        ("optimizer: {momentum: 0.9}", [], "optimizer.momentum: would be ignored: optimizer.name is 'adamw'"),
        (
            "optimizer: {end_fraction: 0.1}",
            [],
            "optimizer.end_fraction: would be ignored: optimizer.schedule is 'constant'",
        ),
        (
            "optimizer: {schedule: cosine, decay_fraction: 0.2}",
            [],
            "optimizer.decay_fraction: would be ignored: optimizer.schedule is 'cosine'",
        ),
        (
            "optimizer: {stochastic_rounding: true}",
            [],
            "optimizer.stochastic_rounding: would be ignored: neither model.param_dtype nor "
            "optimizer.state_dtype is 'bfloat16'",
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
            "stages.ppo.from: 'reward' is a reward model; ppo starts from a policy, the result of a stage "
            "that trains one, such as sft",
        ),
        (
            CHAIN.replace("reward_from: reward", "reward_from: sft"),
            "stages.ppo.reward_from: 'sft' runs sft; name a reward_model stage",
        ),
        (
            CHAIN.replace("from: sft}", "from: sft, reward_from: sft}"),
            "stages.reward.reward_from: would be ignored: only an online stage, such as ppo, "
            "trains on scores",
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
            "rollout: would be ignored: only an online stage, such as ppo, samples",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\nrewards: {gold: 'math:sin', model_weight: 2}",
            "rewards.model_weight: would be ignored: only an online stage, such as ppo, trains on scores",
        ),
        (
            REWARD_ONLY + "reward_model: {normalizer: none}\nmodel: {logprob_chunk: 64}",
            "model.logprob_chunk: would be ignored: a reward_model stage computes no log-probabilities",
        ),
        (
            REWARD_ONLY.replace("RUN", "RUN, num_samples: 3") + "reward_model: {normalizer: none}",
            "run.num_samples: would be ignored: only an online stage, such as ppo, writes samples",
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
    assert problems(CHAIN + "mesh: {tensor: 2, axes: {kv_heads: none}}\nmodel: {num_kv_heads: 1}") == []
    assert problems(CHAIN + "ppo: {kl_controller: adaptive, kl_horizon: 13}") == []
    assert problems(CHAIN + "ppo: {}\nrollout: {}") == []
    assert problems(CHAIN + "rollout: {devices: 4, importance_cap: 0}\nmesh: {tensor: 2}") == []
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
    ppo = read_config(["--config", path, *flags]).stages[-1]
    assert ppo.reward_from == ""
    assert ppo.settings.kl_target == online_config.PPOConfig().kl_target
    assert ppo.rewards.model_weight == 1.0
    with pytest.raises(ConfigError) as error:
        read_config(["--config", path, *flags, "--ppo.kl_horizon", "77"])
    assert error.value.problems == ["--ppo.kl_horizon: would be ignored: ppo.kl_controller is 'fixed'"]
    path = write(PPO_ONLY.replace("RUN", "RUN, num_samples: 3") + FUNCTION)
    cfg = read_config(["--config", path, "--stages.ppo.algorithm=sft"])
    assert cfg.run == cfg.stages[0].run == config.RunConfig(dir=cfg.run.dir)


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


# What is looked at while it runs


@pytest.mark.parametrize(
    "flags, lines",
    [
        (["--run.profile_steps=3-9", "--run.profile_stage=sft", "--run.profile_hosts=all"], []),
        (
            ["--run.profile_steps=9-3"],
            ["--run.profile_steps: must be FIRST-LAST, the first step not behind the last, got '9-3'"],
        ),
        (
            ["--run.profile_steps=30-31"],
            [
                "--run.profile_steps: stage ppo has 30 steps, got '30-31'; name steps that it has, or name "
                "one stage in run.profile_stage"
            ],
        ),
        (["--run.profile_steps=30-31", "--run.profile_stage=reward"], []),
        (
            ["--run.profile_steps=1-2", "--run.profile_stage=rewards"],
            ["--run.profile_stage: there is no stage 'rewards'; did you mean 'reward'?"],
        ),
        (
            ["--run.profile_hosts=all"],
            ["--run.profile_hosts: 'all' would be ignored: run.profile_steps names no steps"],
        ),
        (
            ["--run.compilation_cache=s3://bucket/x"],
            [
                "--run.compilation_cache: 's3://bucket/x': must be a directory or an address gs://BUCKET/PATH",
            ],
        ),
        (
            ["--run.compilation_cache=gs://bucket/x"],
            [
                "--run.compilation_cache: 'gs://bucket/x' needs gcsfs; pip install gcsfs, or mount the "
                "bucket and give its path"
            ],
        ),
    ],
)
def test_options_of_profiles_and_of_the_compilation_cache(problems, monkeypatch, flags, lines):
    monkeypatch.setattr(run_checks, "find_spec", lambda name: None)
    assert problems(CHAIN, "--ppo.num_iterations=30", *flags) == lines


def test_a_compilation_cache_in_a_bucket(problems, monkeypatch):
    monkeypatch.setattr(run_checks, "find_spec", lambda name: name == "gcsfs")
    assert problems(CHAIN, "--run.compilation_cache=gs://bucket/x") == []


# Paths


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
