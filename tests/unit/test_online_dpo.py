"""Pairs made of what was sampled: which completions they are, and their loss, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos import dpo, online_dpo
from rlhf_jax.batch import Rollout, Rows, Scored
from rlhf_jax.metrics import to_host
from rlhf_jax.models.forward import blank_forward
from rlhf_jax.offline_config import DPOConfig
from rlhf_jax.online_config import OnlineDPOConfig

T = 10
CONFIGS = {
    "two": OnlineDPOConfig(),
    "three": OnlineDPOConfig(group_size=3),
    "ipo": OnlineDPOConfig(group_size=3, loss="ipo", beta=0.5, length_normalized=True),
    "hinge without what did not end": OnlineDPOConfig(group_size=3, loss="hinge", missing_eos="mask"),
    "cdpo, what did not end scored low": OnlineDPOConfig(
        group_size=3, label_smoothing=0.2, missing_eos="replace", missing_eos_value=-9.0
    ),
}


def scored_rollout(seed, size=12):
    """Twelve completions: scores of rows 6 to 8 are equal, the last row is a filling; poison around them."""
    rng = np.random.default_rng(seed)
    prompt_lengths = np.repeat(rng.integers(1, 4, 2), 6)
    lengths = prompt_lengths + rng.integers(1, 7, size)
    prompt_lengths[-1] = lengths[-1] = 0
    rows = Rows(
        jnp.asarray(rng.integers(0, 50, (size, T))), jnp.asarray(prompt_lengths), jnp.asarray(lengths)
    )
    mask = np.asarray(rows.completion_mask)

    def noise():
        return jnp.float32(np.where(mask, rng.normal(-1, 0.5, mask.shape), 1e6))

    scores = rng.normal(size=size)
    scores[6:9] = 0.7
    ended = rng.random(size) < 0.6
    ended[:3], ended[3:6] = [True, True, False], [True, False, False]
    return Scored(Rollout(rows, jnp.asarray(ended), noise()), noise(), noise(), None, jnp.float32(scores))


def pairs_in_numpy(scored, settings):
    """The (chosen, rejected) rows of the groups that have a pair."""
    scores, ended = np.float64(scored.scores), np.asarray(scored.rollout.ended)
    counts = np.asarray(scored.rollout.rows.lengths) > 0
    if settings.missing_eos == "replace":
        scores = np.where(ended, scores, settings.missing_eos_value)
    if settings.missing_eos == "mask":
        counts &= ended
    pairs = []
    for start in range(0, len(scores), settings.group_size):
        group = [b for b in range(start, start + settings.group_size) if counts[b]]
        if group and max(scores[group]) > min(scores[group]):
            pairs.append((max(group, key=lambda b: scores[b]), min(group, key=lambda b: scores[b])))
    return pairs


def loss_in_numpy(scored, logprobs, pairs, settings):
    """The mean loss over pairs, one token at a time, from the papers' equations."""
    rows, ref = jax.device_get(scored.rollout.rows), np.float64(scored.ref_logprobs)

    def log_ratio(b):
        of = range(rows.prompt_lengths[b], rows.lengths[b])
        total = sum(logprobs[b, t] - ref[b, t] for t in of)
        return total / len(of) if settings.length_normalized else total

    losses = []
    for chosen, rejected in pairs:
        h, beta, e = log_ratio(chosen) - log_ratio(rejected), settings.beta, settings.label_smoothing
        losses.append(
            {
                "sigmoid": (1 - e) * np.log1p(np.exp(-beta * h)) + e * np.log1p(np.exp(beta * h)),
                "ipo": (h - 1 / (2 * beta)) ** 2,
                "hinge": max(0.0, 1 - beta * h),
            }[settings.loss]
        )
    return np.mean(losses)


def forward_of(table, ref_table=None):
    """A forward whose log-probabilities stand in a table, by the row's first token."""
    tables = {"policy": table, "reference": ref_table}

    def role_logprobs(roles, params, frozen, rows):
        return tuple(tables[role][rows.tokens[:, 0]] for role in roles)

    return blank_forward()._replace(role_logprobs=role_logprobs)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGS)
