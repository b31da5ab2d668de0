"""Where the roles' parameters come from: the normaliser, the value model's start, buffers of their own."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.checkpoint import Checkpointer
from rlhf_jax.config import RunConfig
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.records import Preference, PromptCompletion
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.lowering import abstract_roles
from rlhf_jax.models.forward import make_forward
from rlhf_jax.models.heads import Ensemble
from rlhf_jax.models.scorers import Normalizer, save_scorer
from rlhf_jax.models.transformer import make_model
from rlhf_jax.origins import Origins, adapter_info, check_base
from rlhf_jax.plan import Plan
from rlhf_jax.role_parts import role_parts
from rlhf_jax.roles import load_policy, load_reward, load_roles, load_trained_scorer
from rlhf_jax.stage import _normalized
from tests import tiny

FIELDS = dataclasses.fields(Examples)
NO_DEFAULT = dataclasses.MISSING
COUNTS = [  # no batch depends on them
    field.name for field in FIELDS if field.default is field.default_factory is NO_DEFAULT
]
MODEL = tiny.model()
ROOT = jax.random.key(5)


@pytest.fixture(scope="module")
def mesh():
    return tiny.mesh()


@pytest.fixture(scope="module")
def programs(mesh):
    """Of a reward stage: `scores` is what the tests measure with."""
    return tiny.programs(tiny.stage("reward_model", settings={"batch_size": 4}), mesh)


@pytest.fixture(scope="module")
def demonstrations():
    return tiny.rows(12, seed=4)


def save_reward_stage(directory, programs, mesh, mean=0.0, std=1.0):
    """Writes RUN/reward as a finished stage would, with this normaliser; returns its raw parameters."""
    reward = tiny.weights("reward", mesh, seed=3)
    state = programs.init_state({"reward": jax.tree.map(jnp.copy, reward)})
    aux = {"normalizer_mean": jnp.float32(mean), "normalizer_std": jnp.float32(std)}
    with Checkpointer(directory / "checkpoints", keep=1) as checkpointer:
        checkpointer.save(1, state._replace(aux=aux), {"architecture": tiny.ARCHITECTURE.to_dict()})
    return reward


def roles_of(algorithm, mesh, policy=None, reward=None, **sections):
    where = Origins(policy=policy, reward=reward)
    return load_roles(tiny.stage(algorithm, **sections), ALGORITHMS[algorithm], where, MODEL, mesh, ROOT)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("normalizer", ["none", "mean", "mean_std"])
def test_a_loaded_reward_is_normal_on_the_demonstrations(
    tmp_path, programs, mesh, demonstrations, normalizer
):
    """NUMERICS 28: the stored mean and deviation are applied on load, whatever the trunk says."""
    raw = np.asarray(programs.scores({"reward": tiny.weights("reward", mesh, 3)}, {}, demonstrations))
    mean = 0.0 if normalizer == "none" else raw.mean()
    std = raw.std() if normalizer == "mean_std" else 1.0
    assert abs(raw.mean()) > 0.01 and abs(raw.std() - 1) > 0.01  # else there is nothing to normalise
    save_reward_stage(tmp_path, programs, mesh, mean, std)
    _, frozen = roles_of("ppo", mesh, reward=tmp_path)
    found = np.asarray(programs.scores({"reward": frozen["reward"]}, {}, demonstrations))
    np.testing.assert_allclose(found, (raw - mean) / std, rtol=1e-5, atol=1e-5)
    if normalizer != "none":
        assert found.mean() == pytest.approx(0, abs=1e-5)
    if normalizer == "mean_std":
        assert found.std() == pytest.approx(1, abs=1e-5)


def test_the_value_model_starts_as_the_normalised_reward_model(tmp_path, programs, mesh, demonstrations):
    """NUMERICS 29: with the normaliser folded in, its value at the last token is the score."""
    save_reward_stage(tmp_path, programs, mesh, mean=0.7, std=2.5)
    trained, frozen = roles_of("ppo", mesh, reward=tmp_path)
    assert_equal(trained["value"], frozen["reward"])
    hidden = MODEL.hidden(trained["value"]["trunk"], demonstrations.tokens)
    last = hidden[jnp.arange(12), demonstrations.lengths - 1]
    head = trained["value"]["score_head"]
    values = last @ head["kernel"] + head["bias"]
    scores = programs.scores({"reward": frozen["reward"]}, {}, demonstrations)
    np.testing.assert_allclose(values, scores, rtol=1e-5, atol=1e-5)


def test_a_reward_model_in_transformers_layout(tmp_path, programs, mesh, demonstrations):
    """Its normaliser is folded in, and the value model starts as its copy, in a buffer of its own."""
    raw = tiny.weights("reward", mesh, seed=3)
    save_scorer(tmp_path / "hf", tiny.ARCHITECTURE, raw, "reward", Normalizer(0.7, 2.5))
    trained, frozen = roles_of("ppo", mesh, reward=tmp_path / "hf")
    expected = (np.asarray(programs.scores({"reward": raw}, {}, demonstrations)) - 0.7) / 2.5
    found = np.asarray(programs.scores({"reward": frozen["reward"]}, {}, demonstrations))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert_equal(trained["value"], frozen["reward"])
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(trained))
    assert_equal(frozen["reward"]["trunk"], raw["trunk"])


def test_no_two_roles_share_a_buffer(tmp_path, programs, mesh, demonstrations):
    """The trained roles are donated: the frozen ones must outlive them."""
    save_reward_stage(tmp_path, programs, mesh)
    trained, frozen = roles_of("ppo", mesh, reward=tmp_path)
    assert_equal(trained["policy"], frozen["reference"])
    kept = jax.device_get(frozen)
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x - 1, tree), donate_argnums=0)
    jax.block_until_ready(donate(trained))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert_equal(frozen, kept)


def test_without_a_reward_model_values_are_zero_on_the_policy_s_trunk(mesh):
    trained, frozen = roles_of("ppo", mesh)
    assert frozen.keys() == {"reference"}
    assert_equal(trained["value"]["trunk"], trained["policy"]["trunk"])
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(trained["value"]["score_head"]))
    ppo = tiny.programs(tiny.stage("ppo"), mesh)
    rollout = ppo.rollout(trained, frozen, tiny.prompts(), jax.random.key(0))
    scored, _ = ppo.score(trained, frozen, rollout)
    np.testing.assert_array_equal(scored.values, np.zeros_like(scored.values))
    np.testing.assert_array_equal(scored.scores, np.zeros_like(scored.scores))


def test_a_reward_model_starts_on_the_policy_s_trunk_with_a_random_head(mesh):
    """NUMERICS 28: N(0, 1/(D+1)) without a bias."""
    policy = roles_of("sft", mesh)[0]["policy"]
    trained, frozen = roles_of("reward_model", mesh)
    assert frozen == {}
    assert_equal(trained["reward"]["trunk"], policy["trunk"])
    head = jax.device_get(trained["reward"]["score_head"])
    assert head["bias"] == 0
    assert 0.5 < head["kernel"].std() * np.sqrt(33) < 1.5


def test_a_policy_comes_from_the_stage_that_trained_it(tmp_path, mesh):
    programs = tiny.programs(tiny.stage("sft"), mesh)
    policy = tiny.weights("policy", mesh, seed=8)
    state = programs.init_state({"policy": jax.tree.map(jnp.copy, policy)})
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpointer:
        older = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
        checkpointer.save(1, older, {})
        checkpointer.save(2, state, {})
    assert_equal(load_policy(tmp_path, MODEL, mesh), policy)
    trained, frozen = roles_of("ppo", mesh, policy=tmp_path)
    assert_equal(trained["policy"], policy)
    assert_equal(frozen["reference"], policy)
    assert_equal(trained["value"]["trunk"], policy["trunk"])


def test_eight_devices_load_what_one_loads(tmp_path, programs, mesh):
    save_reward_stage(tmp_path, programs, mesh, mean=0.7, std=2.5)
    many = roles_of("ppo", tiny.mesh(data=2, fsdp=2, tensor=2), reward=tmp_path)
    one = roles_of("ppo", mesh, reward=tmp_path)
    for a, b in zip(many, one, strict=True):
        assert tiny.relative_difference(a, b) < 1e-6


def kind_of(leaf):
    return leaf.shape, leaf.dtype, leaf.sharding.memory_kind or "device"


def test_frozen_models_in_host_memory_and_in_bfloat16_are_what_they_are_elsewhere(mesh):
    """They are copied to the device for the score pass; trained roles stay float32 on it."""
    options = {"frozen_memory": "host", "frozen_dtype": "bfloat16"}
    trained, frozen = roles_of("ppo", mesh, model=options)
    stage = tiny.stage("ppo", model=options)
    parts = {role: of for role, of in role_parts(stage, ALGORITHMS["ppo"]).items() if role != "reward"}
    planned = abstract_roles(stage, parts, MODEL, mesh)
    assert_alike = partial(jax.tree.map, lambda x, y: np.testing.assert_equal(kind_of(x), kind_of(y)))
    assert_alike(planned, (trained, frozen))
    (leaf, *_) = jax.tree.leaves(frozen["reference"])
    assert (leaf.sharding.memory_kind, leaf.dtype) == ("pinned_host", jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(trained)} == {"device"}
    in_host = tiny.programs(stage, mesh)
    rollout = in_host.rollout(trained, frozen, tiny.prompts(), jax.random.key(0))
    found, _ = in_host.score(trained, frozen, rollout)
    rounded = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), frozen)
    expected, _ = tiny.programs(tiny.stage("ppo"), mesh).score(trained, rounded, rollout)
    np.testing.assert_allclose(found.ref_logprobs, expected.ref_logprobs, rtol=1e-6, atol=1e-6)
    assert np.max(np.abs(found.ref_logprobs - found.old_logprobs)) > 1e-5  # the rounding


def save_stage(directory, algorithm, sharing, mesh, trained, info, aux=()):
    """Writes RUN/STAGE as a finished stage would."""
    programs = tiny.programs(tiny.stage(algorithm, sharing), mesh)
    state = programs.init_state(jax.tree.map(jnp.copy, trained))
    parts = {role: sorted(weights) for role, weights in trained.items()}
    info = {"architecture": tiny.ARCHITECTURE.to_dict(), "algorithm": algorithm, "parts": parts} | info
    with Checkpointer(directory / "checkpoints", keep=1) as checkpointer:
        checkpointer.save(1, state._replace(aux=state.aux | dict(aux)), info)


def test_a_hydra_starts_from_the_reward_model_s_adapter_on_the_same_base(tmp_path, mesh, demonstrations):
    """NUMERICS 29; merged, for a stage that has no base, the same reward model says the same."""
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    save_stage(sft, "sft", "separate", mesh, {"policy": tiny.weights("policy", mesh, seed=8)}, {})
    lora = tiny.model(tiny.stage("reward_model", "lora")).lora
    of_reward = dataclasses.replace(
        tiny.stage("reward_model", "lora"), start_from="sft", run=RunConfig(dir=str(tmp_path))
    )
    info = adapter_info(of_reward, Origins(sft, None), lora)
    assert info["base"]["stage"] == "sft"
    raw, _ = tiny.roles("reward_model", mesh, "lora")
    aux = {"normalizer_mean": jnp.float32(0.7), "normalizer_std": jnp.float32(2.5)}
    save_stage(reward, "reward_model", "lora", mesh, raw, info, aux)

    stage, where = tiny.stage("ppo", "hydra"), Origins(sft, reward)
    hydra = tiny.model(stage)
    trained, frozen = load_roles(stage, ALGORITHMS["ppo"], where, hydra, mesh, ROOT)
    assert frozen.keys() == {"base", "reward"}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["base"])} == {jnp.dtype("bfloat16")}
    assert_equal(trained["value"], frozen["reward"])
    assert_equal(trained["value"]["adapter"], raw["reward"]["adapter"])
    assert trained["policy"].keys() == {"adapter"}
    of_base = jax.jit(make_forward(hydra, 8).scores)({}, frozen, demonstrations)
    whole = load_reward(reward, MODEL, mesh)
    merged = jax.jit(make_forward(MODEL, 8).scores)({"reward": whole}, {}, demonstrations)
    np.testing.assert_allclose(of_base, merged, rtol=1e-5, atol=1e-5)

    moved, other = tmp_path / "moved", tmp_path / "other"
    save_stage(other, "sft", "separate", mesh, {"policy": tiny.weights("policy", mesh, seed=9)}, {})
    with pytest.raises(ValueError, match="holds adapters of .*sft, but the base of this stage is .*other"):
        check_base(stage, Origins(other, reward), lora)
    with pytest.raises(ValueError, match="holds adapters of another kind"):
        check_base(stage, where, lora._replace(alpha=1.0))
    sft.rename(moved)
    again, _ = load_roles(stage, ALGORITHMS["ppo"], Origins(moved, reward), hydra, mesh, ROOT)
    assert_equal(again["value"], trained["value"])
    with pytest.raises(ValueError, match="base of this stage is .*sft, which is another model, or has"):
        check_base(stage, where, lora)


def examples(kind, rows):
    """The given Rows as a stage's examples."""
    host = jax.device_get(rows)
    made = [
        Row(tokens[:length].tolist(), int(prompt))
        for tokens, prompt, length in zip(host.tokens, host.prompt_lengths, host.lengths, strict=True)
    ]
    record = Preference("a", "b", "c") if kind == "preference" else PromptCompletion("a", "b")
    number = len(made) // (2 if kind == "preference" else 1)
    told = {
        "kind": kind,
        "records": [record] * number,
        "rows": token_rows(made),
        "length": 16,
        "pad_id": tiny.PAD,
    }
    return Examples(**dict.fromkeys(COUNTS, 0) | told)


