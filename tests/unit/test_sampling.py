"""The two-level inverse CDF against the distribution and at its edges; keys by what a row is about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollout.sampling import Sampling, _first_beyond, most_likely, row_keys, sample, uniforms

NONE = jnp.zeros(0, jnp.int32)  # no token ends a completion
LAST = 1 - 2.0**-24  # the largest float32 below 1


@pytest.mark.parametrize("num_words", [3, 128, 300, 1000])  # less than a block, a block, no multiple of one
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(num_words, temperature):
    logits = 2 * jax.random.normal(jax.random.key(0), (num_words,))
    num_draws = 50_000
    numbers = (jnp.arange(num_draws) + 0.5) / num_draws  # a grid: frequencies are right to two draws
    tokens, logprobs = sample(
        jnp.broadcast_to(logits, (num_draws, num_words)), numbers, Sampling(temperature, NONE)
    )
    expected = jax.nn.softmax(logits / temperature)
    counts = np.bincount(tokens, minlength=num_words)
    np.testing.assert_allclose(counts, num_draws * expected, atol=2.5)
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits / temperature)[tokens], atol=1e-5)


def test_by_hand():
    logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]] * 4))
    tokens, logprobs = sample(logits, jnp.array([0.0, 0.2499, 0.2501, 0.7501]), Sampling(1.0, NONE))
    np.testing.assert_array_equal(tokens, [0, 0, 1, 2])
    np.testing.assert_allclose(jnp.exp(logprobs), [0.25, 0.25, 0.5, 0.25], rtol=1e-6)
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize("num_words", [5, 128, 1000])
@pytest.mark.parametrize("number", [0.0, 1e-30, 0.3, 0.5, LAST, 1.0])
def test_never_a_word_of_probability_0_and_never_out_of_range(num_words, number):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, num_words)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.9] = -np.inf  # no probability
    logits[rng.random(logits.shape) < 0.3] -= 200.0  # underflows to none, unless it is all there is
    logits[:, 1] = rng.normal(size=40)
    logits[10:20, 0] = logits[10:20, -1] = -np.inf  # both ends
    tokens, logprobs = sample(jnp.asarray(logits), jnp.full((40,), number), Sampling(1.0, NONE))
    tokens = np.asarray(tokens)
    assert (tokens >= 0).all() and (tokens < num_words).all()
    chosen = logits[np.arange(40), tokens]
    assert np.isfinite(chosen).all() and (chosen > -100).all()
    assert np.isfinite(logprobs).all()


def test_a_rounded_cumulative_sum_cannot_choose_an_entry_of_no_weight():
    weights = jnp.array([[0.5, 0.0, 0.5, 0.0]])
    cumulative = jnp.array([[0.5, 0.6, 1.0, 1.1]])  # as if adding 0 had rounded upwards
    for target, entry in ((0.55, 2), (1.05, 2), (2.0, 2), (0.0, 0)):
        assert _first_beyond(cumulative, weights, jnp.array([target])) == entry


def test_a_certain_word_is_drawn_with_logprob_0():
    logits = jnp.full((3, 700), -1e9).at[jnp.arange(3), jnp.array([0, 350, 699])].set(7.0)
    for number in (0.0, 0.5, LAST):
        tokens, logprobs = sample(logits, jnp.full((3,), number), Sampling(0.3, NONE))
        np.testing.assert_array_equal(tokens, [0, 350, 699])
        np.testing.assert_array_equal(logprobs, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("num_words", [3, 128, 1000])
def test_most_likely_is_the_first_largest(num_words):
    logits = jnp.round(3 * jax.random.normal(jax.random.key(1), (50, num_words)))  # rounded: many ties
    tokens, logprobs = most_likely(logits, 0.5)
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits / 0.5).max(axis=-1), atol=1e-5)


def test_a_row_number_depends_on_prompt_sample_and_position_alone():
    key = jax.random.key(3)
    prompt, number = jnp.array([4, 4, 9, 4]), jnp.array([0, 1, 0, 0])
    drawn = uniforms(row_keys(key, prompt, number), jnp.int32(5))
    assert drawn[0] == drawn[3]
    assert len(set(np.asarray(drawn[:3]).tolist())) == 3
    one = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 9), 0), 5)
    assert drawn[2] == jax.random.uniform(one) + 2.0**-24
    assert drawn[2] != uniforms(row_keys(key, prompt, number), jnp.int32(6))[2]
    assert drawn[2] != uniforms(row_keys(jax.random.key(4), prompt, number), jnp.int32(5))[2]


def test_numbers_are_uniform_and_inside_the_open_interval():
    indices = jnp.arange(20_000)
    drawn = np.asarray(uniforms(row_keys(jax.random.key(0), indices, jnp.zeros_like(indices)), jnp.int32(0)))
    assert (drawn > 0).all() and (drawn < 1).all()
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 160  # five deviations


def words_kept(logits, **limits):
    """The words that are drawn at all, with the log-probability that each is told to have."""
    numbers = (jnp.arange(4000) + 0.5) / 4000
    tokens, logprobs = sample(
        jnp.broadcast_to(logits, (4000, len(logits))), numbers, Sampling(1.0, NONE, **limits)
    )
    counts = np.bincount(tokens, minlength=len(logits))
    return counts / 4000, dict(zip(np.asarray(tokens).tolist(), np.asarray(logprobs).tolist(), strict=True))


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10_000},  # more than there are
        {"top_p": 0.5},
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.1},
    ],
    ids=str,
)
def test_truncation_keeps_what_sorting_says(limits):
    """Against the rule written with a sort, in the order of transformers: top-k, top-p, min-p."""
    logits = np.asarray(2 * jax.random.normal(jax.random.key(5), (300,)), np.float64)
    order = np.argsort(-logits)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    kept = order[: limits.get("top_k", 300)]
    share = np.cumsum(probabilities[kept]) / probabilities[kept].sum()
    kept = kept[: 1 + np.searchsorted(share, min(limits.get("top_p", 1.0), share[-1]) - 1e-12)]
    kept = [word for word in kept if probabilities[word] >= limits.get("min_p", 0) * probabilities.max()]
    expected = np.zeros(300)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()

    frequencies, logprobs = words_kept(jnp.asarray(logits, jnp.float32), **limits)
    np.testing.assert_allclose(frequencies, expected, atol=1e-3)
    assert set(np.nonzero(frequencies)[0]) <= set(kept)
    for word, logprob in logprobs.items():  # of the whole distribution
        np.testing.assert_allclose(logprob, np.log(probabilities[word]), atol=1e-5)


def test_equals_of_the_last_word_stay():
    frequencies, _ = words_kept(jnp.asarray([1.0, 3.0, 1.0, -0.0, 0.0]), top_k=2)
    assert (frequencies > 0).tolist() == [True, True, True, False, False]


def test_another_value_compiles_nothing():
    compiled = jax.jit(sample)
    for number, (top_k, top_p) in enumerate([(3, 0.5), (40, 0.9)]):
        sampling = Sampling(jnp.float32(1 + number), NONE, top_k=jnp.int32(top_k), top_p=jnp.float32(top_p))
        compiled(jnp.zeros((2, 50)), jnp.zeros(2), sampling)
    assert compiled._cache_size() == 1
