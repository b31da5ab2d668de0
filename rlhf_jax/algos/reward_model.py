"""Reward model: scores that agree with what people say of completions, in pairs, rankings or ratings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.algos.algorithm import Algorithm, Measure, Term, Terms
from rlhf_jax.batch import JudgedRows, Mean, Metrics, Params, Rows, rows_of
from rlhf_jax.models.forward import Forward
from rlhf_jax.offline_config import RewardModelConfig
from rlhf_jax.ops import ranking
from rlhf_jax.ops.masking import masked

LOSSES = ("bradley_terry", "hinge", "info_nce", "plackett_luce", "regression")


class Lists(NamedTuple):
    """The completions of each record, a pair being a list of two: chosen, rejected."""

    mask: Array  # bool[N, K], which there are
    ratings: Array  # f32[N, K]
    better: Array  # bool[N, K, K], which is better than which


def lists_of(batch: Rows | JudgedRows) -> Lists:
    """Returns what is known of a batch, record by record; rows that nothing is said of alternate in pairs."""
    present = rows_of(batch).sequence_mask
    if isinstance(batch, JudgedRows):
        num_completions = batch.better.shape[-1]
        shape = (-1, num_completions)
        better = batch.better.reshape(*shape, num_completions)
        return Lists(present.reshape(shape), batch.ratings.reshape(shape), better)
    mask = present.reshape(-1, 2)
    chosen_is_better = jnp.asarray([[False, True], [False, False]])
    return Lists(mask, jnp.zeros(mask.shape), chosen_is_better & mask[:, :1, None])


def main_loss(scores: Array, lists: Lists, settings: RewardModelConfig) -> Mean:
    """Returns the loss that settings.loss names; see rlhf_jax/ops/ranking.py for each.

    Args:
        scores: f32[N, K]; the only input with a gradient.
        lists: of the same records.
        settings: reads loss, margin, margin_from_data, label_smoothing.
    """
    match settings.loss:
        case "regression":
            return ranking.squared_error(scores, lists.ratings, lists.mask)
        case "info_nce":
            return ranking.info_nce(scores, lists.better, lists.mask)
        case "plackett_luce":
            return ranking.plackett_luce(scores, lists.ratings, lists.better, lists.mask)
    gap = ranking.gaps(scores, lists.better)
    own = ranking.gaps(lists.ratings, lists.better) if settings.margin_from_data else 0.0
    margin = settings.margin + own
    if settings.loss == "hinge":
        losses = ranking.hinge(gap, margin)
    else:
        losses = ranking.bradley_terry(gap, margin, settings.label_smoothing)
    return ranking.over_pairs(losses, lists.better)


def loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows | JudgedRows, settings: RewardModelConfig
) -> tuple[Terms, Metrics]:
    """Returns the loss, with the term that centres scores, and what the scores say of the same records.

    All completions of a record go through one forward. Of several heads the loss is the mean of theirs; the
    rest is of their mean score.
    """
    assert forward.head_scores is not None
    lists = lists_of(batch)
    of_heads = forward.head_scores(params, frozen, rows_of(batch))
    if settings.loss == "regression":
        # The forward keeps the head's bias from gradients, as comparisons do not see it; ratings do.
        bias = params["reward"]["score_head"]["bias"].reshape(-1, 1)
        of_heads = of_heads + bias - lax.stop_gradient(bias)
    of_heads = of_heads.reshape(-1, *lists.mask.shape)

    def over_heads(of_one: Callable[[Array], Mean]) -> Mean:
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(of_one)(of_heads))

    terms = {settings.loss: Term(over_heads(lambda scores: main_loss(scores, lists, settings)))}
    if settings.center_coef:
        centred = over_heads(lambda scores: ranking.centering(scores, lists.mask))
        terms["centering"] = Term(centred, settings.center_coef)
    scores = jnp.mean(of_heads, axis=0)
    if settings.loss == "regression":
        return terms, {"reward/score": masked(scores, lists.mask)}
    return terms, {
        "reward/accuracy": ranking.pair_accuracy(scores, lists.better),
        "reward/margin": masked(ranking.gaps(scores, lists.better), lists.better),
        "reward/score": masked(scores, lists.mask),
    }


def evaluate(
    forward: Forward, params: Params, frozen: Params, batch: Rows | JudgedRows, settings: RewardModelConfig
) -> Metrics:
    """Returns loss and mean score of a held-out batch and, of comparisons, accuracy and margin of pairs."""
    terms, metrics = loss(forward, params, frozen, batch, settings)
    told = {name.replace("reward/", "eval/"): metric for name, metric in metrics.items()}
    if settings.loss == "regression":
        told["eval/squared_error"] = terms["regression"].mean
    return {"eval/loss": terms[settings.loss].mean} | told


def raw_normalizer(settings: RewardModelConfig) -> dict[str, float | tuple[float, ...]]:
    """Returns the normaliser that changes nothing, of each head; see `models/heads.fold_normalizer`."""
    if settings.num_heads == 1:
        return {"normalizer_mean": 0.0, "normalizer_std": 1.0}
    return {"normalizer_mean": (0.0,) * settings.num_heads, "normalizer_std": (1.0,) * settings.num_heads}


REWARD_MODEL = Algorithm(
    trains=("reward",),
    loss=loss,
    evaluate=evaluate,
    figures=(*(f"loss/{name}" for name in LOSSES), "reward/accuracy"),
    reports=(
        Measure("eval_accuracy", "eval/accuracy", is_compared=False),
        Measure("eval_squared_error", "eval/squared_error"),
    ),
    rows_per_record=2,
    init_aux=raw_normalizer,
    normalizes_scores=True,
)
