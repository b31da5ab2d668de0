"""Directories of policies, written and read back: every bit, every float type, each device its part."""

from __future__ import annotations

import json
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from rlhf_jax.config import MeshConfig
from rlhf_jax.models import hf, tensor_files
from rlhf_jax.models.families import from_hf
from rlhf_jax.models.transformer import make_model
from rlhf_jax.role_parts import role_shardings
from rlhf_jax.sharding import make_mesh
from tests import random_llama, tiny
from tests.random_llama import CONFIG, SHAPES, random_tensors


@pytest.fixture
def checkpoint(tmp_path):
    return random_llama.write(tmp_path / "random_llama")


def assert_trees_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_keeps_every_bit(tmp_path, one_device_mesh, tied):
    architecture = from_hf(CONFIG | {"tie_word_embeddings": tied})
    params = jax.jit(make_model(architecture).init_policy)(jax.random.key(0))
    hf.save_policy(tmp_path / "out", architecture, params)
    read, loaded = tiny.load_policy(tmp_path / "out", one_device_mesh)
    assert read == architecture
    assert_trees_equal(loaded, params)
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["config.json", "generation_config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in files}) == 1  # who may read the one may read the others


@pytest.mark.parametrize("stored", get_args(hf.Dtype))
def test_what_is_read_in_bfloat16_is_rounded_as_jax_rounds(tmp_path, one_device_mesh, stored):
    """Of float16 too, which has more digits and fewer exponents."""
    architecture, model = from_hf(CONFIG), make_model(from_hf(CONFIG))
    params = jax.jit(model.init_policy)(jax.random.key(0))
    hf.save_policy(tmp_path, architecture, params, stored)
    shardings = role_shardings(model, one_device_mesh, "policy")
    loaded = hf.load_policy(tmp_path, architecture, shardings, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}
    wide = hf.load_policy(tmp_path, architecture, shardings)
    assert_trees_equal(loaded, jax.tree.map(jnp.bfloat16, wide))


def test_transformers_generates_with_our_token_ids(tmp_path):
    """Its `generate` reads where to stop from generation_config.json."""
    architecture = from_hf(CONFIG)
    params = jax.jit(make_model(architecture).init_policy)(jax.random.key(0))
    ids = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 7}
    hf.save_policy(tmp_path / "out", architecture, params, token_ids=ids)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == ids
    theirs = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(theirs, name) for name in ids} == ids
    hf.save_policy(tmp_path / "out", architecture, params)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {}


def test_loading_and_saving_gives_the_same_tensors(checkpoint, tmp_path, one_device_mesh):
    architecture, params = tiny.load_policy(checkpoint, one_device_mesh)
    hf.save_policy(tmp_path / "again", architecture, params)
    assert_trees_equal(load_file(tmp_path / "again" / "model.safetensors"), random_tensors(SHAPES))


