"""Stages that go on with an adapter in PEFT's format: lora.path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.command_line import read_config
from rlhf_jax.models import hf, tensor_files
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
    """Returns by algorithm where a stage starts from, and the adapter, and head, that it goes on with."""
    adapter = tiny.adapter(tiny.stage("sft", lora=LORA), tiny.mesh())
    head = {"kernel": jnp.arange(32) / 7.0, "bias": jnp.float32(0)}
    hf.save_policy(tmp_path / "base", tiny.ARCHITECTURE, tiny.weights("policy", tiny.mesh()))
    found = {}
    for algorithm, of in {"sft": None, "reward_model": head}.items():
        write_adapter(tmp_path / algorithm, tiny.ARCHITECTURE, kind(), adapter, "base", score_head=of)
        expected = {"adapter": adapter, "score_head": of}
        found[algorithm] = Origins(tmp_path / "base", None, tmp_path / algorithm), expected
    return found


@pytest.mark.parametrize("algorithm, role", [("sft", "policy"), ("reward_model", "reward")])
def test_the_adapter_that_training_goes_on_with(start, algorithm, role):
    """Of a reward model also the head; on a mesh the adapter is divided as any other."""
    where, expected = start[algorithm]
    stage, mesh = tiny.stage(algorithm, lora=LORA), tiny.mesh(fsdp=2)
    check_start(stage, where, kind(), tiny.ARCHITECTURE)
    trained, frozen = load_roles(
        stage, ALGORITHMS[algorithm], where, tiny.model(stage), mesh, jax.random.key(3)
    )
    for part, weights in trained[role].items():
        jax.tree.map(np.testing.assert_array_equal, weights, expected[part])
    assert trained[role].keys() == ({"adapter"} if role == "policy" else {"adapter", "score_head"})
    assert set(frozen) == {"base"}


def test_the_host_never_holds_the_base_in_a_wider_type(start, monkeypatch):
    """What is read of a base that is frozen in bfloat16 is bfloat16 from the first byte."""
    where, _ = start["sft"]
    allocated, empty = [], tensor_files.empty

    def counting(shape, dtype):
        allocated.append((math.prod(shape) * dtype.itemsize, dtype))
        return empty(shape, dtype)

    monkeypatch.setattr(tensor_files, "empty", counting)
    stage, sft = tiny.stage("sft", lora=LORA), ALGORITHMS["sft"]
    _, frozen = load_roles(stage, sft, where, tiny.model(stage), tiny.mesh(), jax.random.key(3))
    assert {dtype for _, dtype in allocated} == {jnp.dtype("bfloat16")}
    assert sum(size for size, _ in allocated) == sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    rounded = jax.tree.map(jnp.bfloat16, tiny.weights("policy", tiny.mesh()))
    jax.tree.map(np.testing.assert_array_equal, frozen["base"], rounded)


def test_a_score_head_that_a_stage_would_drop_is_told(start):
    where, _ = start["reward_model"]
    message = "reward_model has a score head, which a stage that runs sft would drop: it is a reward model's"
    with pytest.raises(ValueError, match=message):
        check_start(tiny.stage("sft", lora=LORA), where, kind(), tiny.ARCHITECTURE)


def test_an_adapter_of_another_kind_is_told(start):
    where, _ = start["sft"]
    stage, other = tiny.stage("sft", lora=LORA), kind(rank=3)
    message = r"has rank: 2, alpha: 5.0, targets: \[q, down\], rslora: false; give the section lora the same"
    with pytest.raises(ValueError, match=message):
        check_start(stage, where, other, tiny.ARCHITECTURE)
    (where.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        check_start(stage, where, other, tiny.ARCHITECTURE)


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
