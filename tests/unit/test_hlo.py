"""What devices of a mesh send each other: small programs whose answer is known."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.hlo import Collective, Program, sent_by

AXES = {"data": 2, "fsdp": 2, "tensor": 2}


def mesh() -> Mesh:
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * 3)


def program(function, *shapes_and_specs) -> Program:
    """Returns the compiled program of what each device does, with arrays of these shapes and specs."""
    on = mesh()
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on, spec))
        for shape, spec in shapes_and_specs
    ]
    mapped = jax.shard_map(
        function,
        mesh=on,
        in_specs=tuple(spec for _, spec in shapes_and_specs),
        out_specs=P(),
        check_vma=False,
    )
    return Program(jax.jit(mapped).lower(*args).compile().as_text() or "", AXES)


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "tensor"), tuple(AXES)])
def test_a_sum_is_told_by_its_axes(axes):
    """A device sends twice what it has to the others of its group, as a ring does."""
    (found,) = program(lambda x: lax.psum(x, axes), ((6, 4), P())).collectives
    number = 2 ** len(axes)
    assert found == Collective("all-reduce", axes, number, 6 * 4 * 4, 1)
    assert found.sent == 2 * (number - 1) * 96 // number


def test_a_gather_counts_its_result_and_a_scatter_what_it_begins_with():
    gather = program(lambda x: jnp.sum(lax.all_gather(x, "fsdp", tiled=True)), ((8, 4), P("fsdp")))
    (found,) = (one for one in gather.collectives if one.kind == "all-gather")
    assert (found.axes, found.size, found.sent) == (("fsdp",), 8 * 4 * 4, 8 * 4 * 4 // 2)
    scatter = program(lambda x: lax.psum_scatter(x, "fsdp", tiled=True), ((8, 4), P()))
    (found,) = scatter.collectives  # some devices' compilers make it a sum and a slice
    assert found.axes == ("fsdp",) and found.size == 8 * 4 * 4
    assert found.sent == {"reduce-scatter": 64, "all-reduce": 128}[found.kind]


def test_neighbours_are_told_by_their_axis():
    shift = partial(lax.ppermute, axis_name="data", perm=[(0, 1), (1, 0)])
    (found,) = program(shift, ((6, 4), P())).collectives
    assert found == Collective("collective-permute", ("data",), 2, 96, 1)
    assert found.sent == 96


def test_a_loop_counts_as_often_as_it_goes_round():
    """Also one within another; a gather in front of it counts once."""

    def inner(x, _):
        return lax.psum(x * 0.4, "tensor"), None

    def outer(x, _):
        return lax.scan(inner, lax.pmax(x, "data"), None, length=5)[0], None

    found = program(lambda x: lax.scan(outer, lax.psum(x, "fsdp"), None, length=3)[0], ((6, 4), P()))
    assert {one.axes: one.count for one in found.collectives} == {
        ("fsdp",): 1,
        ("data",): 3,
        ("tensor",): 15,
    }
    assert sent_by(found.collectives)["all-reduce", "tensor"] == 15 * 96
    assert not any(one.loop for one in found.collectives)


def test_a_loop_of_unknown_length_is_marked():
    def body(x):
        return lax.psum(x, "tensor") * 0.4

    (found,) = program(lambda x: lax.while_loop(lambda x: x[0, 0] < 3, body, x), ((6, 4), P())).collectives
    assert found.loop and found.count == 1 and found.axes == ("tensor",)


def test_of_branches_the_one_that_sends_most_counts():
    def function(x):
        def both(x):
            return lax.psum(lax.pmax(x, "data") * 2, "tensor")

        return lax.cond(x[0, 0] > 0, both, lambda x: lax.psum(x, "fsdp"), x)

    found = program(function, ((6, 4), P())).collectives
    assert {one.axes for one in found} == {("data",), ("tensor",)}


FUSED = """HloModule m

%started (p: bf16[1,32]) -> bf16[1,64] {
  %p = bf16[1,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1,64]{1,0:T(8,128)(2,1)} all-gather(%p), GATHERED
}

%ended (q: bf16[1,32]) -> bf16[1,64] {
  %q = bf16[1,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), GATHERED
}

%body (b: (s32[], bf16[1,32])) -> (s32[], bf16[1,32]) {
  %b = (s32[]{:T(128)}, bf16[1,32]{1,0}) parameter(0)
  %fusion.1 = bf16[1,64]{1,0} fusion(%b), kind=kLoop, calls=%started
  %fusion.2 = bf16[1,64]{1,0} fusion(%fusion.1), kind=kLoop, calls=%ended
  ROOT %t = (s32[]{:T(128)}, bf16[1,32]{1,0}) tuple(%b)
}

%condition (c: (s32[], bf16[1,32])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %c = (s32[]{:T(128)}, bf16[1,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT, metadata={op_name="while/cond/lt"}
}

%all-reduce-scatter.3 (p: bf16[64,32], q: bf16[8,32]) -> (bf16[32,32], bf16[4,32]) {
  %p = bf16[64,32]{1,0} parameter(0)
  %q = bf16[8,32]{1,0} parameter(1)
  %all-reduce.9 = (bf16[64,32]{1,0}, bf16[8,32]{1,0}) all-reduce(%p, %q), SCATTERED
  %get-tuple-element.1 = bf16[64,32]{1,0} get-tuple-element(%all-reduce.9), index=0
  %dynamic-slice.1 = bf16[32,32]{1,0} dynamic-slice(%get-tuple-element.1, %p), dynamic_slice_sizes={32,32}
  ROOT %t = (bf16[32,32]{1,0}, bf16[4,32]{1,0}) tuple(%dynamic-slice.1)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[1,32]{1,0}) while(%a), condition=%condition, body=%body
  %fusion.3 = (bf16[32,32]{1,0}, bf16[4,32]{1,0}) fusion(%a, %a), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %all-reduce.1 = (f32[8]{0}, f32[8]{0}) all-reduce(%a, %a), REDUCED
}
"""
GATHERED = "channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}"
SCATTERED = "channel_id=3, replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add.clone"
REDUCED = "channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%add"


def fused() -> Program:
    texts = {"GATHERED": GATHERED, "REDUCED": REDUCED, "SCATTERED": SCATTERED}
    return Program(reduce(lambda text, of: text.replace(*of), texts.items(), FUSED), {"fsdp": 2, "tensor": 2})


def test_what_a_tpu_spreads_over_fusions_counts_once():
    """As libtpu writes it: the channel tells; the bound of a loop stands in its condition."""
    gather, _, total = fused().collectives
    assert gather == Collective("all-gather", ("fsdp",), 2, 64 * 2, 24)
    assert total == Collective("all-reduce", ("tensor",), 2, 2 * 8 * 4, 1)


def test_a_sum_of_which_a_tpu_keeps_a_part_is_a_scatter():
    """It sends half of what the sum would: of two arrays on two chips, once each half of them."""
    _, scatter, _ = fused().collectives
    assert scatter == Collective("reduce-scatter", ("fsdp",), 2, (64 + 8) * 32 * 2, 1)
    assert scatter.sent == (64 + 8) * 32