def test_heads_are_normalised_one_by_one_and_read_as_one_or_all(tmp_path, mesh, demonstrations):
    stage = tiny.stage("reward_model", settings={"batch_size": 4, "num_heads": 3, "normalizer": "mean_std"})
    programs = tiny.programs(stage, mesh)
    ensemble = tiny.weights("reward", mesh, seed=3, num_heads=3)
    state = programs.init_state({"reward": jax.tree.map(jnp.copy, ensemble)})
    plan = Plan(
        stage=stage,
        number=0,
        algorithm=ALGORITHMS["reward_model"],
        architecture=tiny.ARCHITECTURE,
        origins=Origins(None, None),
        tokenizer=None,
        text={},
        train=(read := examples("prompt_completion", demonstrations)),
        held_out=read,
        demonstrations=read,
        functions={},
        gold=None,
    )
    raw = np.asarray(programs.head_scores(state.params, {}, demonstrations))
    state = _normalized(plan, programs, state, {}, mesh)
    np.testing.assert_allclose(state.aux["normalizer_mean"], raw.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.aux["normalizer_std"], raw.std(axis=1), rtol=1e-5)
    with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpointer:
        info = {"architecture": tiny.ARCHITECTURE.to_dict(), "num_heads": 3}
        checkpointer.save(1, state, info)
    normal = (raw - raw.mean(axis=1, keepdims=True)) / raw.std(axis=1, keepdims=True)

    trained, frozen = roles_of("ppo", mesh, reward=tmp_path)  # their mean, as one head
    assert frozen["reward"]["score_head"]["kernel"].ndim == 1
    assert_equal(trained["value"], frozen["reward"])
    said = jax.jit(make_forward(MODEL, 8).scores)({}, frozen, demonstrations)
    np.testing.assert_allclose(said, normal.mean(axis=0), rtol=1e-5, atol=1e-5)

    least = make_model(tiny.ARCHITECTURE, ensemble=Ensemble(3, "minimum"))
    whole = load_reward(tmp_path, least, mesh)
    said = jax.jit(make_forward(least, 8).scores)({"reward": whole}, {}, demonstrations)
    np.testing.assert_allclose(said, normal.min(axis=0), rtol=1e-5, atol=1e-5)

    exported, normalizer = load_trained_scorer(tmp_path, "reward", MODEL, mesh)
    save_scorer(tmp_path / "hf", tiny.ARCHITECTURE, exported, "reward", normalizer)
    again = load_reward(tmp_path / "hf", MODEL, mesh)
    said = jax.jit(make_forward(MODEL, 8).scores)({"reward": again}, {}, demonstrations)
    np.testing.assert_allclose(said, normal.mean(axis=0), rtol=1e-5, atol=1e-5)


