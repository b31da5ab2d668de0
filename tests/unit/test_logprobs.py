"""The shift by one, and logprobs and entropies against a plain log-softmax, chunked or not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rlhf_jax.ops.logprobs import (
    contiguous_columns,
    gather_predictors,
    gather_targets,
    masked_columns,
    put_columns,
    token_logprobs,
)
from rlhf_jax.sharding import constrain, partition_spec, place_rows, traced_on
from tests import tiny

B, C, D, V = 3, 5, 4, 11


def test_columns_by_hand():
    tokens = jnp.arange(12).reshape(2, 6)  # row 0: 0..5, row 1: 6..11
    columns = contiguous_columns(jnp.array([2, 4]), 2, 6)
    np.testing.assert_array_equal(gather_targets(tokens, columns), [[2, 3], [10, 11]])
    np.testing.assert_array_equal(gather_predictors(tokens, columns), [[1, 2], [9, 10]])
    hidden = jnp.stack([tokens, -tokens], axis=-1)
    np.testing.assert_array_equal(gather_predictors(hidden, columns)[..., 1], [[-1, -2], [-9, -10]])
    placed = put_columns(jnp.array([[1.0, 2.0], [3.0, 4.0]]), columns, fill=-1)
    np.testing.assert_array_equal(placed, [[-1, -1, 1, 2, -1, -1], [-1, -1, -1, -1, 3, 4]])


def test_scattered_columns_by_hand():
    """Two turns of the model in the first row, one token in the second, none in the third."""
    tokens = jnp.arange(18).reshape(3, 6)
    mask = jnp.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0] * 6], bool)
    columns = masked_columns(mask, 3)
    targets, before = gather_targets(tokens, columns), gather_predictors(tokens, columns)
    np.testing.assert_array_equal(targets[0], [1, 4, 5])
    np.testing.assert_array_equal(before[0], [0, 3, 4])
    assert (targets[1, 0], before[1, 0]) == (9, 8)
    placed = put_columns(jnp.array([[1.0, 2.0, 3.0], [4.0, -9.0, -9.0], [-9.0] * 3]), columns)
    expected = [[0, 1, 0, 0, 2, 3], [0, 0, 0, 4, 0, 0], [0] * 6]
    np.testing.assert_array_equal(jnp.where(mask, placed, 0), expected)


def test_columns_beyond_the_row_are_dropped_and_token_0_is_predicted_by_nothing():
    x = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    columns = contiguous_columns(jnp.array([2, 0]), 3, 4)
    np.testing.assert_array_equal(put_columns(x, columns), [[0, 0, 1, 2], [0, 2, 3, 0]])
    tokens = jnp.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(gather_targets(tokens, columns), [[2, 3, 3], [4, 5, 6]])
    np.testing.assert_array_equal(gather_predictors(tokens, columns), [[1, 2, 3], [4, 4, 5]])


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_put_and_gather_shift_every_token_by_one(is_contiguous):
    """A value at column t - 1 ends up at token t, as V_t is the state before the token."""
    values = jnp.arange(12.0).reshape(2, 6)
    starts, lengths = jnp.array([1, 3]), jnp.array([6, 5])
    mask = (jnp.arange(6) >= starts[:, None]) & (jnp.arange(6) < lengths[:, None])
    columns = contiguous_columns(starts, 5, 6) if is_contiguous else masked_columns(mask, 5)
    placed = put_columns(gather_predictors(values, columns), columns)
    for row in range(2):
        for t in range(starts[row], lengths[row]):
            assert placed[row, t] == values[row, t - 1]


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, C, D))
    kernel = 2 * jax.random.normal(keys[1], (D, V))
    return hidden, kernel, jax.random.randint(keys[2], (B, C), 0, V)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "chunk", [0, 1, 4, 6, 7, 12, 15, 1000]
)  # 6: two columns of three rows, 5 is no multiple
def test_values_and_gradients_are_those_of_log_softmax(inputs, chunk, temperature):
    hidden, kernel, targets = inputs

    def ours(hidden, kernel):
        logprobs, entropy = token_logprobs(
            lambda h: h @ kernel, hidden, targets, temperature=temperature, chunk=chunk, with_entropy=True
        )
        return jnp.stack([logprobs, entropy])

    def plain(hidden, kernel):
        every = jax.nn.log_softmax(hidden @ kernel / temperature)
        logprobs = jnp.sum(every * jax.nn.one_hot(targets, V), axis=-1)
        return jnp.stack([logprobs, -jnp.sum(jnp.exp(every) * every, axis=-1)])

    got, got_vjp = jax.vjp(ours, hidden, kernel)
    expected, expected_vjp = jax.vjp(plain, hidden, kernel)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.dtype == jnp.float32
    cotangent = jax.random.normal(jax.random.key(5), got.shape)
    for a, b in zip(got_vjp(cotangent), expected_vjp(cotangent), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 4, "sequence": 2}], ids=str)
def test_chunks_on_a_mesh_have_the_same_values_and_gradients(sizes):
    """Nine columns, which the sequence axis does not divide, in chunks of two."""
    mesh, (num_rows, num_columns, width, vocabulary) = tiny.mesh(**sizes), (8, 9, 16, 12)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (num_rows, num_columns, width))
    kernel = jax.random.normal(keys[1], (width, vocabulary))
    targets = jax.random.randint(keys[2], (num_rows, num_columns), 0, vocabulary)

    def total(hidden, kernel, chunk):
        def logits(x):
            return constrain(x @ kernel, ("batch", "length", "vocab"))

        both = token_logprobs(logits, hidden, targets, temperature=0.7, chunk=chunk, with_entropy=True)
        return jnp.sum(jnp.sin(both[0]) + jnp.cos(both[1])), both

    run = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, expected), expected_gradient = jax.jit(partial(run, chunk=0))(hidden, kernel)
    held = jax.device_put(kernel, NamedSharding(mesh, partition_spec(("embed", "vocab"))))
    chunked = jax.jit(traced_on(mesh, partial(run, chunk=16)))
    (_, found), gradient = chunked(place_rows(mesh, hidden), held)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert tiny.relative_difference(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("chunk", [0, 6])
def test_forward_mode_passes(inputs, chunk):
    """TRPO's Fisher-vector products need it."""
    hidden, kernel, targets = inputs

    def total(kernel):
        settings = {"temperature": 1.0, "chunk": chunk, "with_entropy": False}
        return jnp.sum(token_logprobs(lambda h: h @ kernel, hidden, targets, **settings)[0])

    direction = jax.random.normal(jax.random.key(3), kernel.shape)
    _, slope = jax.jvp(total, (kernel,), (direction,))
    np.testing.assert_allclose(slope, jnp.sum(jax.grad(total)(kernel) * direction), rtol=1e-5)


