"""The mesh, the table of logical axes, and what does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.axes import LOGICAL_AXES, MESH_AXES
from rlhf_jax.config import MeshConfig
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import (
    axis_rules,
    batch_sharding,
    check_batch,
    constrain,
    decode_shardings,
    make_mesh,
    param_shardings,
    partition_spec,
    replicated,
    traced_on,
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_size": 24,
    "context_length": 32,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_one_size_may_be_what_is_left():
    shape = make_mesh(MeshConfig(data=-1, fsdp=2)).shape
    assert tuple(shape.items()) == (
        ("slice", 1),
        ("data", 4),
        ("fsdp", 2),
        ("expert", 1),
        ("sequence", 1),
        ("tensor", 1),
    )
    assert make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": -1}, "data=3, mesh.fsdp=-1 .*number of devices, 8"),
        ({"data": 2, "fsdp": 2}, "mesh.data=2, mesh.fsdp=2 does not fit the number of devices, 8"),
        ({"data": -1, "fsdp": -1}, "one alone may be -1"),
        ({"data": 0}, "mesh.data=0: .*at least 1"),
        ({"data": -1, "tensor": -2}, "mesh.tensor=-2: each size must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


def described(topology, number=1):
    """Returns the devices of so many slices, as the TPU compiler describes them."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    options = {"num_slices": number} if number > 1 else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


@pytest.fixture(scope="module")
def two_slices():
    """The devices of two slices of four TPUs."""
    return described("v5e:2x2", 2)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"fsdp": 4}, {"data": -1, "sequence": 4}])
def test_slices_are_the_outermost_axis_and_nothing_else_leaves_one(two_slices, sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, "slice": 2} | sizes), two_slices)
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape[0] == 2
    for place, devices in enumerate(mesh.devices):
        assert {device.slice_index for device in devices.flat} == {place}


@pytest.mark.parametrize("sizes", [{"data": 8}, {"slice": 4, "data": 2}])
def test_a_mesh_says_on_how_many_slices_it_is(two_slices, sizes):
    with pytest.raises(ValueError, match="8 devices are in 2 slices; set mesh.slice to 2"):
        make_mesh(MeshConfig(**sizes), two_slices)


def test_a_slice_is_one(two_slices):
    one = [device for device in two_slices if device.slice_index == 1]
    assert make_mesh(MeshConfig(fsdp=4), one).shape["fsdp"] == 4
    with pytest.raises(ValueError, match="mesh.slice is 2, but the 4 devices are in 1 slice; set"):
        make_mesh(MeshConfig(slice=2, data=2), one)


