"""A chain of adapters by the real command line: SFT in full and as adapters, then a reward model and PPO."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import evaluate, export
from rlhf_jax.checkpoint import CheckpointReader, load_info, load_params, read_result
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.lora import Lora
from rlhf_jax.models.transformer import make_model
from rlhf_jax.role_parts import part_shardings, role_shardings
from rlhf_jax.roles import load_policy, load_reward
from rlhf_jax.sample import Sampler
from tests import tiny
from tests.smoke.test_quickstart import SHORT

pytestmark = pytest.mark.slow

STAGES = """\
  - {name: sft, algorithm: sft, lora: {rank: 0}}
  - {name: style, algorithm: sft, from: sft, sft: {num_steps: 4, batch_size: 16}}
  - {name: reward, algorithm: reward_model, from: style}
  - {name: ppo, algorithm: ppo, from: style, reward_from: reward, model: {sharing: hydra}}
lora: {rank: 3, alpha: 6.0}
optimizer: {learning_rate: 0.01}
"""


def configuration(directory):
    """Returns the file of the short chain, with adapters from its second stage on."""
    head, _, tail = SHORT.format(dir=directory / "run").partition("  - {name: sft")
    path = directory / "short.yaml"
    path.write_text(head + STAGES + tail[tail.index("model:") :])
    return path


@pytest.fixture(scope="module")
def finished(run_train, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hydra")
    config = configuration(directory)
    done = run_train(["--config", config])
    assert done.returncode == 0, done.stderr
    return directory / "run", config


@pytest.fixture(scope="module")
def mesh():
    return tiny.mesh()


def model_of(stage_dir):
    info = load_info(stage_dir)
    lora = Lora(**info["lora"])._replace(targets=tuple(info["lora"]["targets"]))
    return make_model(Architecture.from_dict(info["architecture"]), lora=lora), info


def adapter_of(stage_dir, role, model, mesh):
    parts = ("adapter", "score_head") if role != "policy" else ("adapter",)
    shapes, shardings = model.shapes_of(parts), part_shardings(model, mesh, parts)
    abstract = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings
    )
    return load_params(stage_dir, role, abstract)


def test_checkpoints_hold_adapters_and_heads_alone(finished):
    run, _ = finished
    expected = {"style": {"policy/adapter"}, "reward": {"reward/adapter", "reward/score_head"}}
    expected["ppo"] = {"policy/adapter", "value/adapter", "value/score_head"}
    for stage, parts in expected.items():
        step, _ = read_result(run / stage)
        leaves = CheckpointReader(run / stage / "checkpoints")._manifest(step)["leaves"]
        found = {"/".join(name.split("/")[1:3]) for name in leaves if name.startswith("params/")}
        assert found == parts
        assert max(np.prod(shape) for _, shape in leaves.values()) <= 48 * 3
        base = load_info(run / stage)["base"]
        assert (base["stage"], base["dtype"]) == ("sft" if stage == "style" else "style", "bfloat16")


def test_the_export_is_the_adapted_model(finished, mesh, tmp_path):
    """Base in bfloat16 and adapter, joined in the forward, against the merged Hugging Face directory."""
    run, _ = finished
    out = tmp_path / "out"
    assert export.main(["--run", str(run), "--out", str(out)]) == 0
    model, _ = model_of(run / "ppo")
    base = load_policy(run / "style", model, mesh)
    base = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), base)
    adapter = adapter_of(run / "ppo", "policy", model, mesh)["adapter"]
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(adapter)) > 0
    tokens = tiny.rows(4).tokens
    (hidden,) = model.hidden_of_roles(base["trunk"], (adapter,), tokens)
    whole = hf.load_policy(out, hf.read_architecture(out), role_shardings(model, mesh, "policy"))
    expected = model.logits(whole, model.hidden(whole["trunk"], tokens))
    np.testing.assert_allclose(model.logits(base, hidden), expected, rtol=1e-4, atol=1e-4)
    data = tmp_path / "records.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": "Customer: hello", "completion": f"good day {i}"}) for i in range(8))
    )
    of_stage, of_export = (
        evaluate.measure(str(at), str(data), 8, [])["perplexity"] for at in (run / "ppo", out)
    )
    assert of_stage == pytest.approx(of_export, rel=1e-5)
    sampled = [
        [of.tokens for of in Sampler.load(str(at), max_new_tokens=8)(["Customer: hello"] * 8)]
        for at in (run / "ppo", out)
    ]
    assert sampled[0] == sampled[1] and len(set(map(tuple, sampled[0]))) > 1


def test_a_reward_model_is_merged_for_others(finished, mesh):
    """Scores of the merged model are those of adapter and head on the base."""
    run, _ = finished
    model, info = model_of(run / "reward")
    assert info["algorithm"] == "reward_model"
    merged = load_reward(run / "reward", model, mesh)
    assert merged.keys() == {"trunk", "score_head"}
    base = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), load_policy(run / "style", model, mesh))
    own = adapter_of(run / "reward", "reward", model, mesh)
    tokens = tiny.rows(4).tokens
    (hidden,) = model.hidden_of_roles(base["trunk"], (own["adapter"],), tokens)
    np.testing.assert_allclose(hidden, model.hidden(merged["trunk"], tokens), rtol=1e-4, atol=1e-4)


def test_a_killed_hydra_goes_on_where_it_stood(finished, run_train, tmp_path):
    """The moved run's last stage is taken back by a step and repeated: the same metrics, to the digit."""
    run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    again = tmp_path / "run"
    config = configuration(tmp_path)
    (again / "ppo" / "result.json").unlink()
    shutil.rmtree(again / "ppo" / "checkpoints" / "4")
    done = run_train(["--config", config])
    assert done.returncode == 0, done.stderr
    assert "[ppo] goes on after step 2" in done.stderr

    def logged(at):
        lines = [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()]
        return [
            {
                name: x
                for name, x in line.items()
                if not name.startswith("perf/") and name not in ("time", "stage")
            }
            for line in lines
            if line["stage"] == "ppo"
        ]

    for found, expected in zip(logged(again), logged(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)


def test_adapters_of_a_model_that_has_changed_are_refused(finished, mesh, tmp_path):
    run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "style")
    model, _ = model_of(run / "ppo")
    with pytest.raises(ValueError, match="holds adapters of .*style, which is not there"):
        load_policy(tmp_path / "run" / "ppo", model, mesh)
    shutil.copytree(run / "sft", tmp_path / "run" / "style")
    with pytest.raises(ValueError, match="holds adapters of .*style, which is not the model any more"):
        load_policy(tmp_path / "run" / "ppo", model, mesh)


def test_a_reward_model_of_another_base_is_refused(finished, run_train, tmp_path):
    """By directory, where the configuration alone cannot tell."""
    run, config = finished
    text = config.read_text().replace(str(run), str(tmp_path / "run"))
    head, _, tail = text.partition("  - {name: sft")
    stage = f"  - {{name: ppo, algorithm: ppo, from: {run}/sft, reward_from: {run}/reward, "
    stage += "model: {sharing: hydra}}\n"
    other = tmp_path / "other.yaml"
    sections = tail[tail.index("lora: {rank: 3") :]
    keep = [
        line
        for line in sections.splitlines()
        if not line.startswith(("model:", "tokenizer:", "sft:", "reward_model:"))
    ]
    other.write_text(head + stage + "\n".join(keep).replace("max_length: 96, ", "") + "\n")
    done = run_train(["--config", other])
    assert done.returncode == 2
    assert (
        f"{run}/reward holds adapters of {run}/style, but the base of this stage is {run}/sft" in done.stderr
    )