def test_entropy_only_when_asked(inputs):
    hidden, kernel, targets = inputs
    settings = {"temperature": 1.0, "chunk": 3}
    plain, none = token_logprobs(lambda h: h @ kernel, hidden, targets, with_entropy=False, **settings)
    assert none is None
    np.testing.assert_array_equal(
        plain, token_logprobs(lambda h: h @ kernel, hidden, targets, with_entropy=True, **settings)[0]
    )


def test_uniform_logits_have_entropy_log_v():
    hidden, targets = jnp.zeros((1, 2, D)), jnp.zeros((1, 2), jnp.int32)
    logprobs, entropy = token_logprobs(
        lambda h: h @ jnp.ones((D, V)), hidden, targets, temperature=1.0, chunk=0, with_entropy=True
    )
    np.testing.assert_allclose(entropy, np.full((1, 2), np.log(V)), rtol=1e-6)
    np.testing.assert_allclose(logprobs, np.full((1, 2), -np.log(V)), rtol=1e-6)


def test_huge_logits_stay_finite():
    hidden, targets = jnp.full((1, 1, D), 1e4), jnp.array([[3]])
    kernel = jnp.eye(D, V)

    def logprob(hidden):
        return token_logprobs(
            lambda h: h @ kernel, hidden, targets, temperature=1.0, chunk=0, with_entropy=False
        )[0].sum()

    value, gradient = jax.value_and_grad(logprob)(hidden)
    assert value == pytest.approx(-np.log(4), rel=1e-5)
    assert np.isfinite(gradient).all()


def test_chunks_never_hold_all_logits(inputs):
    """No array of the compiled gradient has B * C * V elements or more once chunks are asked for."""
    num_rows, num_columns, vocabulary = 2, 64, 1000
    hidden = jnp.ones((num_rows, num_columns, D))
    targets = jnp.zeros((num_rows, num_columns), jnp.int32)

    def temporaries(chunk):
        def total(kernel):
            return token_logprobs(
                lambda h: h @ kernel, hidden, targets, temperature=1.0, chunk=chunk, with_entropy=True
            )[0].sum()

        compiled = jax.jit(jax.grad(total)).lower(jnp.ones((D, vocabulary))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = num_rows * num_columns * vocabulary * 4
    assert temporaries(0) >= whole
    assert temporaries(8) < whole / 2
