"""Every family against transformers: logits of tiny random models, whole, packed and decoded; exports."""

from __future__ import annotations

import json
import os
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from rlhf_jax.models import hf, kv_cache
from rlhf_jax.models.families import FAMILIES, from_hf, to_hf
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import place_rows
from tests import tiny
from tests.parity.make_family_golden import GOLDEN, LENGTH, VARIANTS, tokens
from tests.random_llama import random_tensors

SHAPES = json.loads((GOLDEN / "families.json").read_text())
PROMPT_LENGTHS = np.asarray([5, 11])
CUT = 10  # where the packed row's second sequence begins


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "families.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns a function of a variant: its architecture, and its parameters loaded from a directory."""

    @cache
    def load(name):
        directory = tmp_path_factory.mktemp(name)
        (directory / "config.json").write_text(json.dumps(VARIANTS[name]))
        save_file(random_tensors(SHAPES[name]), directory / "model.safetensors")
        return tiny.load_policy(directory, tiny.mesh())

    return load


@pytest.fixture(scope="module")
def computed(loaded):
    """Returns a function of a variant: logits whole, packed and decoded, of one compiled program."""

    @cache
    def compute(name):
        architecture, params = loaded(name)
        return jax.device_get(jax.jit(partial(_logits, make_model(architecture)))(params))

    return compute


def _logits(model, params):
    rows = jnp.asarray(tokens())
    whole = model.logits(params, model.hidden(params["trunk"], rows))
    packed = jnp.concatenate([rows[:1, :CUT], rows[1:, : LENGTH - CUT]], axis=1)
    segments = (jnp.arange(LENGTH) >= CUT).astype(jnp.int32)[None]
    positions = (jnp.arange(LENGTH) - CUT * segments).astype(jnp.int32)
    packed = model.logits(params, model.hidden(params["trunk"], packed, positions, segments))

    prompt_size = int(PROMPT_LENGTHS.max())
    num_steps = LENGTH - prompt_size
    lengths = jnp.asarray(PROMPT_LENGTHS)
    weights = kv_cache.unstack(params, model.architecture, "float32")
    # Behind the shorter prompt stands its completion: the cache must not see it there.
    first, prompts = kv_cache.prefill(weights, rows[:, :prompt_size], lengths)
    cache = kv_cache.with_room(prompts, num_steps)

    def step(cache, number):
        counts = jnp.full(2, number + 1)
        hidden, cache = kv_cache.decode_step(weights, cache, rows[jnp.arange(2), lengths + number], counts)
        return cache, kv_cache.decode_logits(weights, hidden)

    _, later = jax.lax.scan(step, cache, jnp.arange(num_steps))
    decoded = jnp.concatenate([kv_cache.decode_logits(weights, first)[None], later]).swapaxes(0, 1)
    return whole, packed, decoded


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name, computed, golden):
    assert_close(computed(name)[0], golden[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_sequences_in_one_row_have_the_logits_of_separate_rows(name, computed, golden):
    packed = computed(name)[1][0]
    assert_close(packed[:CUT], golden[name][0, :CUT])
    assert_close(packed[CUT:], golden[name][1, : LENGTH - CUT])


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_gives_the_logits_of_the_whole_rows(name, computed, golden):
    decoded = computed(name)[2]
    for row, length in enumerate(PROMPT_LENGTHS):
        expected = golden[name][row, length - 1 :]
        assert_close(decoded[row][: len(expected)], expected[: decoded.shape[1]])


@pytest.mark.parametrize("name", VARIANTS)
def test_an_export_has_the_tensors_and_the_config_of_the_original(name, loaded, tmp_path):
    """What transformers computes of the exports is told by make_family_golden reload."""
    kept = os.environ.get("RLHF_JAX_KEEP_EXPORTS")
    directory = (Path(kept) if kept else tmp_path) / name
    architecture, params = loaded(name)
    hf.save_policy(directory, architecture, params)
    stored, original = load_file(directory / "model.safetensors"), random_tensors(SHAPES[name])
    assert stored.keys() == original.keys()
    for tensor, values in stored.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, original[tensor], err_msg=tensor)

    assert hf.read_architecture(directory) == architecture
    ours, theirs = AutoConfig.from_pretrained(directory).to_dict(), their_config(name)
    for key in to_hf(architecture).keys() & theirs.keys() - not_compared(theirs):
        if key == "rope_parameters":
            assert_same_rope(ours[key], theirs[key])
        elif theirs[key] is not None:  # null is what follows from other keys, which we write out
            assert ours[key] == theirs[key], key


def not_compared(theirs):
    """Returns keys that are not of the model, or say nothing of this one."""
    keys = {"architectures", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    return keys | (set() if theirs.get("use_sliding_window") else {"max_window_layers"})


def assert_same_rope(ours, theirs):
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_same_rope(ours[key], value)
        elif key == "rope_type":
            assert ours.get("rope_type", ours.get("type")) == value
        elif not key.startswith("mscale"):  # these make the attention_factor, which we write out
            assert ours[key] == value, key


def their_config(name):
    options = dict(VARIANTS[name])
    return AutoConfig.for_model(options.pop("model_type"), **options).to_dict()


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_config_leaves_out_is_as_in_transformers(name):
    assert from_hf(VARIANTS[name]) == from_hf(their_config(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    sizes = {"vocab_size": 48, "num_hidden_layers": 7, "num_attention_heads": 32, "hidden_size": 256}
    sizes |= {"intermediate_size": 24, "moe_intermediate_size": 24}
    if family == "gpt2":
        sizes = {"vocab_size": 48, "n_layer": 7, "n_head": 32, "n_embd": 256}
    theirs = AutoConfig.for_model(family, **sizes).to_dict()
    assert from_hf({"model_type": family, **sizes}) == from_hf(theirs)


def test_every_family_has_a_variant():
    assert {variant["model_type"] for variant in VARIANTS.values()} == set(FAMILIES)


def test_a_checkpoint_without_lm_head_lacks_the_prefix_and_may_have_buffers(tmp_path, loaded):
    """As the first GPT-2s on the hub, which are base models with their masks."""
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["gpt2"]))
    tensors = {
        name.removeprefix("transformer."): values for name, values in random_tensors(SHAPES["gpt2"]).items()
    }
    masks = {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32)}
    save_file(tensors | masks, tmp_path / "model.safetensors")
    found = tiny.load_policy(tmp_path, tiny.mesh())
    assert found[0] == loaded("gpt2")[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], loaded("gpt2")[1])


