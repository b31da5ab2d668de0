"""Against transformers: logits of a random and of a trained Llama, and directories it can read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, GenerationConfig, LlamaConfig

from rlhf_jax.config import MeshConfig
from rlhf_jax.models import hf, kv_cache, tensor_files
from rlhf_jax.models.families import from_hf, to_hf
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import make_mesh, param_shardings
from tests.parity.make_llama_golden import RANDOM, random_tensors

GOLDEN = Path(__file__).parent / "golden" / "llama.npz"
LAYER = {
    "input_layernorm.weight": (24,),
    "post_attention_layernorm.weight": (24,),
    "self_attn.q_proj.weight": (32, 24),
    "self_attn.k_proj.weight": (16, 24),
    "self_attn.v_proj.weight": (16, 24),
    "self_attn.o_proj.weight": (24, 32),
    "mlp.gate_proj.weight": (40, 24),
    "mlp.up_proj.weight": (40, 24),
    "mlp.down_proj.weight": (24, 40),
}
SHAPES = {
    "model.embed_tokens.weight": (48, 24),
    "model.norm.weight": (24,),
    "lm_head.weight": (48, 24),
} | {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in LAYER.items()}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture
def checkpoint(tmp_path):
    """Returns the directory of the random Llama, of which tests may change files."""
    directory = tmp_path / "random_llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(RANDOM | {"model_type": "llama"}))
    save_file(random_tensors(SHAPES), directory / "model.safetensors")
    return directory


def shardings(architecture, mesh):
    model = make_model(architecture)
    return param_shardings(mesh, model.policy_axes, model.policy_shapes)


def load(directory, mesh):
    architecture = hf.read_architecture(directory)
    return architecture, hf.load_policy(directory, architecture, shardings(architecture, mesh))


def logits(architecture, params, tokens):
    model = make_model(architecture)
    return jax.jit(lambda params, tokens: model.logits(params, model.hidden(params["trunk"], tokens)))(
        params, jnp.asarray(tokens)
    )


def assert_trees_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# Logits


def test_random_llama_has_the_logits_of_transformers(checkpoint, golden, one_device_mesh):
    architecture, params = load(checkpoint, one_device_mesh)
    ours = logits(architecture, params, golden["tokens"])
    np.testing.assert_allclose(ours, golden["logits"], rtol=0, atol=1e-5)


def test_trained_llama_has_the_logits_of_transformers(test_data, golden, one_device_mesh):
    architecture, params = load(test_data / "tinystories656k", one_device_mesh)
    ours = np.asarray(logits(architecture, params, golden["story_tokens"]))[0]
    np.testing.assert_allclose(ours[:, golden["story_columns"]], golden["story_logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(-1), golden["story_argmax"])


def test_trained_llama_decodes_the_logits_of_transformers(test_data, golden, one_device_mesh):
    architecture, params = load(test_data / "tinystories656k", one_device_mesh)
    story, columns = golden["story_tokens"][0], golden["story_columns"]
    weights = kv_cache.unstack(params, architecture, "float32")
    prompt = jnp.asarray(story[None, :6])
    step, logits_of = jax.jit(kv_cache.decode_step), jax.jit(kv_cache.decode_logits)
    prefill = jax.jit(kv_cache.prefill, static_argnums=3)
    hidden, cache = prefill(weights, prompt, jnp.asarray([6]), len(story) - 6)
    for number, token in enumerate(story[6:]):
        got = logits_of(weights, hidden)[0, columns]
        np.testing.assert_allclose(got, golden["story_logits"][5 + number], rtol=0, atol=1e-4)
        hidden, cache = step(weights, cache, jnp.asarray([token]), jnp.int32(number))


# config.json


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_our_config(tied):
    architecture = from_hf(
        RANDOM | {"model_type": "llama", "tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    )
    theirs = LlamaConfig.from_dict(to_hf(architecture, token_ids={"eos_token_id": 7}))
    assert theirs.rope_parameters["rope_theta"] == 500.0
    assert theirs.rope_parameters["rope_type"] == "default"
    assert (theirs.head_dim, theirs.eos_token_id, theirs.bos_token_id) == (8, 7, None)
    assert theirs.tie_word_embeddings is tied
    assert from_hf(theirs.to_dict()) == architecture


def test_a_config_without_defaults_is_read_as_transformers_reads_it():
    config = {name: RANDOM[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config |= {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaConfig(**config)
    assert from_hf(config) == from_hf(theirs.to_dict())
    assert from_hf(config).head_dim == 6


def test_both_spellings_of_the_rotary_base_are_read():
    config = {"model_type": "llama"} | {k: v for k, v in RANDOM.items() if k != "rope_parameters"}
    assert from_hf(config | {"rope_theta": 500.0}) == from_hf(config | RANDOM)


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
def test_what_we_do_not_compute_is_refused(checkpoint, change, message):
    (checkpoint / "config.json").write_text(json.dumps(RANDOM | {"model_type": "llama"} | change))
    with pytest.raises(ValueError, match=message) as caught:
        hf.read_architecture(checkpoint)
    assert "config.json" in str(caught.value)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a Hugging Face model directory: it has no config\.json"):
        hf.read_architecture(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: Expecting"):
        hf.read_architecture(tmp_path)


# Writing and reading back


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_keeps_every_bit(tmp_path, one_device_mesh, tied):
    architecture = from_hf(RANDOM | {"model_type": "llama", "tie_word_embeddings": tied})
    params = jax.jit(make_model(architecture).init_policy)(jax.random.key(0))
    hf.save_policy(tmp_path / "out", architecture, params)
    read, loaded = load(tmp_path / "out", one_device_mesh)
    assert read == architecture
    assert_trees_equal(loaded, params)
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["config.json", "generation_config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in files}) == 1  # who may read the one may read the others


def test_transformers_generates_with_our_token_ids(tmp_path):
    """Its `generate` reads where to stop from generation_config.json."""
    architecture = from_hf(RANDOM | {"model_type": "llama"})
    params = jax.jit(make_model(architecture).init_policy)(jax.random.key(0))
    ids = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 7}
    hf.save_policy(tmp_path / "out", architecture, params, token_ids=ids)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == ids
    theirs = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(theirs, name) for name in ids} == ids
    hf.save_policy(tmp_path / "out", architecture, params)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {}


def test_loading_and_saving_gives_the_same_tensors(checkpoint, tmp_path, one_device_mesh):
    architecture, params = load(checkpoint, one_device_mesh)
    hf.save_policy(tmp_path / "again", architecture, params)
    assert_trees_equal(load_file(tmp_path / "again" / "model.safetensors"), random_tensors(SHAPES))


def test_bfloat16_is_read_and_written(test_data, tmp_path, one_device_mesh):
    source = test_data / "tinystories656k"
    architecture, params = load(source, one_device_mesh)
    hf.save_policy(tmp_path / "out", architecture, params, dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_trees_equal(stored, load_file(source / "model.safetensors"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).endswith("bfloat16")


def test_each_device_holds_its_part_of_what_one_device_loads(checkpoint, one_device_mesh):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    architecture, sharded = load(checkpoint, mesh)
    _, whole = load(checkpoint, one_device_mesh)
    assert_trees_equal(sharded, whole)
    q = sharded["trunk"]["layers"]["attention"]["q"]
    assert q.shape == (3, 24, 4, 8)
    assert q.addressable_shards[0].data.shape == (3, 12, 2, 8)
    hf.save_policy(checkpoint, architecture, sharded)
    assert_trees_equal(load_file(checkpoint / "model.safetensors"), random_tensors(SHAPES))


def test_a_device_reads_no_more_than_its_part(checkpoint, monkeypatch):
    read = []
    copy = tensor_files.copy_in_blocks

    def counting(out, values, release):
        read.append(values.size)
        copy(out, values, release)

    monkeypatch.setattr(tensor_files, "copy_in_blocks", counting)
    load(checkpoint, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert sum(read) == sum(
        np.prod(shape) for shape in SHAPES.values()
    )  # each part once, for all that hold it
    assert max(read) == 48 * 24 // 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_of_every_float_type_load(checkpoint, tmp_path, one_device_mesh, dtype):
    """By hand, with safetensors' own writer and reader; and ours writes the same."""
    stored = {name: values.astype(jnp.dtype(dtype)) for name, values in random_tensors(SHAPES).items()}
    save_file(stored, checkpoint / "model.safetensors")
    architecture, params = load(checkpoint, one_device_mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    kernel = np.asarray(params["lm_head"]["kernel"])
    np.testing.assert_array_equal(kernel, stored["lm_head.weight"].T.astype(np.float32))
    hf.save_policy(tmp_path / "out", architecture, params, dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in written.values()} == {jnp.dtype(dtype)}
    assert_trees_equal(written, stored)
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype).endswith(dtype)


