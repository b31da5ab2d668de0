"""Attention over rows: the kernel against XLA, and rows whose tokens are divided over devices."""

from __future__ import annotations

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from rlhf_jax.models import row_attention as module
from rlhf_jax.models.attention import causal_attention
from rlhf_jax.models.row_attention import fitting_heads, flash_lack, row_attention, splash_attention
from rlhf_jax.models.transformer import make_model
from rlhf_jax.sharding import batch_sharding, param_shardings
from tests import tiny

NUM_ROWS = 2
LENGTHS = {4: 24, 2: 18}
"""Tokens of a row, by the key heads of the model: the second number does not divide over four devices."""
PLAIN = dataclasses.replace(tiny.ARCHITECTURE, num_heads=8, num_kv_heads=4, head_dim=4)
# Heads that do not divide by 4, layers that differ, capped scores.
ODD = dataclasses.replace(
    tiny.ARCHITECTURE, num_heads=6, num_kv_heads=2, windows=(5, 0), attention_softcap=2.0
)


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(found, expected, gradient=False):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if gradient:
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) > 0
        else:
            assert (np.abs(a - b) <= 1e-5 * np.maximum(1, np.abs(b))).all()


# Heads


@pytest.mark.parametrize(
    "heads, kv_heads, parts, expected",
    [
        (8, 2, 1, (8, 2)),
        (8, 2, 2, (8, 2)),
        (8, 2, 8, (8, 8)),
        (32, 8, 16, (32, 16)),  # no more of keys and values than are needed
        (24, 8, 12, (24, 24)),
        (6, 2, 4, (8, 8)),  # six, and two of zeros
    ],
)
def test_heads_divide_over_the_devices_and_meet_the_same_keys(heads, kv_heads, parts, expected):
    q, k, v = random(1, 5, heads, 2), random(1, 5, kv_heads, 2, seed=1), random(1, 5, kv_heads, 2, seed=2)
    more = fitting_heads(q, k, v, parts)
    assert (more[0].shape[2], more[1].shape[2], more[2].shape[2]) == (*expected, expected[1])
    found = causal_attention(*more, scale=1.0)[:, :, :heads]
    assert_close(found, causal_attention(q, k, v, scale=1.0))


# Kernels


@pytest.mark.parametrize(
    "window, softcap, is_packed", [(0, 0.0, False), (100, 0.0, True), (0, 2.0, True), (150, 3.0, False)]
)
def test_the_kernel_equals_xla(window, softcap, is_packed):
    """Values and gradients; 300 tokens are no whole number of blocks."""
    q, k, v, target = (random(2, 300, heads, 16, seed=heads) for heads in (4, 2, 1, 3))
    q, k, v, target = q, k, jnp.repeat(v, 2, axis=2), random(2, 300, 4, 16, seed=9)
    segments = jnp.asarray([[0] * 90 + [1] * 190 + [2] * 20, [0] * 290 + [1] * 10]) if is_packed else None

    def run(function, **options):
        def objective(q, k, v):
            out = function(q, k, v, segments, window=window, scale=0.3, softcap=softcap, **options)
            return jnp.vdot(out, target), out

        return jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (grads, out), (expected_grads, expected) = run(splash_attention, interpret=True), run(causal_attention)
    assert_close(out, expected)
    assert_close(grads, expected_grads, gradient=True)


def test_the_kernel_runs_on_the_rows_and_heads_of_each_device(monkeypatch):
    """Layers with different windows as well: each layer takes its own kernel."""
    monkeypatch.setattr(module, "device_platform", lambda: "tpu")
    monkeypatch.setattr(module, "splash_attention", partial(splash_attention, interpret=True))
    q, k, v = random(2, 140, 4, 8), random(2, 140, 2, 8, seed=1), random(2, 140, 2, 8, seed=2)
    segments = jnp.asarray([[0] * 50 + [1] * 90, [0] * 130 + [1] * 10])
    mesh = tiny.mesh(fsdp=2, sequence=2, tensor=2)

    @jax.jit
    def on_mesh(q, k, v, segments, which):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return row_attention(
                q, k, v, segments, scale=0.3, windows=(0, 20), which=which, implementation="flash"
            )

    rows = jax.device_put((q, k, v, segments), batch_sharding(mesh))
    for number, window in enumerate((0, 20)):
        expected = causal_attention(q, k, v, segments, scale=0.3, window=window)
        assert_close(on_mesh(*rows, jnp.int32(number)), expected)


@pytest.mark.parametrize(
    "platform, changes, lack",
    [
        ("tpu", {"dtype": jnp.float32, "softcap": 2.0, "is_packed": True, "head_dim": 300}, ""),
        ("gpu", {}, ""),
        ("gpu", {"capability": ()}, "this process has no GPU with CUDA, and so no cuDNN"),
        ("gpu", {"dtype": jnp.float32}, "cuDNN has no kernel for model.dtype float32"),
        (
            "gpu",
            {"head_dim": 12},
            "cuDNN's kernel takes heads of up to 128 numbers, in multiples of 8, on this ",
        ),
        ("gpu", {"softcap": 2.0}, "cuDNN has no kernel that caps scores, as this model does at 2.0"),
        (
            "gpu",
            {"is_packed": True},
            "cuDNN has no kernel for rows of several sequences (data.packing, ppo.sequences_per_row)",
        ),
        ("cpu", {}, "there is no kernel for a cpu"),
    ],
)
def test_what_no_kernel_computes(platform, changes, lack):
    found = gpu_lack(platform=platform, **changes)
    assert found.startswith(lack) and bool(found) == bool(lack)


