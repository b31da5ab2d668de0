"""Adapters against PEFT: theirs here, ours there, what is refused."""

from __future__ import annotations

import json
import logging
import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import hf
from rlhf_jax.models.families import from_hf
from rlhf_jax.models.heads import values, zero_score_head
from rlhf_jax.models.lora import Lora, merge
from rlhf_jax.models.peft import check_adapter, read_adapter, write_adapter
from rlhf_jax.models.scorers import save_scorer
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import make_mesh
from tests import tiny
from tests.parity.make_adapter_golden import ADAPTERS, GOLDEN, draw, rows
from tests.random_llama import random_tensors

UNFUSED = ["llama", "llama_rslora", "llama_scorer", "qwen2"]
FUSED = ["gpt2_all", "gpt_neox", "phi3"]
IDS = {"pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def architecture(name):
    return from_hf(ADAPTERS[name][0])


def write_theirs(directory, golden, name):
    """Writes an adapter as PEFT does, and returns its directory."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(str(golden[f"{name}/adapter_config"]))
    save_file(adapter_tensors(golden, name), directory / "adapter_model.safetensors")
    return directory


def adapter_tensors(golden, name):
    return draw(json.loads(str(golden[f"{name}/adapter_shapes"])))


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
    """Returns a function of an adapter's name: the parameters of the model that it is for."""

    @cache
    def load(name):
        directory = tmp_path_factory.mktemp(name)
        (directory / "config.json").write_text(json.dumps(ADAPTERS[name][0]))
        tensors = random_tensors(json.loads(str(golden[f"{name}/shapes"])))
        score = tensors.pop("score.weight", None)
        if score is not None:
            tensors["lm_head.weight"] = np.zeros((48, tensors["model.norm.weight"].size), np.float32)
        save_file(tensors, directory / "model.safetensors")
        return tiny.load_policy(directory, tiny.mesh())[1]

    return load


def logits(name, params, score_head=None):
    """Returns logits of the rows, or the scores at their ends."""
    model = make_model(architecture(name))

    @jax.jit
    def compute(params, score_head):
        hidden = model.hidden(params["trunk"], jnp.asarray(rows()))
        return values(score_head, hidden)[:, -1:] if score_head else model.logits(params, hidden)

    return compute(params, score_head)


def merged(params, adapter):
    return params | {"trunk": merge(params["trunk"], adapter.params, adapter.lora)}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_with_an_adapter_of_peft_has_its_logits_here(name, golden, base, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", golden, name)
    adapter = read_adapter(theirs, architecture(name))
    assert check_adapter(theirs, architecture(name)) == (adapter.lora, name == "llama_scorer")
    assert (adapter.score_head is not None) == (name == "llama_scorer")
    ours = logits(name, merged(base(name), adapter), adapter.score_head)
    np.testing.assert_allclose(ours, golden[f"{name}/logits"], rtol=0, atol=1e-4)
    export(name, base(name), adapter, ours)


def export(name, params, adapter, ours):
    """Writes base, adapter and merged model, where they are kept for make_adapter_golden reload."""
    if not os.environ.get("RLHF_JAX_KEEP_EXPORTS"):
        return
    directory = Path(os.environ["RLHF_JAX_KEEP_EXPORTS"]) / name
    of, head = architecture(name.removesuffix("_own")), adapter.score_head
    for kind, each in {"base": params, "merged": merged(params, adapter)}.items():
        if head is None:
            hf.save_policy(directory / kind, of, each)
        else:  # a base has a head, but not this one
            own = head if kind == "merged" else zero_score_head(of.hidden_size)
            save_scorer(directory / kind, of, each | {"score_head": own}, "reward", token_ids=IDS)
    write_adapter(directory / "adapter", of, adapter.lora, adapter.params, "base", score_head=head)
    np.save(directory / "logits.npy", ours)


@pytest.mark.parametrize("name", UNFUSED)
def test_an_adapter_of_peft_is_written_as_it_was(name, golden, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", golden, name)
    lora, params, head = read_adapter(theirs, architecture(name))
    write_adapter(tmp_path / "ours", architecture(name), lora, params, "base", score_head=head)
    written, expected = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert written.keys() == expected.keys()
    for tensor, stored in expected.items():
        np.testing.assert_array_equal(written[tensor], stored, err_msg=tensor)

    ours, config = (
        json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs")
    )
    options = ADAPTERS[name][1]
    if isinstance(options["target_modules"], list):
        assert sorted(ours.pop("target_modules")) == sorted(config["target_modules"])
    else:  # a regular expression, or all-linear
        assert len(ours.pop("target_modules")) == 7
    if head is not None:
        assert ours.pop("modules_to_save") == ["score"] and "score" in config["modules_to_save"]
    assert ours.pop("inference_mode")
    assert ours == {key: config[key] for key in ours}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_is_read_as_it_was(name, golden, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", golden, name)
    adapter = read_adapter(theirs, architecture(name))
    write_adapter(tmp_path / "ours", architecture(name), adapter.lora, adapter.params, "base")
    assert_same(read_adapter(tmp_path / "ours", architecture(name)), adapter)
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    if name != "qwen2_patterns":  # whose ranks are padded to one
        shapes = {
            tensor: x.shape for tensor, x in adapter_tensors(golden, name).items() if ".lora_" in tensor
        }
        assert {tensor: x.shape for tensor, x in written.items()} == shapes


def assert_same(one, other):
    assert one.lora == other.lora
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    for path, leaf in jax.tree.leaves_with_path(other.params):
        found = dict(jax.tree.leaves_with_path(one.params))[path]
        np.testing.assert_array_equal(found, leaf, err_msg=str(path))


def own(adapter, targets=None, seed=0):
    """Returns an adapter as training makes it: every `a` is different."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), adapter.params)
    targets = targets or adapter.lora.targets
    layers = {
        group: {name: of for name, of in adapters.items() if name.removesuffix("_adapter") in targets}
        for group, adapters in params["layers"].items()
    }
    lora = Lora(adapter.lora.rank, adapter.lora.alpha, targets, adapter.lora.rslora)
    return adapter._replace(lora=lora, params={"layers": {group: of for group, of in layers.items() if of}})


@pytest.mark.parametrize("name", FUSED)
def test_adapters_that_share_a_tensor_keep_their_rank(name, golden, base, tmp_path):
    """Each has its own rows of A and columns of B there, and gets them back."""
    of = architecture(name)
    adapter = own(read_adapter(write_theirs(tmp_path / "theirs", golden, name), of))
    write_adapter(tmp_path / "ours", of, adapter.lora, adapter.params, "base")
    assert_same(read_adapter(tmp_path / "ours", of), adapter)

    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    rank = adapter.lora.rank
    assert config["r"] == rank and 3 * rank in config["rank_pattern"].values()
    scales = {
        config["alpha_pattern"][name] / (np.sqrt(r) if config["use_rslora"] else r)
        for name, r in config["rank_pattern"].items()
    }
    np.testing.assert_allclose(list(scales), adapter.lora.scale, rtol=1e-9)
    export(f"{name}_own", base(name), adapter, logits(name, merged(base(name), adapter)))


@pytest.mark.parametrize("targets", [("q",), ("q", "v"), ("q", "k", "v")])
def test_some_parameters_of_a_shared_tensor_may_be_adapted(targets, golden, tmp_path):
    of = architecture("gpt_neox")
    adapter = own(read_adapter(write_theirs(tmp_path / "theirs", golden, "gpt_neox"), of), targets)
    write_adapter(tmp_path / "ours", of, adapter.lora, adapter.params, "base")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query_key_value"]
    assert (config["r"], config["rank_pattern"]) == (len(targets) * adapter.lora.rank, {})
    assert_same(read_adapter(tmp_path / "ours", of), adapter)


def test_an_adapter_that_does_nothing_yet_keeps_its_a(golden, tmp_path):
    """PEFT begins with B = 0: a shared A is then nobody's own."""
    theirs = write_theirs(tmp_path / "theirs", golden, "phi3")
    path = theirs / "adapter_model.safetensors"
    tensors = {name: 0 * x if "lora_B" in name else x for name, x in load_file(path).items()}
    save_file(tensors, path)
    adapter = read_adapter(theirs, architecture("phi3"))
    assert adapter.lora.targets == ("q", "k", "v", "o", "gate", "up", "down")
    attention = adapter.params["layers"]["attention"]
    expected = tensors["base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight"].T
    for name in "qkv":
        np.testing.assert_array_equal(attention[f"{name}_adapter"]["a"][1], expected)


def test_ranks_are_padded_and_scales_folded(golden, tmp_path):
    adapter = read_adapter(write_theirs(tmp_path / "theirs", golden, "qwen2_patterns"), architecture("qwen2"))
    tensors = adapter_tensors(golden, "qwen2_patterns")
    assert (adapter.lora.rank, adapter.lora.targets) == (5, ("q", "v", "down"))
    assert adapter.lora.scale == pytest.approx(3 / 2)  # of q, in layer 1
    q, v = (adapter.params["layers"]["attention"][f"{name}_adapter"] for name in "qv")
    down = adapter.params["layers"]["mlp"]["down_adapter"]
    assert not any(np.any(factor[0]) for of in (q, v, down) for factor in of.values())  # layer 0 has none

    def stored(layer, module):
        return tensors[f"base_model.model.model.layers.{layer}.{module}.lora_B.weight"].T

    def flat(b):
        return np.asarray(b).reshape(len(b), -1)

    np.testing.assert_array_equal(flat(q["b"][1])[:2], stored(1, "self_attn.q_proj"))
    np.testing.assert_allclose(flat(q["b"][2])[:2], stored(2, "self_attn.q_proj") * 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(flat(v["b"][1]), stored(1, "self_attn.v_proj") * (3 / 5) / (3 / 2), rtol=1e-6)
    np.testing.assert_allclose(flat(down["b"][1])[:3], stored(1, "mlp.down_proj") * 2 / 3, rtol=1e-6)
    np.testing.assert_array_equal(flat(down["b"][2])[:2], stored(2, "mlp.down_proj"))
    assert not np.any(q["a"][:, :, 2:]) and not np.any(down["b"][2, 2:])


def test_a_divided_adapter_is_read_and_written_whole(golden, tmp_path):
    """Each device has its part of the rank; half precision is what bfloat16 can hold."""
    mesh = make_mesh(tiny.config.MeshConfig(data=1, fsdp=4), devices=jax.devices()[:4])
    theirs, of = write_theirs(tmp_path / "theirs", golden, "llama_rslora"), architecture("llama_rslora")
    whole = read_adapter(theirs, of)
    by_rank = {"a": (None, None, "fsdp"), "b": (None, "fsdp")}
    at = {
        name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for name, spec in by_rank.items()
    }
    shardings = {"layers": {"attention": {"q_adapter": at, "v_adapter": at}}}
    divided = read_adapter(theirs, of, shardings)
    assert_same(divided, whole)
    assert divided.params["layers"]["attention"]["q_adapter"]["a"].sharding == at["a"]
    write_adapter(tmp_path / "ours", of, divided.lora, divided.params, "base", dtype="bfloat16")
    again = read_adapter(tmp_path / "ours", of)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), whole.params)
    assert_same(again, whole._replace(params=rounded))


@pytest.fixture
def theirs(golden, tmp_path):
    return write_theirs(tmp_path / "theirs", golden, "llama_rslora")


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; it must be 'LORA'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; it must be 'none'"),
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save has embed_tokens;"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model"),
        ({"r": 0, "lora_alpha": "8"}, "r is 0; .*lora_alpha is '8'; it must be a positive number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern is .*positive numbers"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern is .*positive numbers"),
        ({"r": 8}, r"lora_A.weight +\(8, 16\) +\(4, 16\)"),
        ({"rank_pattern": {"v_proj": 2}}, r"v_proj.lora_B.weight +\(12, 2\) +\(12, 4\)"),
    ],
)
def test_what_is_not_plain_lora_is_refused(theirs, changes, message):
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        check_adapter(theirs, architecture("llama"))


def test_other_tensors_are_refused(theirs):
    of, prefix = architecture("llama"), "base_model.model.model.layers.0.self_attn.q_proj"
    change_tensors(theirs, lambda tensors: tensors.pop(f"{prefix}.lora_A.weight"))
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight +\(4, 16\) +-"):
        check_adapter(theirs, of)
    change_tensors(
        theirs, lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": np.ones(3)})
    )
    with pytest.raises(
        ValueError, match="holds base_model.model.lm_head.lora_A.weight; in the 2 layers of this"
    ):
        check_adapter(theirs, of)
    change_tensors(theirs, lambda tensors: tensors.clear())
    with pytest.raises(
        ValueError, match="holds no adapters; .*down_proj, gate_proj, k_proj, .*v_proj; score"
    ):
        check_adapter(theirs, of)
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; only safetensors"):
        check_adapter(theirs, of)
    with pytest.raises(ValueError, match="no adapter in PEFT's format: it has no adapter_config.json"):
        check_adapter(theirs.parent, of)


def test_experts_are_not_adapted_and_their_attention_is(theirs, tmp_path):
    """The rows of Mixtral's attention are those of a Llama's, and are written under the same names."""
    mixtral = from_hf(tiny_mixtral())
    lora, params, _ = read_adapter(theirs, mixtral)
    assert lora.targets == ("q", "v")
    write_adapter(tmp_path / "ours", mixtral, lora, params, "base")
    written, expected = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "ours", theirs))
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], expected[name]) for name in expected)
    change_tensors(
        theirs,
        lambda tensors: tensors.update(
            {"base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight": np.ones((4, 16))}
        ),
    )
    with pytest.raises(ValueError, match="can be adapted: k_proj, o_proj, q_proj, v_proj; score.weight"):
        check_adapter(theirs, mixtral)


def tiny_mixtral():
    llama = {key: value for key, value in ADAPTERS["llama"][0].items() if key != "model_type"}
    return llama | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_an_adapter_of_a_model_without_lm_head_is_read(theirs):
    whole = read_adapter(theirs, architecture("llama"))
    without = {
        k.replace("base_model.model.model.", "base_model.model."): v
        for k, v in load_file(theirs / "adapter_model.safetensors").items()
    }
    save_file(without, theirs / "adapter_model.safetensors")
    assert_same(read_adapter(theirs, architecture("llama")), whole)


def test_dropout_is_told(theirs, caplog):
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.1}))
    with caplog.at_level(logging.WARNING):
        read_adapter(theirs, architecture("llama"))
    assert "trained with lora_dropout 0.1; here is none" in caplog.text
