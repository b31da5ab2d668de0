"""The same chain on one and eight devices: every logged figure of SFT, reward and PPO's first iterations."""

import json

import jax
import numpy as np
import pytest
import yaml

from rlhf_jax import stage
from rlhf_jax.command_line import read_command_line
from rlhf_jax.config import MeshConfig
from rlhf_jax.models.transformer import make_model
from rlhf_jax.plan import plan_stages
from rlhf_jax.programs import build_programs
from rlhf_jax.run_tokenizer import prepare_tokenizer
from rlhf_jax.sharding import make_mesh, place_rows
from rlhf_jax.stop_signals import StopSignals
from tests.completions import assert_same_completions, next_token_logits
from tests.smoke.test_quickstart import SHORT

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "sequence": 2}]
"""All axes; test_algorithms.py has each by itself."""
CHAIN = SHORT.replace("num_heads: 2, num_kv_heads: 1", "num_heads: 4, num_kv_heads: 4")  # for four devices
PPO_ALONE = """
run: {{dir: {dir}}}
stages: [{{name: ppo, algorithm: ppo, from: {run}/sft, reward_from: {run}/reward}}]
data: {{max_prompt_length: 32, max_eval_records: 32}}
rewards: {{gold: "rlhf_jax.data.synthetic:gold_reward"}}
rollout: {{max_new_tokens: 12}}
ppo: {{num_iterations: 3, batch_size: 16, num_minibatches: 2, eval_every: 2}}
"""


def figures(run, stage):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keep = lambda name: not name.startswith("perf/") and name not in ("time", "stage")  # noqa: E731
    return [{name: x for name, x in row.items() if keep(name)} for row in rows if row["stage"] == stage]


def assert_close(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, abs=TOLERANCE * max(1, abs(value))), (name, b["step"])


def write_models_chain(directory):
    """Returns a configuration of the chain without PPO."""
    tree = yaml.safe_load(CHAIN.format(dir=directory / "run"))
    tree["stages"] = [stage for stage in tree["stages"] if stage["name"] != "ppo"]
    for section in ("ppo", "rollout", "rewards"):
        del tree[section]
    path = directory / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def saved_models(run_train, tmp_path_factory):
    """Returns the run directory of SFT and reward model on one device."""
    directory = tmp_path_factory.mktemp("one")
    done = run_train(["--config", write_models_chain(directory)])
    assert done.returncode == 0, done.stderr
    return directory / "run"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sft_and_reward_stages(run_train, saved_models, tmp_path, mesh):
    flags = [flag for axis, size in mesh.items() for flag in (f"--mesh.{axis}", str(size))]
    eight = run_train(["--config", write_models_chain(tmp_path), *flags], env={"JAX_NUM_CPU_DEVICES": "8"})
    assert eight.returncode == 0, eight.stderr
    for name in ("sft", "reward"):
        assert_close(figures(tmp_path / "run", name), figures(saved_models, name))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ppo_from_the_same_models(saved_models, tmp_path, monkeypatch, mesh):
    """Three iterations and their evaluations, through the stage as the command runs it.

    Tokens are compared at every rollout; where a draw fell on a tie, both go on from one device's.
    """
    rollouts = []

    def record(plan, programs):
        def rollout(params, frozen, prompts, key):
            made = programs.rollout(params, frozen, prompts, key)
            rollouts.append(jax.device_get((prompts, made)))
            return made

        return rollout

    def compare(plan, programs):
        expected = iter(rollouts)
        model = make_model(plan.architecture)

        def rollout(params, frozen, prompts, key):
            made, (asked, recorded) = programs.rollout(params, frozen, prompts, key), next(expected)
            assert all(map(np.array_equal, jax.device_get(prompts), asked))
            whole = jax.device_put(jax.device_get(params["policy"]), jax.devices()[0])
            logits = next_token_logits(model, whole, plan.stage.rollout.temperature)
            assert_same_completions(jax.device_get(made), recorded, asked, key, logits)
            return place_rows(made.ended.sharding.mesh, recorded)

        return rollout

    one_device = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    run_ppo(saved_models, tmp_path / "one", one_device, record, monkeypatch)
    assert len(rollouts) == 3 + 3 * 2  # of training, and three evaluations on two batches
    run_ppo(saved_models, tmp_path / "eight", make_mesh(MeshConfig(**mesh)), compare, monkeypatch)
    found, expected = (figures(tmp_path / name, "ppo") for name in ("eight", "one"))
    assert [row["step"] for row in expected] == [0, 1, 2, 3]
    assert_close(found, expected)


def run_ppo(start, directory, mesh, wrap, monkeypatch):
    """Runs PPO from another run's models on a mesh, in this process, its rollout wrapped."""
    file = directory.with_suffix(".yaml")
    file.write_text(PPO_ALONE.format(run=start, dir=directory))
    config, _ = read_command_line(["--config", str(file)])
    (plan,) = plan_stages(config, prepare_tokenizer(config))

    def build(*args, **named):
        programs = build_programs(*args, **named)
        wrapped = wrap(plan, programs)
        return programs._replace(rollout=wrapped, rollout_of_one=wrapped)

    monkeypatch.setattr(stage, "build_programs", build)
    stage.run_stage(plan, mesh, StopSignals())
