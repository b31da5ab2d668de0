"""config.json: read as transformers reads it, written so that it does, refused where we do not compute it."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from rlhf_jax.models import hf
from rlhf_jax.models.families import from_hf, to_hf
from tests.random_llama import CONFIG

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_our_config(tied):
    architecture = from_hf(CONFIG | {"tie_word_embeddings": tied, "rms_norm_eps": 1e-5})
    theirs = LlamaConfig.from_dict(to_hf(architecture, token_ids={"eos_token_id": 7}))
    assert theirs.rope_parameters["rope_theta"] == 500.0
    assert theirs.rope_parameters["rope_type"] == "default"
    assert (theirs.head_dim, theirs.eos_token_id, theirs.bos_token_id) == (8, 7, None)
    assert theirs.tie_word_embeddings is tied
    assert from_hf(theirs.to_dict()) == architecture


def test_a_config_without_defaults_is_read_as_transformers_reads_it():
    config = {name: CONFIG[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config |= {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaConfig(**config)
    assert from_hf(config) == from_hf(theirs.to_dict())
    assert from_hf(config).head_dim == 6


def test_both_spellings_of_the_rotary_base_are_read():
    config = {k: v for k, v in CONFIG.items() if k != "rope_parameters"}
    assert from_hf(config | {"rope_theta": 500.0}) == from_hf(config | CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "bert"},
            "model_type is 'bert'; supported: 'gemma', 'gemma2', 'gemma3_text'",
        ),
        ({"model_type": "gemma3"}, "a model of images and text; .*whose model_type is 'gemma3_text'"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope_type 'linear' is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "factor of rope_type 'linear' is 0; it must",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic', which changes frequencies with",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            "low_freq_factor of .* missing; high_freq_fact",
        ),
        (
            {"rope_scaling": _LLAMA3 | {"low_freq_factor": 4, "high_freq_factor": 4}},
            r"high_freq_factor is 4\.0; it must be more than low_freq_factor, 4\.0",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"rotary_factor is 0\.5; supported: 1\.0",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "short_factor is None; it must be a list of numbers"),
        ({"attention_bias": "yes"}, "qkv_bias is 'yes'; it must be of type bool"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; supported: None"),
        (
            {"hidden_act": "relu", "head_dim": None},
            "hidden_act is 'relu'; supported: 'silu', 'swish'",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "is True; supported: False",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            r"attn_logit_softcapping is 50\.0; supported: None",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full"]},
            r"layer_types is \['full'\]; it must be",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
            "layer_types has 'sliding_attention', but there is no sliding_window",
        ),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
            "moe_intermediate_size is missing; mlp",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers is \[1\]; it must be a 0 or 1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"vocab_size": "48"}, "vocab_size is '48'; it must be of type int"),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message) as caught:
        hf.read_architecture(tmp_path)
    assert "config.json" in str(caught.value)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a Hugging Face model directory: it has no config\.json"):
        hf.read_architecture(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: Expecting"):
        hf.read_architecture(tmp_path)
