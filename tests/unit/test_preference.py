"""Preference losses on hand-worked numbers, what is summed over completions, and mismatched completions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos import dpo, kto, reference_free
from rlhf_jax.algos.preference import Completions, pair_metrics
from rlhf_jax.batch import UnpairedRows
from rlhf_jax.data.records import Preference, Unpaired, unpaired_of, with_mismatched
from rlhf_jax.models.forward import blank_forward
from rlhf_jax.offline_config import DPOConfig, KTOConfig, SimPOConfig
from rlhf_jax.ops.masking import share_above
from rlhf_jax.ops.sequences import completion_lengths, completion_sums
from tests import tiny

LN3 = np.log(3.0)


@pytest.mark.parametrize(
    "options, margin, expected",
    [
        ({"beta": 0.5}, 2 * LN3, np.log(4 / 3)),  # sigmoid(ln 3) = 3/4
        ({"beta": 0.5}, -2 * LN3, np.log(4)),
        ({"beta": 0.5, "label_smoothing": 0.1}, 2 * LN3, 0.9 * np.log(4 / 3) + 0.1 * np.log(4)),
        (
            {"beta": 0.5, "label_smoothing": 0.1, "loss": "robust"},
            2 * LN3,
            (0.9 * np.log(4 / 3) - 0.1 * np.log(4)) / 0.8,
        ),
        ({"beta": 0.5, "loss": "ipo"}, 3.0, 4.0),  # (3 - 1 / (2 * 0.5))^2
        ({"beta": 0.5, "loss": "ipo"}, 1.0, 0.0),
        ({"beta": 0.5, "loss": "hinge"}, 1.0, 0.5),
        ({"beta": 0.5, "loss": "hinge"}, 5.0, 0.0),
    ],
)
def test_loss_of_a_pair(options, margin, expected):
    (found,) = dpo.pair_losses(jnp.float32([margin]), DPOConfig(**options))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge"])
def test_extreme_margins_have_finite_losses_and_the_slope_of_a_line(loss):
    settings = DPOConfig(loss=loss, label_smoothing=0.2 if loss == "robust" else 0.0)
    value, slope = jax.vmap(jax.value_and_grad(lambda h: dpo.pair_losses(h, settings)))(
        jnp.float32([-1e5, 1e5])
    )
    assert np.all(np.isfinite(value))
    far = 0.2 / 0.6 if loss == "robust" else 0.0
    np.testing.assert_allclose(slope, [-0.1 * (1 + far), -0.1 * far], rtol=1e-5, atol=1e-8)


def test_robust_loss_is_the_clean_one_on_average_over_flipped_labels():
    clean, robust = DPOConfig(), DPOConfig(loss="robust", label_smoothing=0.3)
    margins = jnp.linspace(-40, 40, 9)
    flipped = 0.7 * dpo.pair_losses(margins, robust) + 0.3 * dpo.pair_losses(-margins, robust)
    np.testing.assert_allclose(flipped, dpo.pair_losses(margins, clean), rtol=1e-5, atol=1e-6)


def test_loss_of_desirable_and_undesirable_completions():
    settings = KTOConfig(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    ratios = jnp.float32([1 + 2 * LN3, 1 + 2 * LN3, 1.0])
    found = kto.completion_losses(ratios, jnp.array([True, False, True]), jnp.float32(1.0), settings)
    np.testing.assert_allclose(found, [2 / 4, 3 * 3 / 4, 2 / 2], rtol=1e-6)


def test_reference_point_is_not_below_zero_and_has_no_gradient():
    rows = tiny.rows(4)
    batch, settings = UnpairedRows(rows, rows, jnp.array([True, False, True, True])), KTOConfig(beta=1.0)

    def objective(mismatched):
        terms, metrics = kto.loss(blank_forward(), {}, {}, batch, settings, mismatched=mismatched)
        return terms["preference"].mean.value, metrics["policy/kl_estimate"].value

    (value, kl), slope = jax.value_and_grad(objective, has_aux=True)(jnp.float32(LN3))
    assert (value, kl, slope) == pytest.approx(((3 * 3 / 4 + 1 / 4) / 4, LN3, 0.0), rel=1e-6)
    assert objective(jnp.float32(-5.0)) == pytest.approx((0.5, 0.0))


def test_simpo_asks_for_a_margin():
    settings = SimPOConfig(beta=2.0, gamma=1.0)
    found = reference_free.pair_losses(jnp.float32([0.5, 0.5 + LN3 / 2]), settings)
    np.testing.assert_allclose(found, [np.log(2), np.log(4 / 3)], rtol=1e-6)


def test_log_odds_ratios():
    """Odds of a half are 1, of three quarters 3; a completion that is certain has a large but finite one."""
    half, three_quarters = np.log(0.5), np.log(0.75)
    found = reference_free.log_odds_ratios(jnp.float32([three_quarters, half, 0.0]), jnp.float32([half] * 3))
    np.testing.assert_allclose(found, [LN3, 0, np.log(1e6)], rtol=1e-3, atol=1e-6)
    slope = jax.grad(lambda x: reference_free.log_odds_ratios(x, jnp.float32(half)))(jnp.float32(0.0))
    assert slope == 0


def test_likelihood_is_that_of_chosen_tokens():
    of = Completions(jnp.float32([-2, -70, -4, -80, -9, -90]), jnp.zeros(6), jnp.float32([1, 9, 3, 9, 5, 9]))
    found = reference_free.chosen_nll(of, jnp.array([True, True, False]))
    assert (found.total, found.weight) == (6, 4)


def test_metrics_of_pairs_leave_filling_out():
    of = Completions(jnp.float32([-2, -3, -4, -4, 7, 7]), jnp.zeros(6), jnp.ones(6))
    found = pair_metrics(of, of.logprobs, jnp.array([True, True, False]))
    assert found["reward/accuracy"].value == pytest.approx(0.75)  # a tie counts one half
    assert found["reward/margin"].value == pytest.approx(0.5)
    assert found["policy/logprobs_rejected"].value == pytest.approx(-3.5)
    assert share_above(jnp.float32([1, 0, -1, 5]), jnp.array([True, True, True, False])).value == 0.5


def test_sums_over_completions_are_the_same_in_packed_rows():
    rows = tiny.rows()
    x = jnp.where(rows.completion_mask, jnp.arange(8 * 16).reshape(8, 16), jnp.nan)
    groups = [[0, 1, 2, 3], [], [4, 5], [6, 7]]
    packed = tiny.packed(rows, groups, 60)
    of_packed = np.full((4, 60), np.nan, np.float32)
    for row, group in enumerate(groups):
        ends = np.cumsum([0, *(int(rows.lengths[number]) for number in group)])
        for start, end, number in zip(ends[:-1], ends[1:], group, strict=True):
            of_packed[row, start:end] = x[number, : end - start]
    expected = completion_sums(x, rows)
    found = completion_sums(jnp.asarray(of_packed), packed)
    of_data = np.asarray(packed.sequence_mask)
    np.testing.assert_array_equal(found[of_data], expected)
    np.testing.assert_array_equal(found[~of_data], 0)
    np.testing.assert_array_equal(completion_lengths(packed)[of_data], rows.lengths - rows.prompt_lengths)


def test_a_mismatched_completion_is_that_of_the_next_other_prompt():
    records = [Unpaired(prompt, answer, True) for prompt, answer in ("aA", "aB", "bC", "bD", "aE")]
    assert [record.mismatched for record in with_mismatched(records)] == ["C", "D", "E", "E", "C"]
    alike = [Unpaired("", answer, True) for answer in "AB"]
    assert [record.mismatched for record in with_mismatched(alike)] == ["B", "A"]
    assert with_mismatched([]) == []


def test_mismatched_completions_of_pairs_are_as_often_desirable_as_not():
    """Else what KTO measures them against is what good completions alone have."""
    pairs = [Preference(f"p{i}", f"good {i}", f"bad {i}") for i in range(5)]
    found = [record.mismatched for record in with_mismatched(unpaired_of(pairs))]
    assert sorted(found) == sorted([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])


def test_pairs_give_both_of_their_completions():
    found = unpaired_of([Preference("p", "good", "bad", variables={"a": 1})])
    assert found == [Unpaired("p", "good", True, {"a": 1}), Unpaired("p", "bad", False, {"a": 1})]