def test_pairs_and_their_loss_are_those_of_the_papers(name, seed):
    settings = CONFIGS[name]
    scored = scored_rollout(seed)
    rows = scored.rollout.rows
    rows = rows._replace(tokens=rows.tokens.at[:, 0].set(jnp.arange(12)))  # a row's first token names it
    scored = scored._replace(rollout=scored.rollout._replace(rows=rows))
    batch, metrics = online_dpo.prepare(scored, {}, settings)
    pairs = pairs_in_numpy(scored, settings)
    names, lengths = np.asarray(batch.tokens[:, 0]), np.asarray(batch.lengths)
    assert len(names) == 2 * 12 // settings.group_size
    assert [(a, b) for a, b in names.reshape(-1, 2)[lengths[::2] > 0]] == pairs
    np.testing.assert_array_equal(lengths[lengths > 0], np.asarray(rows.lengths)[np.ravel(pairs)])
    told = to_host(metrics)
    groups = np.asarray(rows.sequence_mask).reshape(-1, settings.group_size)
    if settings.missing_eos != "mask":
        assert told["rollout/equal_groups"] == pytest.approx(1 - len(pairs) / np.sum(groups.any(axis=1)))
    if settings.missing_eos == "none":
        assert told["rollout/equal_groups"] > 0

    logprobs = np.asarray(scored.old_logprobs) + np.random.default_rng(9).normal(0, 0.3, (12, T))

    def value(table, batch=batch, settings=settings, ref_table=None):
        terms, _ = dpo.loss(forward_of(table, ref_table), {}, {}, batch, settings)
        return terms["preference"].mean.value

    found, slope = jax.value_and_grad(value)(jnp.float32(logprobs))
    assert found == pytest.approx(loss_in_numpy(scored, logprobs, pairs, settings), rel=1e-5)
    moved = np.zeros((12, T), bool)
    for b in np.ravel(pairs):
        moved[b, rows.prompt_lengths[b] : rows.lengths[b]] = True
    assert not np.any(np.asarray(slope)[~moved])
    at = (pairs[0][1], int(rows.prompt_lengths[pairs[0][1]]))
    step = np.zeros_like(logprobs)
    step[at] = 1e-4
    ups, downs = (loss_in_numpy(scored, logprobs + sign * step, pairs, settings) for sign in (1, -1))
    assert slope[at] == pytest.approx((ups - downs) / 2e-4, rel=1e-3, abs=1e-6)

    # DPO on the same pairs, as if they were records, with the reference's forward pass.
    kept = np.repeat(lengths[::2] > 0, 2)
    records = jax.tree.map(lambda x: x[kept], batch._replace(ref_logprobs=None))
    options = ("loss", "beta", "label_smoothing", "length_normalized")
    offline = DPOConfig(**{option: getattr(settings, option) for option in options})
    expected = jax.value_and_grad(value)(jnp.float32(logprobs), records, offline, scored.ref_logprobs)
    assert found == pytest.approx(float(expected[0]), rel=1e-5)
    assert np.linalg.norm(slope - expected[1]) <= 1e-5 * np.linalg.norm(expected[1])


def test_a_batch_without_any_pair_has_no_loss_and_no_gradient():
    scored = scored_rollout(0)
    scored = scored._replace(scores=jnp.ones(12), ref_logprobs=jnp.full((12, T), jnp.nan))
    batch, metrics = online_dpo.prepare(scored, {}, OnlineDPOConfig(group_size=3))
    assert to_host(metrics)["rollout/equal_groups"] == 1
    table = scored.old_logprobs

    def value(table):
        forward = blank_forward()._replace(role_logprobs=lambda *_: (table[: len(batch.lengths)],))
        return dpo.loss(forward, {}, {}, batch, OnlineDPOConfig())[0]["preference"].mean.value

    found, slope = jax.value_and_grad(value)(table)
    assert found == 0
    assert not np.any(slope)
