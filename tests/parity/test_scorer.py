"""Reward models against transformers' sequence classification: theirs here, ours there, what is refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from rlhf_jax.batch import Rows
from rlhf_jax.models import heads
from rlhf_jax.models.scorers import (
    Normalizer,
    check_scorer,
    load_scorer,
    read_scorer,
    save_scorer,
)
from rlhf_jax.models.transformer import SCORER, make_model
from rlhf_jax.sharding import param_shardings
from tests import tiny
from tests.parity.make_export_golden import digest
from tests.parity.make_scorer_golden import GOLDEN, IDS, MEAN, PAD, SCORERS, STD, export, tensors, texts
from tests.random_llama import random_tensors


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def write_theirs(directory, golden, name):
    """Writes a reward model as transformers does, and returns its directory."""
    directory.mkdir()
    (directory / "config.json").write_text(str(golden[f"{name}/config"]))
    save_file(random_tensors(shapes(golden, name)), directory / "model.safetensors")
    return directory


def shapes(golden, name):
    return json.loads(str(golden[f"{name}/shapes"]))


@pytest.fixture
def checkpoint(tmp_path, golden):
    return write_theirs(tmp_path / "theirs", golden, "llama")


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory, mesh):
    scorer = read_scorer(directory)
    check_scorer(directory, scorer)
    model = make_model(scorer.architecture)
    return scorer, load_scorer(
        directory, scorer, param_shardings(mesh, model.axes_of(SCORER), model.score_shapes)
    )


def scores(scorer, params):
    tokens, lengths = (jnp.asarray(x, jnp.int32) for x in texts())
    rows = Rows(tokens, lengths, lengths)
    hidden = make_model(scorer.architecture).hidden(params["trunk"], rows.tokens)
    return np.asarray(heads.scores(params["score_head"], hidden, rows.lengths))


@pytest.mark.parametrize("name", SCORERS)
def test_a_reward_model_of_transformers_has_its_logits_here(tmp_path, golden, one_device_mesh, name):
    scorer, params = load(write_theirs(tmp_path / "theirs", golden, name), one_device_mesh)
    assert (scorer.pad_id, scorer.normalizer, scorer.role) == (PAD, (0.0, 1.0), "reward")
    np.testing.assert_allclose(scores(scorer, params), golden[f"{name}/logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCORERS)
def test_our_reward_model_has_its_scores_in_transformers(tmp_path, golden, one_device_mesh, name):
    """transformers gives the logit; the normaliser is what config.json says."""
    ours = tmp_path / "ours"
    export(name, ours)
    assert len(list(ours.glob("*.safetensors"))) > 2
    assert tensors(ours).keys() == shapes(golden, name).keys()
    assert digest(tensors(ours)) == str(golden[f"{name}/digest"])
    config = AutoConfig.from_pretrained(ours)
    assert config.architectures == json.loads(str(golden[f"{name}/config"]))["architectures"]
    assert config.num_labels == 1
    assert {key: getattr(config, key) for key in IDS} == IDS
    assert config.score_normalizer == {"mean": MEAN, "std": STD}
    scorer, params = load(ours, one_device_mesh)
    expected = (golden[f"{name}/exported_logits"] - MEAN) / STD
    np.testing.assert_allclose(scores(scorer, params), expected, rtol=0, atol=1e-4)


def test_each_device_holds_its_part(checkpoint, one_device_mesh):
    _, whole = load(checkpoint, one_device_mesh)
    _, sharded = load(checkpoint, tiny.mesh(fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(whole))
    assert sharded["trunk"]["layers"]["attention"]["q"].addressable_shards[0].data.shape == (3, 12, 2, 8)


def test_a_value_model_keeps_its_bias(checkpoint, tmp_path, one_device_mesh):
    """The bias is trained, and score.weight has no place for it."""
    scorer, params = load(checkpoint, one_device_mesh)
    params["score_head"]["bias"] = jnp.float32(0.75)
    save_scorer(tmp_path / "value", scorer.architecture, params, "value")
    assert tensors(tmp_path / "value").keys() == tensors(checkpoint).keys()
    read, loaded = load(tmp_path / "value", one_device_mesh)
    assert (read.role, read.pad_id, read.normalizer) == ("value", None, (-0.75, 1.0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), jax.device_get(params))


def test_a_normaliser_is_folded_back(checkpoint, tmp_path, one_device_mesh):
    scorer, params = load(checkpoint, one_device_mesh)
    raw = scores(scorer, params)
    params["score_head"]["bias"] = jnp.float32(0.5)
    save_scorer(tmp_path / "out", scorer.architecture, params, "reward", Normalizer(2.0, 4.0))
    np.testing.assert_allclose(
        scores(*load(tmp_path / "out", one_device_mesh)), (raw + 0.5 - 2.0) / 4.0, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deberta-v2"}, r"model_type is 'deberta-v2'; supported: 'gemma', "),
        ({"architectures": ["LlamaForCausalLM"]}, r"has no score head: arch.* is \['LlamaForCausalLM'\]"),
        ({"architectures": None}, "has no score head: architectures .* is None"),
        ({"id2label": {"0": "bad", "1": "good"}}, "config.json: the model has 2 labels"),
        ({"id2label": None, "num_labels": 5}, "has 5 labels"),
        ({"id2label": None}, "has 2 labels"),  # what transformers takes a missing number for
        ({"pad_token_id": "5"}, "pad_token_id is '5'; it must be a token's id or null"),
        ({"score_role": "judge"}, "score_role is 'judge'; it must be 'reward' or 'value'"),
        ({"score_normalizer": {"std": 0.0}}, "score_normalizer is {'std': 0.0}; it must be such as"),
        ({"score_normalizer": {"mean": "0"}}, "score_normalizer is {'mean': '0'}; it must"),
        ({"score_normalizer": {"shift": 1}}, "score_normalizer is {'shift': 1}; it must"),
        ({"score_normalizer": [1, 2]}, r"score_normalizer is \[1, 2\]; it must"),
    ],
)  # fmt: skip
def test_what_is_no_reward_model_is_refused(checkpoint, changes, message):
    change_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        read_scorer(checkpoint)


def test_a_head_of_another_shape_is_in_the_table(checkpoint):
    head = {"score.weight": np.zeros((2, 24), np.float32)}
    save_file(tensors(checkpoint) | head, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"score\.weight  \(1, 24\)   \(2, 24\)$"):
        check_scorer(checkpoint, read_scorer(checkpoint))


def test_a_pad_token_that_is_the_eos_is_refused(checkpoint, tmp_path, one_device_mesh):
    scorer, params = load(checkpoint, one_device_mesh)
    with pytest.raises(
        ValueError, match="pad_token_id and eos_token_id are both 7.*set another tokenizer.pad_token"
    ):
        save_scorer(
            tmp_path / "out",
            scorer.architecture,
            params,
            "reward",
            token_ids={"eos_token_id": 7, "pad_token_id": 7},
        )
    assert not (tmp_path / "out").exists()


def test_a_head_too_large_for_float16_is_refused(checkpoint, tmp_path, one_device_mesh):
    scorer, params = load(checkpoint, one_device_mesh)
    params["score_head"]["kernel"] *= 1e6
    with pytest.raises(ValueError, match=r"larger numbers: score_head/kernel \(up to "):
        save_scorer(tmp_path / "out", scorer.architecture, params, "reward", dtype="float16")