def test_a_fresh_trunk_is_not_that_of_the_policy(tmp_path, mesh):
    save_stage(tmp_path, "sft", "separate", mesh, {"policy": tiny.weights("policy", mesh, seed=8)}, {})
    given, _ = roles_of("reward_model", mesh, policy=tmp_path)
    fresh, _ = roles_of("reward_model", mesh, policy=tmp_path, settings={"fresh_trunk": True})
    assert_equal(given["reward"]["trunk"], tiny.weights("policy", mesh, seed=8)["trunk"])
    assert (
        tiny.relative_difference(fresh["reward"]["trunk"]["layers"], given["reward"]["trunk"]["layers"]) > 0.1
    )


@pytest.mark.parametrize("normalizer", ["mean", "mean_std"])
@pytest.mark.parametrize("kind", ["prompt_completion", "preference"])
def test_the_normaliser_is_mean_and_deviation_of_the_scores(programs, mesh, demonstrations, normalizer, kind):
    """Of pairs, only the chosen completions count. The last batch of ten is filled up."""
    rows = jax.tree.map(lambda x: x[:10], demonstrations)
    read = examples(kind, rows)
    stage = tiny.stage("reward_model", settings={"batch_size": 4, "normalizer": normalizer})
    plan = Plan(
        stage=stage,
        number=0,
        algorithm=ALGORITHMS["reward_model"],
        architecture=tiny.ARCHITECTURE,
        origins=Origins(None, None),
        tokenizer=None,
        text={},
        train=read,
        held_out=read,
        demonstrations=read,
        functions={},
        gold=None,
    )
    state = programs.init_state({"reward": tiny.weights("reward", mesh, seed=3)})
    scores = np.asarray(programs.scores(state.params, {}, rows))[:: 2 if kind == "preference" else 1]
    aux = _normalized(plan, programs, state, {}, mesh).aux
    assert float(aux["normalizer_mean"]) == pytest.approx(scores.mean(), abs=1e-5)
    expected = scores.std() if normalizer == "mean_std" else 1.0
    assert float(aux["normalizer_std"]) == pytest.approx(expected, abs=1e-5)
