"""Losses of preferences and their gradients against TRL's; see make_preference_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import algo_config, offline_config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Rows, UnpairedRows
from rlhf_jax.models.forward import blank_forward
from tests.parity import make_preference_golden as made

GOLDEN = np.load(made.GOLDEN)
BATCHES = list(made.SCALES)
VALUE, GRADIENT = 1e-5, 1e-5
WITH_REFERENCE = {
    "sigmoid": ("dpo", {}),
    "sigmoid_norm": ("dpo", {"length_normalized": True}),
    "sigmoid_smoothed": ("cdpo", {"label_smoothing": made.SMOOTHING}),
    "robust": ("robust_dpo", {"label_smoothing": made.SMOOTHING}),
    "ipo": ("ipo", {}),
    "ipo_summed": ("ipo", {"length_normalized": False}),
    "hinge": ("slic", {}),
}
WITHOUT_REFERENCE = {
    "simpo": {"beta": made.BETA, "gamma": made.GAMMA, "label_smoothing": made.SMOOTHING},
    "cpo": {"beta": made.BETA, "nll_coef": made.NLL_COEF, "label_smoothing": made.SMOOTHING},
    "orpo": {"odds_ratio_coef": made.ODDS_RATIO_COEF},
}


def rows(batch, prompt_lengths=None):
    tokens, prompts, lengths = (GOLDEN[f"{batch}/{name}"] for name in ("tokens", "prompt_lengths", "lengths"))
    prompts = prompts if prompt_lengths is None else prompt_lengths
    return Rows(*(jnp.asarray(x, jnp.int32) for x in (tokens, prompts, lengths)))


def forward_of(logprobs_of):
    """Forward passes that read the parameters of a role: what they say of every token, [B, T]."""

    def role_logprobs(roles, params, frozen, rows):
        said = (logprobs_of((frozen | params)[role], rows) for role in roles)
        return tuple(jnp.where(rows.completion_mask, x, 0.0) for x in said)

    return blank_forward()._replace(role_logprobs=role_logprobs)


def total(name, settings, forward, frozen, batch):
    """Returns the objective of a minibatch as a function of the policy's parameters."""
    algorithm = ALGORITHMS[name]

    def objective(policy):
        params = {"policy": policy}
        stats = algorithm.minibatch_stats
        known = {} if stats is None else stats(forward, params, frozen, batch, settings)
        values = {name: mean.value for name, mean in known.items()}
        terms, _ = algorithm.loss(forward, params, frozen, batch, settings, **values)
        return sum(term.coef * term.mean.value for term in terms.values())

    return objective


def check(objective, policy, batch, name):
    value, gradient = jax.value_and_grad(objective)(policy)
    expected, expected_gradient = (GOLDEN[f"{batch}/{name}/{part}"] for part in ("value", "gradient"))
    assert abs(value - expected) <= VALUE * max(1, abs(expected))
    norm = np.linalg.norm(expected_gradient)
    assert norm > 0
    assert np.linalg.norm(gradient - expected_gradient) <= GRADIENT * norm


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_pairs_with_a_reference(name, batch):
    algorithm, options = WITH_REFERENCE[name]
    settings = algo_config.ALGORITHM_SECTIONS[algorithm](beta=made.BETA, **options)
    forward = forward_of(lambda table, rows: table)
    frozen = {"reference": jnp.asarray(GOLDEN[f"{batch}/ref_logprobs"])}
    objective = total(algorithm, settings, forward, frozen, rows(batch))
    check(objective, jnp.asarray(GOLDEN[f"{batch}/logprobs"]), batch, name)


@pytest.mark.parametrize("batch", BATCHES)
def test_unpaired_completions(batch):
    settings = offline_config.KTOConfig(
        beta=made.BETA, desirable_weight=made.DESIRABLE_WEIGHT, undesirable_weight=made.UNDESIRABLE_WEIGHT
    )
    own = rows(batch)
    mismatched = own._replace(tokens=-own.tokens)  # tells the model which completions it is asked about
    unpaired = UnpairedRows(own, mismatched, jnp.asarray(GOLDEN[f"{batch}/is_desirable"]))

    def said(tables, rows):
        return jnp.where(jnp.all(rows.tokens <= 0), tables[1], tables[0])

    policy, reference = (
        tuple(jnp.asarray(GOLDEN[f"{batch}/{name}"]) for name in (own_name, f"other_{own_name}"))
        for own_name in ("logprobs", "ref_logprobs")
    )
    objective = total("kto", settings, forward_of(said), {"reference": reference}, unpaired)
    check(lambda table: objective((table, policy[1])), policy[0], batch, "kto")


def test_the_reference_point_of_a_batch_is_above_zero():
    """Else the tests above would not see it."""
    assert all(GOLDEN[f"{batch}/kto/kl"] > 0.01 for batch in BATCHES)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_pairs_without_a_reference(name, batch):
    """By logit: log-probabilities per token and the likelihood of the chosen completions are part of it."""
    settings = algo_config.ALGORITHM_SECTIONS[name](**WITHOUT_REFERENCE[name])
    of = rows(batch, np.ones(2 * made.PAIRS) if name == "orpo" else None)

    def said(logits, rows):
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        of_next = jnp.take_along_axis(logprobs, rows.tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.pad(of_next, ((0, 0), (1, 0)))

    objective = total(name, settings, forward_of(said), {}, of)
    check(objective, jnp.asarray(GOLDEN[f"{batch}/logits"]), batch, name)
