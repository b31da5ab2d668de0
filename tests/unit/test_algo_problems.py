"""What is said of options of a stage's algorithm that do not fit each other, or that it does not read."""

from __future__ import annotations

import pytest

from tests.configurations import CHAIN
from tests.conftest import ROOT

ONE = """
run: {dir: RUN}
stages: [{name: NAME, algorithm: NAME}]
rewards: {function: 'math:sin'}
"""


@pytest.mark.parametrize(
    "algorithm, options, line",
    [
        (
            "ppo",
            "rollout: {importance_cap: 1.5}",
            "rollout.importance_cap: would be ignored: rollout.devices is 0: the policy samples what",
        ),
        (
            "ppo",
            "rollout: {devices: 2}\nmesh: {data: 2}",
            "rollout.devices: must be 0 where no axis of the mesh but mesh.tensor is -1 and so takes what is",
        ),
        (
            "ppo",
            "rollout: {devices: 3}\nmesh: {tensor: 2}",
            "rollout.devices: must be a multiple of mesh.tensor = 2, got 3",
        ),
        (
            "ppo",
            "rollout: {devices: 2}\nmesh: {slice: 2}",
            "rollout.devices: must be 0 where mesh.slice is not 1, got 2 for 2",
        ),
        (
            "ppo",
            "rollout: {devices: 2}\nppo: {kl_controller: adaptive, kl_target: 6.0, kl_horizon: 100}",
            "ppo.kl_controller: must be fixed where rollout.devices is not 0, as the KL of the rollout is",
        ),
        (
            "grpo",
            "grpo: {group_size: 1, batch_size: 64, max_rollouts: 2}",
            "grpo.group_size: must be >= 2 where grpo has baseline 'group' and scale 'group' and max_rol",
        ),
        (
            "dapo",
            "rollout: {devices: 2}",
            "dapo.max_rollouts: must be 1 where rollout.devices is not 0, as a batch is sampled before the",
        ),
        (
            "remax",
            "remax: {group_size: 4, max_rollouts: 2}",
            "remax.max_rollouts: must be 1 where remax.baseline is 'greedy', with which completions of equal",
        ),
        (
            "remax",
            "rollout: {devices: 2}",
            "rollout.devices: must be 0 where remax.baseline is 'greedy', as its greedy completions are by",
        ),
        (
            "grpo",
            "grpo: {early_stop_kl: 0.1}",
            "grpo.early_stop_kl: must be 0 where a rollout has one optimiser step, before which the policy",
        ),
        (
            "ppo",
            "ppo: {early_stop_kl: 0.1, surrogate: kl, old_kl_target: 0.1}",
            "ppo.early_stop_kl: must be 0 where ppo.old_kl_target is not, whose weight follows a last pass",
        ),
        (
            "rloo",
            "rloo: {num_minibatches: 3}",
            "rloo.num_minibatches: must divide batch_size * group_size, got 3 for 64; 1, 2, 4, 8, 16",
        ),
        (
            "gspo",
            "model: {sharing: trunk}",
            "model.sharing: must be separate or hydra where a stage runs gspo, which has no value model that",
        ),
        (
            "grpo",
            "grpo: {credit: token}",
            "grpo.credit: would be ignored: without a KL in the reward (grpo.kl_term) both are the same",
        ),
        ("dr_grpo", "dr_grpo: {kl_term: k2}", "dr_grpo.kl_term: would be ignored: dr_grpo.kl_coef is 0"),
        ("ppo", "ppo: {dual_clip: 1.0}", "ppo.dual_clip: must be more than 1, or 0 for none, got 1"),
        (
            "ppo",
            "ppo: {ratio: sequence}",
            "ppo.aggregation: must be 'sequence' where ppo.ratio is 'sequence', as a completion is one",
        ),
        (
            "gspo",
            "rollout: {importance: always}",
            "rollout.importance_cap: must be 0 where gspo.ratio is 'sequence_mean', as importance weights",
        ),
        (
            "grpo",
            "grpo: {surrogate: kl}",
            "grpo.surrogate: must be 'clip' where a rollout has one optimiser step, before which the policy",
        ),
        (
            "ppo",
            "ppo: {surrogate: kl, old_kl_target: 0.01, value_warmup: 3}",
            "ppo.old_kl_target: must be 0 where ppo.value_warmup is not, as the policy then stands still and",
        ),
        (
            "ppo",
            "ppo: {value_warmup: 100}",
            "ppo.value_warmup: must be less than num_iterations = 100, got 100",
        ),
        ("grpo", "grpo: {tracks_kl: false}", "grpo.tracks_kl: would be ignored: grpo.kl_coef is not 0"),
        (
            "online_dpo",
            "online_dpo: {group_size: 1}",
            "online_dpo.group_size: must be >= 2, as a pair is two completions of a prompt, got 1",
        ),
        (
            "online_dpo",
            "online_dpo: {num_minibatches: 64}",
            "online_dpo.num_minibatches: must divide batch_size, the pairs of an iteration, got 64 for 32",
        ),
        (
            "online_dpo",
            "online_dpo: {microbatch_size: 1}",
            "online_dpo.microbatch_size: must be even, as a pair is two rows, got 1",
        ),
        (
            "online_dpo",
            "online_dpo: {sequences_per_row: 3, batch_size: 48, group_size: 4}",
            "online_dpo.sequences_per_row: must be 1 or even, as a pair is in one row, got 3",
        ),
        (
            "online_dpo",
            "online_dpo: {sequences_per_row: 4, batch_size: 2, group_size: 3}",
            "online_dpo.sequences_per_row: must divide batch_size * group_size, got 4 for 6; 1, 2, 3, 6 do",
        ),
        (
            "online_dpo",
            "rollout: {importance: always}",
            "rollout.importance: would be ignored: the loss of online_dpo has no ratio to be corrected",
        ),
        (
            "online_dpo",
            "online_dpo: {loss: ipo, label_smoothing: 0.1}",
            "online_dpo.label_smoothing: would be ignored: online_dpo.loss is 'ipo'",
        ),
        ("raft", "raft: {num_kept: 9}", "raft.num_kept: must be at most group_size = 8, got 9"),
        (
            "raft",
            "raft: {num_kept: 8}",
            "raft.num_kept: must be less than group_size = 8 where raft.keep is 'best', as all completions",
        ),
        (
            "raft",
            "mesh: {data: 8}\nraft: {batch_size: 8, group_size: 3, num_kept: 2, sequences_per_row: 2}",
            "raft.batch_size: must fill the mesh with a multiple of 8 (mesh.data 8), got batch_size * "
            "group_size / sequences_per_row = 12",
        ),
        ("raft", "raft: {threshold: 0.5}", "raft.threshold: would be ignored: raft.keep is 'best'"),
        (
            "raft",
            "raft: {num_kept: 2, num_minibatches: 3}",
            "raft.num_minibatches: must divide batch_size * num_kept, got 3 for 64; 1, 2, 4, 8, 16, 32, 64",
        ),
        (
            "ppo",
            "ppo: {overlong_from: 64}",
            "ppo.overlong_from: must be less than rollout.max_new_tokens = 64, got 64",
        ),
        (
            "ppo",
            "ppo: {overlong_penalty: 2.0}",
            "ppo.overlong_penalty: would be ignored: ppo.overlong_from is 0",
        ),
        (
            "ppo",
            "ppo: {ptx_from: ppo}",
            "ppo.ptx_from: would be ignored: ppo.ptx_coef is 0",
        ),
        (
            "grpo",
            "grpo: {ptx_coef: 0.1, ptx_from: sft}",
            "grpo.ptx_from: must name an sft stage that comes before grpo in the list, whose training "
            "records are the demonstrations of grpo.ptx_coef 0.1, got 'sft'; there is none: put one before",
        ),
        ("trpo", "trpo: {ptx_coef: 0.1}", "trpo.ptx_coef: no such option"),
    ],
)
def test_options_of_an_algorithm_are_checked(problems, monkeypatch, algorithm, options, line):
    monkeypatch.chdir(ROOT)
    (found,) = problems(ONE.replace("NAME", algorithm) + options)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "name, told",
    [
        ("", "''; there is sft"),
        ("stf", "'stf'; did you mean 'sft'?"),
        ("reward", "'reward', which runs reward_model; there is sft"),
        ("ppo", "'ppo'; there is sft"),
        ("sft", None),
    ],
)
def test_demonstrations_are_those_of_an_sft_stage(problems, name, told):
    found = problems(CHAIN + f"ppo: {{ptx_coef: 0.1, ptx_from: '{name}'}}\n")
    need = (
        "ppo.ptx_from: must name an sft stage that comes before ppo in the list, whose training records are"
    )
    assert found == ([] if told is None else [f"{need} the demonstrations of ppo.ptx_coef 0.1, got {told}"])