def test_an_axis_takes_a_part_of_a_dimension_of_the_torus():
    """8 of 4x4x4 chips, and 4 of a row of 8: neither is a product of whole dimensions."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=8), described("v5p:4x4x4"))
    assert (mesh.shape["fsdp"], mesh.shape["tensor"]) == (8, 8)
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=16, tensor=4), described("v5e:8x8", 2))
    for place, devices in enumerate(mesh.devices):
        assert {device.slice_index for device in devices.flat} == {place}
    for group in mesh.devices.reshape(-1, 4):  # tensor is the innermost axis: near each other
        across, up = (sorted(device.coords[axis] for device in group) for axis in (0, 1))
        assert (across[-1] - across[0] + 1) * (up[-1] - up[0] + 1) == 4


def test_on_a_cpu_slices_are_an_axis_like_others():
    assert make_mesh(MeshConfig(slice=2)).shape["data"] == 4


def test_logical_axes_become_mesh_axes():
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert partition_spec(("batch", "length")) == PartitionSpec(
        ("slice", "data", "fsdp", "expert"), "sequence"
    )


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^axes \(heads, mlp\) on P\('tensor', 'tensor'\): 'heads' and 'mlp' are both on mesh.tensor",
    ):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="both on mesh.fsdp"):
        partition_spec(("batch", "embed"))


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(ValueError, match="'hedas' is no logical axis; did you mean 'heads'?"):
        partition_spec(("embed", "hedas"))


def test_parameters_lie_as_their_axes_say(mesh):
    model = make_model(Architecture(**SIZES))
    shardings = param_shardings(mesh, model.policy_axes, model.policy_shapes)
    assert shardings["trunk"]["layers"]["attention"]["o"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert shardings["lm_head"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings["trunk"]["final_norm"]["scale"].is_fully_replicated
    for_decoding = decode_shardings(mesh, model.policy_axes, model.policy_shapes)
    assert for_decoding["lm_head"]["kernel"].spec == PartitionSpec(None, "tensor")


def test_all_parameters_that_do_not_fit_are_named(mesh):
    model = make_model(Architecture(**SIZES | {"num_heads": 3, "num_kv_heads": 3, "vocab_size": 31}))
    with pytest.raises(ValueError, match="does not fit the mesh") as caught:
        param_shardings(mesh, model.policy_axes, model.policy_shapes)
    title, *lines, remedy = str(caught.value).splitlines()
    whole = "{heads: none, kv_heads: none, vocab: none}"
    assert remedy.strip() == f"what does not divide can be whole on every device: mesh.axes: {whole}"
    with axis_rules({"heads": "none", "kv_heads": "none", "vocab": "none"}):
        param_shardings(mesh, model.policy_axes, model.policy_shapes)
    assert title == "the model does not fit the mesh (data=2, fsdp=2, tensor=2):"
    assert sorted(line.split()[0] for line in lines) == [
        "lm_head/kernel",
        "trunk/embed/embedding",
        *(f"trunk/layers/attention/{name}" for name in "koqv"),
    ]
    (q,) = (line.strip() for line in lines if "attention/q" in line)
    assert q == (
        "trunk/layers/attention/q (2, 16, 3, 4), axes (layers, embed, heads, head_dim) "
        "on P(None, 'fsdp', 'tensor', None): "
        "'heads' of size 3 is not a multiple of 2, the size of mesh.tensor=2"
    )


def test_rules_put_dimensions_elsewhere(mesh):
    """The parameters, what is traced within a program, and rows follow; nothing is left of the rules."""
    model = make_model(Architecture(**SIZES))
    rules = {"mlp": "none", "embed": ["fsdp", "sequence"], "batch": ["data", "tensor"]}
    rules |= {"heads": "none", "kv_heads": "none"}
    with axis_rules(rules):
        shardings = param_shardings(mesh, model.policy_axes, model.policy_shapes)
        for_decoding = decode_shardings(mesh, model.policy_axes, model.policy_shapes)
        assert batch_sharding(mesh).spec == PartitionSpec(("data", "tensor"))
        program = jax.jit(traced_on(mesh, lambda x: constrain(x, ("batch", "width"))))
    assert shardings["trunk"]["layers"]["mlp"]["up"].spec == PartitionSpec(None, ("fsdp", "sequence"), None)
    assert for_decoding["trunk"]["layers"]["mlp"]["up"].is_fully_replicated
    held = program(jax.device_put(jnp.zeros((8, 4)), replicated(mesh))).sharding
    assert held.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "tensor"))), 2)
    assert batch_sharding(mesh).spec == PartitionSpec(("slice", "data", "fsdp", "expert"))


def test_rules_under_which_two_dimensions_fall_on_one_axis_name_every_parameter(mesh):
    model = make_model(Architecture(**SIZES))
    with (
        axis_rules({"embed": ["fsdp", "tensor"], "heads": "none", "vocab": "none"}),
        pytest.raises(ValueError) as caught,
    ):
        param_shardings(mesh, model.policy_axes, model.policy_shapes)
    _, *lines = str(caught.value).splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in lines] == ["k", "v", "down", "gate", "up"]
    assert lines[-1].strip() == (
        "trunk/layers/mlp/up (2, 16, 24), axes (layers, embed, mlp) "
        "on P(None, ('fsdp', 'tensor'), 'tensor'): "
        "'embed' and 'mlp' are both on mesh.tensor, which an array may use once"
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"mpl": "tensor"}, "mesh.axes.mpl: no logical axis of the models; did you mean 'mlp'?"),
        ({"mlp": "tensro"}, "got 'tensro'; did you mean 'tensor'?"),
        (
            {"mlp": ["fsdp", "none"]},
            "must name axes of the mesh (slice, data, fsdp, expert, sequence, tensor)",
        ),
        ({"mlp": ["fsdp", "fsdp"]}, "mesh.axes.mlp: must name each axis of the mesh once"),
        (
            {"batch": ["data", "sequence"]},
            "mesh.axes.batch: activations have 'batch' and 'length', which would both be on mesh.sequence",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(ValueError) as caught, axis_rules(rules):
        pass
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_axes_of_another_rank_are_refused(mesh):
    with pytest.raises(ValueError, match=r"a \(4, 4\): 1 logical axes, \(embed\)"):
        param_shardings(mesh, {"a": ("embed",)}, {"a": struct(4, 4)})


def test_rows_divide_over_data_and_fsdp(mesh):
    check_batch(mesh, 8, "ppo.batch_size")
    with pytest.raises(ValueError, match="ppo.batch_size is 6; it must be a multiple of 4"):
        check_batch(mesh, 6, "ppo.batch_size")
    assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)


def test_a_constraint_needs_a_mesh(mesh):
    x = jnp.zeros((8, 4))
    assert constrain(x, ("batch", "width")) is x
    with jax.set_mesh(mesh):
        held = jax.jit(lambda x: constrain(x, ("batch", "width")))(x)
    assert held.sharding.shard_shape(x.shape) == (2, 4)


def test_every_mesh_axis_of_the_table_exists():
    assert {axis for part in LOGICAL_AXES.values() for axis in part} == set(MESH_AXES)


def test_activations_are_divided_by_rows_not_like_the_parameters(mesh):
    model = make_model(Architecture(**SIZES))
    held = param_shardings(mesh, model.policy_axes, model.policy_shapes)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), model.policy_shapes, held
    )
    tokens = jax.ShapeDtypeStruct((8, 12), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(model.hidden).lower(params["trunk"], tokens).compile()
    assert compiled.output_shardings.shard_shape((8, 12, 16)) == (2, 12, 16)


@pytest.mark.parametrize("set_mesh", [False, True])
def test_a_sharded_forward_equals_one_device(mesh, set_mesh):
    model = make_model(Architecture(**SIZES))
    params = jax.jit(model.init_policy)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 32)

    def loss(params, tokens):
        logits = model.logits(params, model.hidden(params["trunk"], tokens))
        return jnp.mean(jax.nn.logsumexp(logits, -1) ** 2), logits

    run = jax.value_and_grad(loss, has_aux=True)
    (_, expected), gradient = jax.jit(run)(params, tokens)
    held = jax.device_put(params, param_shardings(mesh, model.policy_axes, model.policy_shapes))
    rows = jax.device_put(tokens, batch_sharding(mesh))
    with jax.set_mesh(mesh if set_mesh else jax.sharding.get_mesh()):
        (_, got), sharded_gradient = jax.jit(run)(held, rows)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    for ours, alone in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        assert np.linalg.norm(ours - alone) <= 1e-5 * np.linalg.norm(alone)
