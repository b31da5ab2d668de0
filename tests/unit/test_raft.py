"""Which samples are learned, and their loss: that of SFT on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos import raft, sft
from rlhf_jax.metrics import to_host
from rlhf_jax.models.forward import blank_forward
from rlhf_jax.offline_config import SFTConfig
from rlhf_jax.online_config import RAFTConfig
from tests.unit.test_online_dpo import T, scored_rollout

CONFIGS = {
    "the best": RAFTConfig(group_size=3),
    "the two best": RAFTConfig(group_size=4, num_kept=2),
    "all that are good": RAFTConfig(group_size=3, num_kept=3, keep="above", threshold=0.1),
    "the best if it is good": RAFTConfig(group_size=2, keep="above", threshold=0.7),
    "the best that ended": RAFTConfig(group_size=3, missing_eos="mask"),
    "what did not end scored low": RAFTConfig(group_size=6, missing_eos="subtract", missing_eos_value=5.0),
}


def kept_in_numpy(scored, settings):
    """The rows that are learned, group by group."""
    scores, ended = np.float64(scored.scores), np.asarray(scored.rollout.ended)
    counts = np.asarray(scored.rollout.rows.lengths) > 0
    if settings.missing_eos == "subtract":
        scores = np.where(ended, scores, scores - settings.missing_eos_value)
    if settings.missing_eos == "mask":
        counts &= ended
    kept = []
    for start in range(0, len(scores), settings.group_size):
        group = [b for b in range(start, start + settings.group_size) if counts[b]]
        best = sorted(group, key=lambda b: -scores[b])[: settings.num_kept]
        kept += [b for b in best if settings.keep == "best" or scores[b] > np.float32(settings.threshold)]
    return kept, counts


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_sft_on_the_best(name, seed):
    settings, scored = CONFIGS[name], scored_rollout(seed)
    rows = scored.rollout.rows
    rows = rows._replace(tokens=rows.tokens.at[:, 0].set(jnp.arange(12)))  # a row's first token names it
    scored = scored._replace(rollout=scored.rollout._replace(rows=rows))
    batch, metrics = raft.prepare(scored, {}, settings)
    kept, counts = kept_in_numpy(scored, settings)
    assert len(batch.lengths) == 12 // settings.group_size * settings.num_kept
    is_kept = np.asarray(batch.lengths) > 0
    assert np.asarray(batch.tokens[:, 0])[is_kept].tolist() == kept
    told = to_host(metrics)
    assert told["rollout/kept"] == pytest.approx(len(kept) / counts.sum())

    def value(table, batch, settings):
        forward = blank_forward()._replace(logprobs=lambda p, f, rows: (table[rows.tokens[:, 0]],) * 2)
        return sft.loss(forward, {}, {}, batch, settings)[0]["nll"].mean.value

    table = scored.old_logprobs
    tokens = [(b, t) for b in kept for t in range(rows.prompt_lengths[b], rows.lengths[b])]
    found, slope = jax.value_and_grad(value)(table, batch, settings)
    assert found == pytest.approx(-np.mean([table[at] for at in tokens]), rel=1e-5)
    by_hand = np.zeros((12, T))
    for at in tokens:
        by_hand[at] -= 1 / len(tokens)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-5)
    records = jax.tree.map(lambda x: x[np.array(kept)], rows)
    expected = jax.value_and_grad(value)(table, records, SFTConfig())
    assert found == pytest.approx(float(expected[0]), rel=1e-5)
    np.testing.assert_allclose(slope, expected[1], rtol=1e-5)


def test_where_nothing_is_good_enough_nothing_is_learned():
    settings = RAFTConfig(group_size=3, num_kept=3, keep="above", threshold=1e3)
    batch, metrics = raft.prepare(scored_rollout(0), {}, settings)
    assert not np.any(batch.lengths)
    assert to_host(metrics)["rollout/kept"] == 0
    terms, _ = sft.loss(blank_forward(), {}, {}, batch, settings)
    assert (terms["nll"].mean.weight, terms["nll"].mean.value) == (0, 0)
