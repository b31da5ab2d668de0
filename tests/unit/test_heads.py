"""Score heads by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.heads import (
    Ensemble,
    average,
    combined,
    fold_normalizer,
    init_score_head,
    last_hidden,
    scores,
    values,
    zero_score_head,
)

HEAD = {"kernel": jnp.asarray([2.0, -1.0]), "bias": jnp.asarray(0.5)}
HIDDEN = jnp.asarray([[[1.0, 0.0], [3.0, 1.0], [100.0, 0.0]], [[0.0, 4.0], [1.0, 1.0], [2.0, 2.0]]])


def test_values_are_the_products_of_every_column():
    np.testing.assert_allclose(values(HEAD, HIDDEN), [[2.5, 5.5, 200.5], [-3.5, 1.5, 2.5]])


def test_scores_are_read_at_the_last_real_token():
    np.testing.assert_allclose(scores(HEAD, HIDDEN, jnp.asarray([2, 3])), [5.5, 2.5])
    np.testing.assert_array_equal(last_hidden(HIDDEN, jnp.asarray([2, 3])), [[3.0, 1.0], [2.0, 2.0]])


def test_a_filling_row_has_a_finite_score():
    assert np.isfinite(scores(HEAD, HIDDEN, jnp.asarray([0, 1]))).all()


def test_only_a_value_trains_its_bias():
    lengths = jnp.asarray([2, 3])
    of_scores = jax.grad(lambda head: jnp.sum(scores(head, HIDDEN, lengths)))(HEAD)
    np.testing.assert_allclose(of_scores["kernel"], [5.0, 3.0])
    assert of_scores["bias"] == 0.0
    assert jax.grad(lambda head: jnp.sum(values(head, HIDDEN)))(HEAD)["bias"] == 6.0


def test_folding_a_normalizer_normalizes_the_scores():
    folded = fold_normalizer(HEAD, mean=1.5, std=2.0)
    np.testing.assert_allclose(
        scores(folded, HIDDEN, jnp.asarray([2, 3])), [(5.5 - 1.5) / 2, (2.5 - 1.5) / 2]
    )


def test_an_ensemble_of_heads():
    heads = {"kernel": jnp.asarray([[2.0, -1.0], [0.0, 4.0]]), "bias": jnp.asarray([0.5, -1.0])}
    lengths = jnp.asarray([2, 3])
    said = scores(heads, HIDDEN, lengths)
    np.testing.assert_allclose(said, [[5.5, 2.5], [3.0, 7.0]])
    np.testing.assert_allclose(combined(said, Ensemble(2)), [4.25, 4.75])
    np.testing.assert_allclose(combined(said, Ensemble(2, "minimum")), [3.0, 2.5])
    np.testing.assert_allclose(combined(said, Ensemble(2, "mean_minus_std", 2.0)), [4.25 - 2.5, 4.75 - 4.5])
    np.testing.assert_allclose(scores(average(heads), HIDDEN, lengths), [4.25, 4.75])
    folded = fold_normalizer(heads, mean=jnp.asarray([1.5, 1.0]), std=jnp.asarray([2.0, 4.0]))
    np.testing.assert_allclose(scores(folded, HIDDEN, lengths), [[2.0, 0.5], [0.5, 1.5]])


def test_heads_of_an_ensemble_differ():
    kernel = init_score_head(jax.random.key(0), 7, num_heads=3)["kernel"]
    assert kernel.shape == (3, 7)
    assert len(np.unique(kernel)) == 21


def test_scores_are_float32_whatever_the_activations():
    head = init_score_head(jax.random.key(0), 2)
    assert values(head, HIDDEN.astype(jnp.bfloat16)).dtype == jnp.float32


def test_fresh_heads():
    kernel = init_score_head(jax.random.key(0), 4095)["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), 4096**-0.5, rtol=0.05)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero_score_head(7)))