@pytest.mark.parametrize(
    "addition, flags, line",
    [
        (
            "",
            ["--stages.trpo.model.attention=flash"],
            "--stages.trpo.model.attention: must be auto or xla in a stage that runs trpo, whose products "
            "with the Fisher matrix need forward-mode derivatives, which no kernel has, got 'flash'",
        ),
        (
            "",
            ["--stages.trpo.model.param_dtype=bfloat16"],
            "--stages.trpo.model.param_dtype: must be float32 in a stage that runs trpo: rounding would "
            "change the step whose KL was checked, got 'bfloat16'",
        ),
        (
            "",
            ["--stages.trpo.model.sharing=trunk"],
            "--stages.trpo.model.sharing: must be separate or hydra in a stage that runs trpo: the value "
            "loss would move a policy on whose trunk the values are, got 'trunk'",
        ),
        ("trpo: {delta: 0}", [], "trpo.delta: must be > 0, got 0"),
        ("trpo: {damping: -1}", [], "trpo.damping: must be >= 0, got -1"),
        ("trpo: {cg_iterations: 0}", [], "trpo.cg_iterations: must be >= 1, got 0"),
        (
            "trpo: {line_search_factor: 1}",
            [],
            "trpo.line_search_factor: must be > 0 and < 1, got 1",
        ),
        (
            "trpo: {kl_controller: adaptive, kl_coef: 0}",
            [],
            "trpo.kl_coef: must be > 0 where trpo.kl_controller is 'adaptive', which multiplies it and so "
            "would leave it at 0, got 0",
        ),
        ("trpo: {kl_target: 6}", [], "trpo.kl_target: would be ignored: trpo.kl_controller is 'fixed'"),
        ("ppo: {clip_eps: 0.1}", [], "ppo.clip_eps: would be ignored: no stage runs ppo"),
        (
            "trpo: {line_search_steps: 1, line_search_factor: 0.5}",
            [],
            "trpo.line_search_factor: would be ignored: trpo.line_search_steps is 1: no step is tried again",
        ),
        ("trpo: {clip_eps: 0.1}", [], "trpo.clip_eps: no such option; did you mean 'value_clip_eps'?"),
    ],
)
def test_what_trpo_cannot_do(problems, addition, flags, line):
    assert problems(f"{CHAIN.replace('ppo', 'trpo')}{addition}\n", *flags) == [line]


