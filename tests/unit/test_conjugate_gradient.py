"""Conjugate gradients against numpy.linalg.solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.conjugate_gradient import conjugate_gradient, tree_dot
from rlhf_jax.sharding import partition_spec, traced_on
from tests import tiny

SIZE = 12


def system(seed: int = 0):
    """Returns A, b, and what makes a tree of two leaves of a vector."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(SIZE, SIZE))
    return root @ root.T / SIZE + 0.3 * np.eye(SIZE), rng.normal(size=SIZE)


def tree(vector):
    vector = jnp.asarray(vector, jnp.float32)
    return {"a": vector[:4].reshape(2, 2), "b": vector[4:]}


def vector(of):
    return jnp.concatenate([of["a"].ravel(), of["b"]])


def solve(matrix, b, **options):
    return jax.jit(
        lambda b: conjugate_gradient(lambda v: tree(jnp.float32(matrix) @ vector(v)), b, **options)
    )(tree(b))


@pytest.mark.parametrize("seed", range(3))
def test_all_directions_solve_the_system(seed):
    matrix, b = system(seed)
    found = solve(matrix, b, num_iterations=2 * SIZE, tolerance=1e-6)
    expected = np.linalg.solve(matrix, b)
    assert np.linalg.norm(vector(found.x) - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(vector(found.residual)) <= 1e-6 * np.linalg.norm(b)
    assert found.num_iterations <= SIZE + 4  # of exact arithmetic: SIZE


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_few_iterations_are_best_in_the_krylov_space(iterations):
    """x minimises x'Ax/2 - b'x over the span of b, A b, A^2 b, ...; the residual is b - A x."""
    matrix, b = system()
    found = solve(matrix, b, num_iterations=iterations)
    assert found.num_iterations == iterations
    basis = [b]
    for _ in range(iterations - 1):
        basis.append(matrix @ basis[-1] / np.linalg.norm(basis[-1]))
    basis, _ = np.linalg.qr(np.array(basis).T)
    expected = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
    x = np.asarray(vector(found.x), np.float64)
    assert np.linalg.norm(x - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(vector(found.residual) - (b - matrix @ x)) < 1e-5 * np.linalg.norm(b)


def test_the_tolerance_stops_early():
    matrix, b = system()
    found = solve(matrix, b, num_iterations=50, tolerance=0.2)
    assert 0 < found.num_iterations < SIZE
    assert np.linalg.norm(vector(found.residual)) <= 0.2 * np.linalg.norm(b)


def test_nothing_to_solve():
    matrix, b = system()
    found = solve(matrix, np.zeros(SIZE), num_iterations=5)
    assert found.num_iterations == 0 and not np.any(vector(found.x))
    found = solve(np.zeros_like(matrix), b, num_iterations=5)  # no curvature in any direction
    assert found.num_iterations == 1 and not np.any(vector(found.x))


def test_products_of_sharded_trees():
    matrix, b = system()
    mesh = tiny.mesh(fsdp=2, tensor=2)

    def solved(b):
        found = conjugate_gradient(lambda v: tree(jnp.float32(matrix) @ vector(v)), b, num_iterations=8)
        return found.x, tree_dot(b, found.residual)

    specs = {"a": partition_spec(("embed", "mlp")), "b": partition_spec(("mlp",))}
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    on_mesh, _ = jax.jit(traced_on(mesh, solved))(jax.device_put(tree(b), shardings))
    expected, _ = jax.jit(solved)(tree(b))
    assert tiny.relative_difference(on_mesh, expected) < 1e-4
