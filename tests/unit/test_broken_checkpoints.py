"""Directories of policies in which something is not as it should be: indices, links, tensors, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import tensor_files
from tests import random_llama, tiny
from tests.random_llama import CONFIG, SHAPES, random_tensors


@pytest.fixture
def checkpoint(tmp_path):
    return random_llama.write(tmp_path / "random_llama")


def assert_trees_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# An index, and links


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "..", "sub/a.safetensors"])
def test_an_index_may_not_leave_its_directory(checkpoint, one_device_mesh, name):
    index, weight_map = random_llama.split(checkpoint)
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="names files outside its directory"):
        tiny.load_policy(checkpoint, one_device_mesh)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_link_may_not_leave_the_directory_but_into_the_hub_s_cache(
    checkpoint, tmp_path, one_device_mesh, is_split
):
    """MODEL/snapshots/REVISION is made of links to MODEL/blobs."""
    _, whole = tiny.load_policy(checkpoint, one_device_mesh)
    name, message = "model.safetensors", "model.safetensors is a link to a file outside its directory"
    if is_split:
        random_llama.split(checkpoint)
        name, message = "a.safetensors", r"names files outside its directory: \['a.safetensors'\]"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs, elsewhere = snapshot.parent.parent / "blobs", tmp_path / "elsewhere"
    for directory in (snapshot, blobs, elsewhere):
        directory.mkdir(parents=True)
    for path in checkpoint.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"blob-{path.name}"))
    assert_trees_equal(tiny.load_policy(snapshot, one_device_mesh)[1], whole)
    (blobs / f"blob-{name}").rename(elsewhere / name)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(elsewhere / name)
    with pytest.raises(ValueError, match=message):
        tiny.load_policy(snapshot, one_device_mesh)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*index.json"),
        ("[]", "does not hold a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"model.norm.weight": 1}}', "has no weight_map"),
        ('{"weight_map": {"x": "a.safetensors"}}', r"that their files do not have: x \(a\.safetensors\)"),
        ('{"weight_map": {"x": "c.safetensors"}}', r"cannot read .*c\.safetensors"),
    ],
)
def test_a_broken_index_is_refused(checkpoint, one_device_mesh, content, message):
    index, _ = random_llama.split(checkpoint)
    index.write_text(content)
    with pytest.raises(ValueError, match=message):
        tiny.load_policy(checkpoint, one_device_mesh)


def test_tensors_that_no_index_names_are_not_expected(checkpoint, one_device_mesh):
    random_llama.split(checkpoint)
    surplus = load_file(checkpoint / "a.safetensors") | {"adapter.weight": np.zeros(3, np.float32)}
    save_file(surplus, checkpoint / "a.safetensors")
    with pytest.raises(ValueError, match=r"adapter\.weight  -         \(3,\)$"):
        tiny.load_policy(checkpoint, one_device_mesh)


def test_one_file_is_read_in_place_of_an_index_beside_it(checkpoint, one_device_mesh):
    """As transformers does."""
    _, whole = tiny.load_policy(checkpoint, one_device_mesh)
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"x": "old.safetensors"}}')
    assert_trees_equal(tiny.load_policy(checkpoint, one_device_mesh)[1], whole)


# Tensors that are not as they should be


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_wrong_tensors_are_one_table(checkpoint, one_device_mesh):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.norm.bias"] = np.zeros(24, np.float32)
        tensors["lm_head.weight"] = np.zeros((50, 24), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 24), np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # old, and harmless

    change_tensors(checkpoint, change)
    with pytest.raises(ValueError) as caught:
        tiny.load_policy(checkpoint, one_device_mesh)
    title, *table = str(caught.value).splitlines()
    assert title == f"the tensors in {checkpoint} are not those of its config.json:"
    assert [line.split(maxsplit=1) for line in table] == [
        ["tensor", "expected            found"],
        ["lm_head.weight", "(48, 24)            (50, 24)"],
        ["model.layers.1.mlp.up_proj.weight", "F32 or BF16 or F16  I8"],
        ["model.norm.bias", "-                   (24,)"],
        ["model.norm.weight", "(24,)               -"],
    ]


@pytest.mark.parametrize("stored", [["model.embed_tokens.weight"], ["lm_head.weight"], "both"])
def test_a_tied_checkpoint_may_store_either_matrix(checkpoint, one_device_mesh, stored):
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    config = CONFIG | {"tie_word_embeddings": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    matrix = random_tensors(SHAPES)["lm_head.weight"]

    def change(tensors):
        for name in names:
            del tensors[name]
        tensors |= dict.fromkeys(names if stored == "both" else stored, matrix)

    change_tensors(checkpoint, change)
    _, params = tiny.load_policy(checkpoint, one_device_mesh)
    assert "lm_head" not in params
    np.testing.assert_array_equal(params["trunk"]["embed"]["embedding"], matrix)


def test_a_tied_checkpoint_with_two_matrices_is_refused(checkpoint, one_device_mesh, monkeypatch):
    """They are compared to the last number, a block of each on the host at a time."""
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    change_tensors(checkpoint, change)
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 4 * 100)
    released = []
    monkeypatch.setattr(tensor_files.StoredTensor, "release", lambda tensor: released.append(tensor.shape))
    with pytest.raises(ValueError, match=r"says tie_word_embeddings, but .* differ"):
        tiny.load_policy(checkpoint, one_device_mesh)
    assert released == 2 * [(48, 24)] * 12  # 1152 numbers


def test_an_untied_checkpoint_needs_both_matrices(checkpoint, one_device_mesh):
    change_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight  \(48, 24\)  -"):
        tiny.load_policy(checkpoint, one_device_mesh)


# Files that are not as they should be


@pytest.mark.parametrize("keep", [4, 200, -100])
def test_a_cut_file_is_named(checkpoint, one_device_mesh, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors: .*is it complete"):
        tiny.load_policy(checkpoint, one_device_mesh)


def test_a_header_that_is_noise_is_refused(checkpoint, one_device_mesh):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[7] = 255  # the header's length becomes astronomic
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        tiny.load_policy(checkpoint, one_device_mesh)


def test_pickled_weights_are_refused_with_the_way_to_convert(checkpoint, one_device_mesh):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin.*from_pretrained\(.*save_pretrained\("):
        tiny.load_policy(checkpoint, one_device_mesh)


def test_a_directory_without_weights_is_refused(checkpoint, one_device_mesh):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        tiny.load_policy(checkpoint, one_device_mesh)
