"""Options of adapters and sharing: which fit each other, and which would be ignored."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_jax.command_line import read_config
from rlhf_jax.config import LoraConfig
from rlhf_jax.config_file import dump_config
from rlhf_jax.origins import Origins, adapters_of
from rlhf_jax.plan import _check_base
from tests import tiny

HYDRA = """
run: {dir: RUN}
stages:
  - {name: sft, algorithm: sft, lora: {rank: 0}}
  - {name: reward, algorithm: reward_model, from: sft}
  - {name: ppo, algorithm: ppo, from: sft, reward_from: reward, model: {sharing: hydra}}
lora: {rank: 4, targets: [q, v]}
"""
OTHER_ORDER = HYDRA.replace("hydra}", "hydra}, lora: {targets: [v, q]}")
CHOICES = "a list of 'q', 'k', 'v', 'o', 'gate', 'up', 'down'"


def test_a_chain_of_adapters_reads_and_round_trips(write):
    cfg = read_config(["--config", write(HYDRA)])
    sft, reward, ppo = cfg.stages
    assert sft.lora == LoraConfig()
    assert reward.lora == ppo.lora == LoraConfig(rank=4, targets=("q", "v"))
    assert (ppo.model.sharing, ppo.model.base_dtype, ppo.model.role_dtype) == ("hydra", "bfloat16", "float32")
    assert read_config(["--config", write(dump_config(cfg))]) == cfg
    by_flag = read_config(["--config", write(HYDRA), "--lora.targets", "[up]"])
    assert by_flag.stages[2].lora.targets == ("up",)


def test_the_order_of_targets_does_not_matter(write, problems, tmp_path):
    """Neither to the base that two stages share nor to a run that is resumed."""
    assert problems(OTHER_ORDER) == []
    (tmp_path / "run").mkdir()
    cfg = read_config(["--config", write(HYDRA)])
    (tmp_path / "run" / "config.yaml").write_text(dump_config(cfg))
    assert problems(HYDRA) == problems(OTHER_ORDER) == []
    (line,) = problems(HYDRA, "--lora.targets=[q]")
    assert "stages.ppo.lora.targets was ['q', 'v'], is ['q']" in line


def test_targets_that_one_stage_leaves_open_are_compared_when_the_model_is_known(problems):
    """Empty are all that the model has, which may be those that the other names."""
    assert problems(HYDRA.replace("hydra}", "hydra}, lora: {targets: []}")) == []
    reward, ppo = (tiny.stage(*of) for of in (("reward_model", "lora"), ("ppo", "hydra")))
    ppo = dataclasses.replace(ppo, reward_from="reward")
    where = Origins(Path("sft"), Path("reward"))

    def check(targets):
        judged = dataclasses.replace(reward, lora=dataclasses.replace(reward.lora, targets=targets))
        judge = SimpleNamespace(stage=judged, origins=where, architecture=tiny.ARCHITECTURE)
        _check_base(ppo, where, adapters_of(ppo, tiny.ARCHITECTURE), {"reward": judge})

    check(("up", "down", "gate", "o", "v", "k", "q"))
    with pytest.raises(
        ValueError, match="reward has adapters of q, v, this stage of q, k, v, o, gate, up, d"
    ):
        check(("v", "q"))


@pytest.mark.parametrize("ensemble, num_problems", [("minimum", 0), ("mean", 3)])
def test_heads_that_are_not_averaged_have_a_base_of_their_own(problems, ensemble, num_problems):
    """The reward model is then merged and no role of the stage: other adapters do, and it may wait."""
    ours = "model: {sharing: hydra, frozen_dtype: float32, frozen_memory: host}, lora: {alpha: 8}"
    text = HYDRA.replace("model: {sharing: hydra}", f"{ours}, rewards: {{ensemble: {ensemble}}}")
    assert len(problems(text + "reward_model: {num_heads: 3}\n")) == num_problems


@pytest.mark.parametrize(
    "old, new, line",
    [
        ("[q, v]", "[q, gat]", f"lora.targets: must be {CHOICES}, got 'gat'; did you mean 'gate'?"),
        ("[q, v]", "[q_proj]", f"lora.targets: must be {CHOICES}, got 'q_proj'; did you mean 'q'?"),
        ("[q, v]", "[q, q]", f"lora.targets: must be {CHOICES}, got 'q' twice"),
        ("[q, v]", "q", f"lora.targets: expected {CHOICES}, got 'q'"),
        ("rank: 4", "rank: -1", "lora.rank: must be >= 0, got -1"),
        (
            "sharing: hydra}",
            "sharing: hydra}, lora: {rank: 0}",
            "stages.ppo.lora.rank: must be >= 1 where model.sharing is 'hydra', got 0",
        ),
        (
            ", model: {sharing: hydra}",
            "",
            "lora.rank: would be ignored, got 4: adapters of ppo need model.sharing: hydra; set that, "
            "or lora: {rank: 0} in the stage ppo",
        ),
        (
            ", lora: {rank: 0}}",
            "}",
            "lora.rank: must be 0 where a model is trained from scratch, got 4 for the stage sft; give it "
            "from or model.path, or lora: {rank: 0}",
        ),
        (
            "reward_from: reward, model: {sharing: hydra}",
            "reward_from: reward, model: {sharing: hydra, frozen_dtype: float32}",
            "stages.ppo.model.frozen_dtype: the adapters of 'reward' belong to a base in bfloat16, this "
            "stage's is in float32; give both the same",
        ),
        (
            "model: {sharing: hydra}",
            "model: {sharing: hydra}, lora: {alpha: 8}",
            "stages.ppo.reward_from: 'reward' has other adapters, lora {rank: 4, alpha: 16.0, targets: "
            "('q', 'v'), rslora: False} where this stage has lora {rank: 4, alpha: 8.0, targets: ('q', 'v'), "
            "rslora: False}; give both the same lora",
        ),
        (
            "  - {name: ppo, algorithm: ppo, from: sft",
            "  - {name: more, algorithm: sft, from: sft}\n  - {name: ppo, algorithm: ppo, from: more",
            "stages.ppo.reward_from: 'reward' holds adapters of 'sft', but this stage's base is 'more'; let "
            "both start from the same, or train reward with lora: {rank: 0}: it then is a model of its own",
        ),
        (
            "sharing: hydra}",
            "sharing: hydra, frozen_memory: host}",
            "stages.ppo.model.frozen_memory: would be ignored: the base of model.sharing 'hydra' is needed "
            "all the time",
        ),
        (
            "from: sft}",
            "from: sft, model: {sharing: trunk}}",
            "stages.reward.model.sharing: would be ignored: only an online stage, such as ppo, "
            "has roles that could share",
        ),
        (
            "lora: {rank: 0}}",
            "lora: {rank: 0, alpha: 3}}",
            "stages.sft.lora.alpha: would be ignored: lora.rank is 0",
        ),
        (
            "lora: {rank: 0}}",
            "lora: {rank: 0}, model: {frozen_dtype: float32}}",
            "stages.sft.model.frozen_dtype: would be ignored: the stage has no frozen model, for "
            "lora.rank is 0",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(problems, old, new, line):
    assert old in HYDRA
    assert problems(HYDRA.replace(old, new)) == [line]
