"""Stages that go on with an adapter in PEFT's format: lora.path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.command_line import read_config
from rlhf_jax.models import hf
from rlhf_jax.models.peft import write_adapter
from rlhf_jax.origins import Origins, adapters_of, check_start, origins
from rlhf_jax.roles import load_roles
from tests import tiny

LORA = {"rank": 2, "alpha": 5.0, "targets": ("q", "down")}
CONFIG = """
run: {dir: RUN}
stages:
  - {name: sft, algorithm: sft, from: RUN}
  - {name: reward, algorithm: reward_model, from: RUN, reward_model: {normalize_on: chosen}}
  - {name: ppo, algorithm: ppo, from: sft, reward_from: reward, lora: {rank: 0}}
lora: {rank: 4, path: RUN}
"""


def kind(**changes):
    lora = adapters_of(tiny.stage("sft", lora=LORA | changes), tiny.ARCHITECTURE)
    assert lora is not None
    return lora


@pytest.fixture
def start(tmp_path):
    """Returns where a stage starts from, and the adapter and head that it goes on with."""
    stage = tiny.stage("sft", lora=LORA)
    adapter = tiny.adapter(stage, tiny.mesh())
    head = {"kernel": jnp.arange(32) / 7.0, "bias": jnp.float32(0)}
    write_adapter(tmp_path / "peft", tiny.ARCHITECTURE, kind(), adapter, "base", score_head=head)
    hf.save_policy(tmp_path / "base", tiny.ARCHITECTURE, tiny.weights("policy", tiny.mesh()))
    return Origins(tmp_path / "base", None, tmp_path / "peft"), {"adapter": adapter, "score_head": head}


@pytest.mark.parametrize("algorithm, role", [("sft", "policy"), ("reward_model", "reward")])
def test_the_adapter_that_training_goes_on_with(start, algorithm, role):
    """Of a reward model also the head; on a mesh the adapter is divided as any other."""
    where, expected = start
    stage, mesh = tiny.stage(algorithm, lora=LORA), tiny.mesh(fsdp=2)
    check_start(where, kind(), tiny.ARCHITECTURE)
    trained, frozen = load_roles(
        stage, ALGORITHMS[algorithm], where, tiny.model(stage), mesh, jax.random.key(3)
    )
    for part, weights in trained[role].items():
        jax.tree.map(np.testing.assert_array_equal, weights, expected[part])
    assert trained[role].keys() == ({"adapter"} if role == "policy" else {"adapter", "score_head"})
    assert set(frozen) == {"base"}


def test_an_adapter_of_another_kind_is_told(start):
    where, _ = start
    other = kind(rank=3)
    message = r"has rank: 2, alpha: 5.0, targets: \[q, down\], rslora: false; give the section lora the same"
    with pytest.raises(ValueError, match=message):
        check_start(where, other, tiny.ARCHITECTURE)
    (where.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        check_start(where, other, tiny.ARCHITECTURE)


def test_stages_that_start_from_its_model_read_it(write, tmp_path):
    (tmp_path / "run").mkdir()
    cfg = read_config(["--config", write(CONFIG)])
    names = {stage.name for stage in cfg.stages}
    found = [origins(stage, names).adapter for stage in cfg.stages]
    assert found == [tmp_path / "run", tmp_path / "run", None]


@pytest.mark.parametrize(
    "old, new, line",
    [
        ("path: RUN}", "path: hub:a/b/c}", "lora.path: 'hub:a/b/c' must read hub:OWNER/NAME[@REVISION]"),
        (
            "path: RUN}",
            "path: org/name}",
            "lora.path: there is no directory 'org/name'; a model of the hub is",
        ),
        (
            "reward, lora: {rank: 0}",
            "reward, model: {sharing: hydra}, lora: {path: RUN}",
            "stages.ppo.lora.path: would be ignored: ppo begins with fresh adapters, for its reference is",
        ),
        (
            "lora: {rank: 0}",
            "lora: {rank: 0, path: RUN}",
            "stages.ppo.lora.path: would be ignored: lora.rank",
        ),
        (
            "name: reward, algorithm: reward_model, from: RUN",
            "name: reward, algorithm: reward_model, from: sft, lora: {path: RUN}",
            "stages.reward.lora.path: would be ignored: the stage starts from 'sft', which is not the model",
        ),
    ],
)
def test_a_path_that_cannot_be_read_is_one_line(problems, tmp_path, old, new, line):
    (tmp_path / "run").mkdir()
    assert old in CONFIG
    assert any(found.startswith(line) for found in problems(CONFIG.replace(old, new)))