def gpu_lack(platform="gpu", dtype=jnp.bfloat16, **changes):
    of = {"head_dim": 64, "softcap": 0.0, "is_packed": False, "capability": (8, 0)}
    return flash_lack(platform, jnp.dtype(dtype), **of | changes)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_heads_that_cudnn_refuses_are_those_that_jax_refuses(capability, monkeypatch):
    """As jax's own check of a forward pass that is differentiated, on GPUs of each kind."""
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda of: False)
    monkeypatch.setattr(
        cudnn, "check_compute_capability", lambda least: capability >= tuple(map(int, least.split(".")))
    )

    def is_refused(head_dim):
        x = jax.ShapeDtypeStruct((1, 8, 2, head_dim), jnp.bfloat16)
        try:
            cudnn.check_is_flash_attention(x, x, x, cudnn.AttentionLayout.BTNH.value, 90000, False, True)
        except NotImplementedError:
            return True
        return False

    for head_dim in range(1, 300):
        assert is_refused(head_dim) == bool(gpu_lack(head_dim=head_dim, capability=capability))


def test_heads_that_cudnn_refuses_are_left_to_xla(monkeypatch):
    """With model.attention auto; the kernel has those that it takes, and flash is refused."""
    monkeypatch.setattr(module, "device_platform", lambda: "gpu")
    monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(module, "FLASH_LENGTH", 4)
    monkeypatch.setattr(module, "cudnn_attention", lambda q, *rest, **options: jnp.full_like(q, 7))
    fits, odd = (random(1, 4, 2, head_dim).astype(jnp.bfloat16) for head_dim in (256, 12))
    attend = partial(row_attention, scale=1.0, windows=(0,))
    assert np.all(np.asarray(attend(fits, fits, fits)) == 7)
    found = attend(odd, odd, odd)
    np.testing.assert_array_equal(found, attend(odd, odd, odd, implementation="xla"))
    with pytest.raises(
        ValueError, match="'flash', but cuDNN's kernel takes heads of up to 256 numbers, in m"
    ):
        attend(odd, odd, odd, implementation="flash")


def test_a_kernel_that_is_not_there_is_refused():
    q = random(1, 4, 2, 2)
    with pytest.raises(ValueError, match="model.attention is 'flash', but there is no kernel for a cpu; set"):
        row_attention(q, q, q, scale=1.0, windows=(0,), implementation="flash")


# Rows over several devices


@cache
def parts(architecture):
    """Returns parameters whose tokens and positions matter, tokens, positions and segments."""
    params = jax.jit(make_model(architecture).init_trunk)(jax.random.key(0))
    params = jax.tree.map_with_path(lambda path, x: x if path[-1].key == "scale" else 6.0 * x, params)
    length = LENGTHS[architecture.num_kv_heads]
    tokens = jax.random.randint(jax.random.key(1), (NUM_ROWS, length), 0, architecture.vocab_size)
    starts = jnp.asarray([[7], [16]])  # of the second sequence of each row
    segments = (jnp.arange(length) >= starts).astype(jnp.int32)
    return params, tokens, jnp.arange(length) - segments * starts, segments


def gradient(architecture, mesh):
    """Returns the compiled program of (gradients, hidden states) on a mesh."""
    model, (params, *rows) = make_model(architecture, unroll=1), parts(architecture)
    shardings = param_shardings(mesh, model.policy_axes["trunk"], model.policy_shapes["trunk"])
    target = random(*rows[0].shape, architecture.hidden_size, seed=3)

    def on_mesh(params, *rows):
        def objective(params):
            hidden = model.hidden(params, *rows)
            return jnp.vdot(hidden, target), hidden

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(objective, has_aux=True)(params)

    placed = jax.device_put(params, shardings), *jax.device_put(rows, batch_sharding(mesh))
    return jax.jit(on_mesh).lower(*placed).compile(), placed


@cache
def on_one_device(architecture):
    program, placed = gradient(architecture, tiny.mesh())
    return jax.device_get(program(*placed))


@pytest.mark.parametrize(
    "architecture, sizes",
    [
        (PLAIN, {"sequence": 8}),
        pytest.param(PLAIN, {"tensor": 4, "sequence": 2}, marks=pytest.mark.slow),
        pytest.param(ODD, {"fsdp": 2, "sequence": 4}, marks=pytest.mark.slow),
    ],
    ids=["sequence8", "tensor4-sequence2", "fsdp2-sequence4"],
)
def test_rows_over_devices_give_the_same_states_and_gradients(architecture, sizes):
    """Packed rows; tokens and heads change places, and no device gets the whole rows of another."""
    program, placed = gradient(architecture, tiny.mesh(**sizes))
    grads, hidden = program(*placed)
    expected_grads, expected = on_one_device(architecture)
    assert_close(hidden, expected)
    assert_close(grads, expected_grads, gradient=True)
    if architecture is PLAIN:
        text = program.as_text()
        changes = re.findall(r" all-to-all\(", text)
        assert len(changes) == 2 * 4  # of q, k, v and the result, and of their gradients
        gathered = re.findall(r"= (\S+) all-gather\(", text)
        assert not [shape for shape in gathered if shape.startswith(f"f32[{NUM_ROWS},{LENGTHS[4]},")], (
            gathered
        )