TAUGHT = """
run: {dir: RUN}
stages:
  - {name: sft, algorithm: sft}
  - {name: reward, algorithm: reward_model, from: sft}
  - {algorithm: sft, name: large}
  - {name: distill, algorithm: distill, from: sft, teacher_from: large}
"""


def test_a_teacher_is_all_that_distillation_needs(problems):
    assert problems(TAUGHT) == []
    assert problems(TAUGHT + "rewards: {function: 'math:sin'}\n") == []
    judged = TAUGHT.replace(
        "distill, from", "distill, model: {frozen_memory: host}, reward_from: reward, from"
    )
    assert problems(judged) == []  # the reward model's alone


@pytest.mark.parametrize(
    "old, new, line",
    [
        (
            ", teacher_from: large",
            "",
            "stages.distill.teacher_from: must be given in a stage that runs distill: an earlier stage or a",
        ),
        (
            "teacher_from: large",
            "teacher_from: reward",
            "stages.distill.teacher_from: 'reward' is a reward model; name the result of a stage that",
        ),
        (
            "teacher_from: large",
            "teacher_from: sft",
            "stages.distill.teacher_from: 'sft' is the model that the stage starts from, which has nothing",
        ),
        (
            "teacher_from: large",
            "teacher_from: distil",
            "stages.distill.teacher_from: 'distil' is neither an earlier stage nor a directory; earlier sta",
        ),
        (
            "teacher_from: large",
            "teacher_from: distill",
            "stages.distill.teacher_from: 'distill' is this stage itself; name an earlier stage or a dir",
        ),
        (
            "teacher_from: large",
            "teacher_from: 'hub:a/b@'",
            "stages.distill.teacher_from: 'hub:a/b@' must read hub:OWNER/NAME[@REVISION]",
        ),
        (
            "teacher_from: large",
            "teacher_from: 'gs://bucket/run/sft'",
            "stages.distill.teacher_from: 'gs://bucket/run/sft' is not on this machine; only local files",
        ),
        (
            "algorithm: sft}",
            "algorithm: sft, teacher_from: sft}",
            "stages.sft.teacher_from: would be ignored: only a distill stage has a teacher",
        ),
        (
            "from: sft, t",
            "distill: {beta: 1.5}, t",
            "stages.distill.distill.beta: must be >= 0 and <= 1, got",
        ),
        (
            "from: sft, t",
            "distill: {missing_eos: mask}, t",
            "stages.distill.distill.missing_eos: would be ignored: the loss of distill is of tokens and re",
        ),
        (
            "from: sft, t",
            "model: {frozen_memory: host}, t",
            "stages.distill.model.frozen_memory: would be ignored: the teacher of distill is needed in each",
        ),
        (
            "from: sft, t",
            "rollout: {importance: always}, t",
            "stages.distill.rollout.importance: would be ignored: the loss of distill has no ratio to be",
        ),
    ],
)
def test_what_distillation_cannot_do(problems, old, new, line):
    assert TAUGHT.count(old) == 1
    (found,) = problems(TAUGHT.replace(old, new))
    assert found.startswith(line)


def test_a_policy_has_nothing_to_learn_from_itself(problems, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    of_both = f"model: {{path: '{tmp_path}'}}, teacher_from: '{tmp_path}'"
    alike = TAUGHT.replace("from: sft, teacher_from: large", of_both)
    told = f"stages.distill.teacher_from: {str(tmp_path)!r} is the model that the stage starts from"
    (found,) = problems(alike)
    assert found.startswith(told)
