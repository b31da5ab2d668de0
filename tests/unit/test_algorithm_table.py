"""The table that compares algorithms: equal budgets, and the arithmetic of its figures."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.bench import algorithms
from rlhf_jax.bench.algorithms import (
    POLICIES,
    Failed,
    Measured,
    algorithm_tree,
    completions_per_update,
    gain,
    read_results,
    render,
    run_all,
    settings_of,
    shared_tree,
)
from rlhf_jax.command_line import read_tree
from rlhf_jax.config_file import resolve
from rlhf_jax.online_config import OnlineConfig
from tests.conftest import ROOT


def measured(*gold, kl=0.0, seconds=None):
    return Measured(list(gold), kl=kl, length=20.0, distinct_2=0.01, seconds=seconds)


SFT = {0: measured(1.0, 2.0, 3.0), 1: measured(0.0, 1.0, 2.0)}


def test_every_algorithm_has_the_same_budget():
    chain = read_tree(str(ROOT / "configs" / "quickstart.yaml"))
    settings = read_tree(str(ROOT / "configs" / "bench" / "algorithms.yaml"))
    for name in POLICIES:
        tree = algorithm_tree(name, chain, settings, 12800)
        resolved = resolve(tree | {"run": {"dir": "unused"}})
        assert resolved.problems == (), name
        (stage,) = resolved.config.stages
        assert stage.settings.num_updates * completions_per_update(stage.settings) == 12800, name


@pytest.mark.parametrize(
    "name, options, completions",
    [
        ("dpo", {"batch_size": 32}, 64),  # pairs
        ("kto", {"batch_size": 32}, 32),
        ("ppo", {"batch_size": 64, "num_epochs": 4, "num_minibatches": 4}, 256),
        ("grpo", {"batch_size": 16, "group_size": 8}, 128),
    ],
)
def test_completions_of_an_update(name, options, completions):
    settings = ALGORITHM_SECTIONS[name](**options)
    assert completions_per_update(settings) == completions
    assert isinstance(settings, OnlineConfig) == (name in ("ppo", "grpo"))


def test_settings_of_an_algorithm_go_over_those_of_its_kind():
    chain = {"optimizer": {"schedule": "cosine", "warmup_steps": 9}, "dpo": {"beta": 9.0}, "stages": []}
    settings = {
        "offline": {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 5}},
        "online": {"optimizer": {"learning_rate": 7.0}},
        "algorithms": {"dpo": {"optimizer": {"learning_rate": 2e-3}, "dpo": {"batch_size": 4, "beta": 0.5}}},
    }
    tree = algorithm_tree("dpo", chain, settings, 80)
    (stage,) = tree.pop("stages")
    assert tree == {"optimizer": {"schedule": "cosine", "learning_rate": 1e-3, "warmup_steps": 5}}
    assert stage["optimizer"] == {"learning_rate": 2e-3}
    assert stage["dpo"] == {"batch_size": 4, "beta": 0.5, "num_steps": 10, "eval_every": 10}
    with pytest.raises(ValueError, match="dpo: 81 completions are no whole number of updates: 8 go through"):
        algorithm_tree("dpo", chain, settings, 81)
    with pytest.raises(ValueError, match="settings of dpoo: no such algorithm"):
        algorithm_tree("dpo", chain, settings | {"algorithms": {"dpoo": {}}}, 80)


def chain_with(**of_sft):
    names = {"sft": "sft", "reward": "reward_model", "ppo": "ppo"}
    stages = [{"name": name, "algorithm": algorithm} for name, algorithm in names.items()]
    return {"stages": stages, "model": {"num_layers": 1}, "sft": of_sft, "ppo": {"kl_coef": 0.1}}


@pytest.fixture
def trained(monkeypatch):
    """Returns what is trained, for which nothing is: the runs' names, each time one is begun or goes on."""
    names = []
    monkeypatch.setattr(algorithms, "train", lambda run, tree, seed: names.append(run.parent.name) or 1.0)
    monkeypatch.setattr(algorithms, "measure", lambda policy, sft, seed: measured(1.0, 2.0))
    return names