def test_a_part_is_copied_in_blocks_of_the_file(checkpoint, one_device_mesh, monkeypatch):
    _, whole = load(checkpoint, one_device_mesh)
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 200)  # two rows of 24 numbers
    releases = []
    plain = tensor_files.StoredTensor.release
    monkeypatch.setattr(
        tensor_files.StoredTensor, "release", lambda self: (releases.append(self.shape), plain(self))
    )
    assert_trees_equal(load(checkpoint, one_device_mesh)[1], whole)
    assert releases.count((48, 24)) == 2 * 48 / 2  # embedding and head
    assert releases.count((40, 24)) == 2 * 3 * 40 / 2  # gate and up of three layers


# Checkpoints in several files


def split(directory, names=("a.safetensors", "b.safetensors")):
    """Cuts the checkpoint's file in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t, of in weight_map.items() if of == name}, directory / name)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, weight_map


def test_a_checkpoint_in_several_files_loads(checkpoint, one_device_mesh):
    _, whole = load(checkpoint, one_device_mesh)
    split(checkpoint)
    assert_trees_equal(load(checkpoint, one_device_mesh)[1], whole)


def test_a_large_checkpoint_is_written_in_several_files(checkpoint, tmp_path, one_device_mesh):
    architecture, params = load(checkpoint, one_device_mesh)
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
    assert_trees_equal(load(tmp_path / "out", one_device_mesh)[1], params)

    hf.save_policy(
        tmp_path / "out", architecture, params
    )  # transformers would read the one file, we the index
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    hf.save_policy(tmp_path / "out", architecture, params, shard_bytes=1)
    assert len(list((tmp_path / "out").glob("model-*"))) == len(SHAPES)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_one_tensor_at_a_time_is_gathered(checkpoint, tmp_path, one_device_mesh, monkeypatch):
    architecture, params = load(checkpoint, one_device_mesh)
    gathered = []
    plain = hf.gather
    monkeypatch.setattr(hf, "gather", lambda leaf: (gathered.append(leaf.size), plain(leaf))[1])
    hf.save_policy(tmp_path / "out", architecture, params)
    assert sorted(gathered) == sorted(np.prod(shape) for shape in SHAPES.values())


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "..", "sub/a.safetensors"])
def test_an_index_may_not_leave_its_directory(checkpoint, one_device_mesh, name):
    index, weight_map = split(checkpoint)
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="names files outside its directory"):
        load(checkpoint, one_device_mesh)


def test_a_link_may_not_leave_the_directory_but_into_the_hub_s_cache(checkpoint, tmp_path, one_device_mesh):
    """MODEL/snapshots/REVISION is made of links to MODEL/blobs."""
    _, whole = load(checkpoint, one_device_mesh)
    split(checkpoint)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs, elsewhere = snapshot.parent.parent / "blobs", tmp_path / "elsewhere"
    for directory in (snapshot, blobs, elsewhere):
        directory.mkdir(parents=True)
    for path in checkpoint.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"blob-{path.name}"))
    assert_trees_equal(load(snapshot, one_device_mesh)[1], whole)
    (blobs / "blob-a.safetensors").rename(elsewhere / "a.safetensors")
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to(elsewhere / "a.safetensors")
    with pytest.raises(ValueError, match=r"names files outside its directory: \['a.safetensors'\]"):
        load(snapshot, one_device_mesh)


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
    index, _ = split(checkpoint)
    index.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(checkpoint, one_device_mesh)


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
        load(checkpoint, one_device_mesh)
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
def test_a_tied_checkpoint_may_store_either_matrix(checkpoint, golden, one_device_mesh, stored):
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    config = RANDOM | {"model_type": "llama", "tie_word_embeddings": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    matrix = random_tensors(SHAPES)["lm_head.weight"]

    def change(tensors):
        for name in names:
            del tensors[name]
        tensors |= dict.fromkeys(names if stored == "both" else stored, matrix)

    change_tensors(checkpoint, change)
    _, params = load(checkpoint, one_device_mesh)
    assert "lm_head" not in params
    np.testing.assert_array_equal(params["trunk"]["embed"]["embedding"], matrix)


def test_a_tied_checkpoint_with_two_matrices_is_refused(checkpoint, one_device_mesh):
    config = RANDOM | {"model_type": "llama", "tie_word_embeddings": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says tie_word_embeddings, but .* differ"):
        load(checkpoint, one_device_mesh)


def test_an_untied_checkpoint_needs_both_matrices(checkpoint, one_device_mesh):
    change_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight  \(48, 24\)  -"):
        load(checkpoint, one_device_mesh)


# Files that are not as they should be


@pytest.mark.parametrize("keep", [4, 200, -100])
def test_a_cut_file_is_named(checkpoint, one_device_mesh, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors: .*is it complete"):
        load(checkpoint, one_device_mesh)


def test_a_header_that_is_noise_is_refused(checkpoint, one_device_mesh):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[7] = 255  # the header's length becomes astronomic
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        load(checkpoint, one_device_mesh)


def test_pickled_weights_are_refused_with_the_way_to_convert(checkpoint, one_device_mesh):
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin.*from_pretrained\(.*save_pretrained\("):
        load(checkpoint, one_device_mesh)


def test_a_directory_without_weights_is_refused(checkpoint, one_device_mesh):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        load(checkpoint, one_device_mesh)


def test_parameters_of_another_architecture_are_not_written(checkpoint, tmp_path, one_device_mesh):
    architecture, params = load(checkpoint, one_device_mesh)
    del params["lm_head"]
    with pytest.raises(ValueError, match=r"lm_head/kernel  \(24, 48\)  -"):
        hf.save_policy(tmp_path / "out", architecture, params)
    assert not (tmp_path / "out").exists()