def test_bfloat16_is_read_and_written(test_data, tmp_path, one_device_mesh):
    source = test_data / "tinystories656k"
    architecture, params = tiny.load_policy(source, one_device_mesh)
    hf.save_policy(tmp_path / "out", architecture, params, dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_trees_equal(stored, load_file(source / "model.safetensors"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).endswith("bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_that_are_stored_in_bfloat16_are_written(checkpoint, tmp_path, one_device_mesh, dtype):
    architecture, params = tiny.load_policy(checkpoint, one_device_mesh)
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hf.save_policy(tmp_path, architecture, stored, dtype=dtype)
    _, found = tiny.load_policy(tmp_path, one_device_mesh)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.float32))


def test_each_device_holds_its_part_of_what_one_device_loads(checkpoint, one_device_mesh):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    architecture, sharded = tiny.load_policy(checkpoint, mesh)
    _, whole = tiny.load_policy(checkpoint, one_device_mesh)
    assert_trees_equal(sharded, whole)
    q = sharded["trunk"]["layers"]["attention"]["q"]
    assert q.shape == (3, 24, 4, 8)
    assert q.addressable_shards[0].data.shape == (3, 12, 2, 8)
    hf.save_policy(checkpoint, architecture, sharded)
    assert_trees_equal(load_file(checkpoint / "model.safetensors"), random_tensors(SHAPES))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_device_reads_no_more_than_its_part(tmp_path, monkeypatch, family):
    """GPT-NeoX has query, key and value of a head behind each other in one tensor."""
    architecture = from_hf(CONFIG | {"model_type": family, "hidden_size": 32})
    hf.save_policy(tmp_path / "out", architecture, make_model(architecture).init_policy(jax.random.key(0)))
    read = []
    part = tensor_files.StoredTensor.__getitem__

    def counting(tensor, index):
        values = part(tensor, index)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(tensor_files.StoredTensor, "__getitem__", counting)
    tiny.load_policy(tmp_path / "out", make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert sum(read) == sum(values.nbytes for values in stored)  # each part once, for all that hold it
    assert max(read) == 4 * 48 * 32 // 4  # a quarter of the embedding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_of_every_float_type_load(checkpoint, tmp_path, one_device_mesh, dtype):
    """By hand, with safetensors' own writer and reader; and ours writes the same."""
    stored = {name: values.astype(jnp.dtype(dtype)) for name, values in random_tensors(SHAPES).items()}
    save_file(stored, checkpoint / "model.safetensors")
    architecture, params = tiny.load_policy(checkpoint, one_device_mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    kernel = np.asarray(params["lm_head"]["kernel"])
    np.testing.assert_array_equal(kernel, stored["lm_head.weight"].T.astype(np.float32))
    hf.save_policy(tmp_path / "out", architecture, params, dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in written.values()} == {jnp.dtype(dtype)}
    assert_trees_equal(written, stored)
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).endswith(dtype)


def test_numbers_too_large_for_float16_are_not_written(checkpoint, tmp_path):
    architecture, params = tiny.load_policy(checkpoint, tiny.mesh(fsdp=2, tensor=2))
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[3, 5].set(-70000.0)
    params["trunk"]["final_norm"]["scale"] = params["trunk"]["final_norm"]["scale"].at[1].set(1e6)
    message = (
        r"float16 ends at 65504.*: lm_head/kernel \(up to 70000\), trunk/final_norm/scale \(up to 1e\+06\); "
        "write bfloat16 or float32"
    )
    with pytest.raises(ValueError, match=message):
        hf.save_policy(tmp_path / "out", architecture, params, dtype="float16")
    assert not (tmp_path / "out").exists()
    hf.save_policy(tmp_path / "out", architecture, params, dtype="bfloat16")
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert head[5, 3] == ml_dtypes.bfloat16(-70000.0)


def test_a_part_is_copied_in_blocks_of_the_file(checkpoint, one_device_mesh, monkeypatch):
    _, whole = tiny.load_policy(checkpoint, one_device_mesh)
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 200)  # two rows of 24 numbers
    releases = []
    plain = tensor_files.StoredTensor.release
    monkeypatch.setattr(
        tensor_files.StoredTensor, "release", lambda self: (releases.append(self.shape), plain(self))
    )
    assert_trees_equal(tiny.load_policy(checkpoint, one_device_mesh)[1], whole)
    assert releases.count((48, 24)) == 2 * 48 / 2  # embedding and head
    assert releases.count((40, 24)) == 2 * 3 * 40 / 2  # gate and up of three layers


def test_parameters_of_another_architecture_are_not_written(checkpoint, tmp_path, one_device_mesh):
    architecture, params = tiny.load_policy(checkpoint, one_device_mesh)
    del params["lm_head"]
    with pytest.raises(ValueError, match=r"lm_head/kernel  \(24, 48\)  -"):
        hf.save_policy(tmp_path / "out", architecture, params)
    assert not (tmp_path / "out").exists()


# In several files


def test_a_checkpoint_in_several_files_loads(checkpoint, one_device_mesh):
    _, whole = tiny.load_policy(checkpoint, one_device_mesh)
    random_llama.split(checkpoint)
    assert_trees_equal(tiny.load_policy(checkpoint, one_device_mesh)[1], whole)


def test_a_large_checkpoint_is_written_in_several_files(checkpoint, tmp_path, one_device_mesh):
    architecture, params = tiny.load_policy(checkpoint, one_device_mesh)
    limit = 3 * 4 * 48 * 24  # three of the largest tensors
    hf.save_policy(tmp_path / "out", architecture, params, shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    tensors = {name: load_file(tmp_path / "out" / name) for name in files}
    sizes = [sum(values.nbytes for values in of.values()) for of in tensors.values()]
    assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
    assert all(
        set(of) == {t for t, n in index["weight_map"].items() if n == name} for name, of in tensors.items()
    )
    together = {name: values for of in tensors.values() for name, values in of.items()}
    assert_trees_equal(together, random_tensors(SHAPES))
    assert_trees_equal(tiny.load_policy(tmp_path / "out", one_device_mesh)[1], params)

    hf.save_policy(tmp_path / "out", architecture, params)
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    hf.save_policy(tmp_path / "out", architecture, params, shard_bytes=1)
    assert len(list((tmp_path / "out").glob("model-*"))) == len(SHAPES)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_one_tensor_at_a_time_is_gathered(checkpoint, tmp_path, one_device_mesh, monkeypatch):
    architecture, params = tiny.load_policy(checkpoint, one_device_mesh)
    gathered = []
    plain = hf.gather
    monkeypatch.setattr(hf, "gather", lambda leaf: (gathered.append(leaf.size), plain(leaf))[1])
    hf.save_policy(tmp_path / "out", architecture, params)
    assert sorted(gathered) == sorted(np.prod(shape) for shape in SHAPES.values())