def run(directory, chain, completions=64):
    """Returns (failed, results, the others) of DPO and KTO after they were asked for."""
    options = {"offline": {}, "algorithms": {}}
    trees = {name: algorithm_tree(name, chain, options, completions) for name in ("dpo", "kto")}
    shared = shared_tree(chain)
    failed = run_all(directory, [0], shared, trees)
    return failed, *read_results(directory, settings_of(shared, trees))


def test_nothing_is_kept_of_another_sft_model_or_another_budget(trained, tmp_path):
    for chain, completions, expected in (
        (chain_with(num_steps=1), 64, ["shared", "dpo", "kto"]),
        (chain_with(num_steps=1), 64, []),
        (chain_with(num_steps=1) | {"ppo": {"kl_coef": 0.2}}, 64, []),  # of which nothing is read
        (chain_with(num_steps=1), 128, ["dpo", "kto"]),
        (chain_with(num_steps=2), 128, ["shared", "dpo", "kto"]),
        (chain_with(num_steps=1), 128, ["shared", "dpo", "kto"]),
    ):
        trained.clear()
        failed, results, others = run(tmp_path, chain, completions)
        assert (failed, trained, others) == ({}, expected, [])
        assert {name: set(of) for name, of in results.items()} == {key: {0} for key in ("sft", "dpo", "kto")}


def test_an_sft_model_that_was_begun_anew_and_not_finished_is_not_the_old_one(trained, tmp_path, monkeypatch):
    def fails(*_):
        raise Failed("no room")

    run(tmp_path, chain_with(num_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(algorithms, "train", fails)
        failed, results, others = run(tmp_path, chain_with(num_steps=2))
    assert (failed, results, others) == ({("sft", 0): "no room"}, {}, ["dpo-0", "kto-0"])
    trained.clear()
    assert run(tmp_path, chain_with(num_steps=1))[0] == {}
    assert trained == ["shared"]


def test_a_run_goes_on_where_its_configuration_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    begun = tmp_path / "0" / "begun"
    for steps, seed, goes_on in ((1, 0, False), (1, 0, True), (2, 0, False), (2, 0, True), (2, 1, False)):
        algorithms.train(begun.parent, shared_tree(chain_with(num_steps=steps)), seed)
        assert begun.exists() == goes_on
        begun.parent.mkdir(exist_ok=True)
        begun.touch()


def test_a_gain_is_paired_with_the_same_prompts_and_seed():
    """Prompts differ more than the policies: unpaired, nothing could be told."""
    of_one = gain({0: measured(2.0, 3.0, 4.5)}, SFT)
    assert of_one.mean == pytest.approx(3.5 / 3)
    assert of_one.standard_error == pytest.approx(np.std([1.0, 1.0, 1.5], ddof=1) / math.sqrt(3))


def test_the_standard_error_is_the_greater_of_prompts_and_seeds():
    seeds_differ = gain({0: measured(2.0, 3.0, 4.0), 1: measured(2.0, 3.0, 4.0)}, SFT)  # gains 1 and 2
    assert seeds_differ == (1.5, pytest.approx(math.sqrt(0.5) / math.sqrt(2)))
    prompts_differ = gain({0: measured(1.0, 3.0, 5.0), 1: measured(0.0, 2.0, 4.0)}, SFT)  # 0, 1, 2 twice
    assert prompts_differ == (1.0, pytest.approx(math.sqrt(2 * 1 / 3) / 2))


def test_the_table_has_the_registry_s_order_and_what_is_there():
    results = {
        "dpo": {0: measured(2.0, 3.0, 4.5, kl=4.0, seconds=50.0)},
        "ppo": {seed: measured(2.0, 3.0, 4.5, kl=2.0 + seed, seconds=60.0) for seed in (0, 1)},
        "sft": SFT,
    }
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in render(results).splitlines()]
    assert [line[0] for line in lines[2:]] == ["`sft`", "`ppo`", "`dpo`"]
    assert lines[2][1:5] == ["2", "1.50 ± 0.71", "", ""]
    assert lines[3][1:4] == ["2", "3.17 ± 0.00", "+1.67"]
    assert lines[3][5] == "2.50 ± 0.71"
    assert lines[4] == ["`dpo`", "1", "3.17", "+1.17", "7.0", "4.00", "20.0", "0.0100", "50"]