# Training: the scan over layers, recomputation, meshes


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_gradients_through_the_scan_are_those_through_each_layer(name, remat, loaded):
    """Decoding's prefill is the same model unrolled over its layers, each of its own static kind."""
    architecture, params = loaded(name)
    model, rows = make_model(architecture, remat=remat, unroll=1), jnp.asarray(tokens())

    def scanned(params):
        return jnp.sum(jnp.sin(model.hidden(params["trunk"], rows)[:, -1]))

    def unrolled(params):
        weights = kv_cache.unstack(params, architecture, "float32")
        return jnp.sum(jnp.sin(kv_cache.prefill(weights, rows, jnp.asarray([LENGTH, LENGTH]))[0]))

    ours, plain = (jax.jit(jax.grad(function))(params) for function in (scanned, unrolled))
    for path, leaf in jax.tree.leaves_with_path(plain):
        difference = np.linalg.norm(leaf - _at(ours, path))
        assert difference <= 1e-5 * max(np.linalg.norm(leaf), 1e-3), path
        assert "lm_head" in str(path) or np.linalg.norm(leaf) > 0, path


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "mixtral", "phi3", "qwen3_moe"])
def test_eight_devices_compute_what_one_does(name, computed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS[name]))
    save_file(random_tensors(SHAPES[name]), tmp_path / "model.safetensors")
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    architecture, params = tiny.load_policy(tmp_path, mesh)
    if name == "qwen3_moe":  # 5 experts, which no device must share
        assert architecture.num_experts == 5
    model = make_model(architecture, unroll=1)
    rows = jnp.tile(jnp.asarray(tokens()), (2, 1))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(lambda params, rows: model.logits(params, model.hidden(params["trunk"], rows)))
        assert_close(run(params, place_rows(mesh, rows))[:2], computed(name)[0])
