"""What the roles say of a token, by hand from hidden states and logits: the shift by one, the temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.forward import make_forward
from tests import tiny

ROWS = tiny.rows(4)
TOKENS = [(b, t) for b in range(4) for t in range(int(ROWS.prompt_lengths[b]), int(ROWS.lengths[b]))]


def by_hand(value_of_token):
    """Returns f32[B, T]: the number of each completion token, 0 elsewhere."""
    found = np.zeros(ROWS.tokens.shape, np.float32)
    for at in TOKENS:
        found[at] = value_of_token(*at)
    return found


def test_a_value_is_of_the_state_before_its_token():
    """NUMERICS 19."""
    model, weights = tiny.model(), tiny.weights("value", tiny.mesh())
    weights["score_head"]["bias"] = jnp.float32(0.5)
    hidden = np.asarray(model.hidden(weights["trunk"], ROWS.tokens))
    kernel = np.asarray(weights["score_head"]["kernel"])
    values = jax.jit(make_forward(model, 8, 1.0, 0).values)({"value": weights}, {}, ROWS)
    np.testing.assert_allclose(values, by_hand(lambda b, t: hidden[b, t - 1] @ kernel + 0.5), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_policy_and_reference_are_of_the_logits_over_the_temperature(temperature):
    """NUMERICS 7."""
    model, mesh = tiny.model(), tiny.mesh()
    policy, reference = tiny.weights("policy", mesh, seed=0), tiny.weights("policy", mesh, seed=1)

    def expected(weights):
        logits = np.asarray(model.logits(weights, model.hidden(weights["trunk"], ROWS.tokens))) / temperature
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        entropy = -np.sum(np.exp(logprobs) * logprobs, axis=-1)
        of_token = by_hand(lambda b, t: logprobs[b, t - 1, ROWS.tokens[b, t]])
        return of_token, by_hand(lambda b, t: entropy[b, t - 1])

    forward = make_forward(model, 8, temperature, 0)
    logprobs, entropy = jax.jit(forward.logprobs)({"policy": policy}, {}, ROWS)
    ref_logprobs = jax.jit(forward.ref_logprobs)({}, {"reference": reference}, ROWS)
    np.testing.assert_allclose(logprobs, expected(policy)[0], atol=1e-5)
    np.testing.assert_allclose(entropy, expected(policy)[1], atol=1e-5)
    np.testing.assert_allclose(ref_logprobs, expected(reference)[0], atol=1e-5)
