"""Losses of scores that judges have compared: pairs, one best among several, rankings.

Lists are rows: N prompts of at most K completions each. `scores` f32[N, K] are a model's; `mask` bool[N, K]
says which completions there are; `better` bool[N, K, K] has (i, j) where completion i was judged better than
completion j of the same list. A pair is a list of two. What masks leave out has no weight and no gradient.
Losses are in nats; a list counts once, whatever its length, and not at all where nothing in it was judged.
That of Plackett-Luce is a sum over its completions, and so grows with the length of a list.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.batch import Mean
from rlhf_jax.ops.masking import keep, masked, share_above


def gaps(scores: Array, better: Array) -> Array:
    """Returns f32[N, K, K]: by how much completion i scores above j where it is better, 0 elsewhere."""
    return keep(scores[:, :, None], better) - keep(scores[:, None, :], better)


def bradley_terry(gap: Array, margin: ArrayLike = 0.0, label_smoothing: float = 0.0) -> Array:
    """Returns -(1 - e) log sigmoid(gap - margin) - e log sigmoid(-gap - margin), of gap's shape.

    Args:
        gap: f32, score of the better completion less that of the worse one; the only input with a gradient.
        margin: by how much the better one is to be ahead.
        label_smoothing: e, the chance that a judgement is the wrong way round.
    Source: Bradley and Terry 1952; arXiv:2203.02155 eq. 1. Margin: arXiv:2307.09288 eq. 2. Label smoothing as
    in cDPO: the expected loss where a judgement is turned round with chance e, its margin with it.
    """
    loss = -jax.nn.log_sigmoid(gap - margin)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * jax.nn.log_sigmoid(-gap - margin)


def hinge(gap: Array, margin: ArrayLike) -> Array:
    """Returns max(0, margin - gap), of gap's shape.

    Args:
        gap: f32, score of the better completion less that of the worse one; the only input with a gradient.
        margin: by how much the better one is to be ahead.
    Source: ranking SVM, Herbrich, Graepel and Obermayer 2000; Joachims 2002.
    """
    return jax.nn.relu(margin - gap)


def over_pairs(losses: Array, better: Array) -> Mean:
    """Returns the mean over lists of each list's mean over its pairs.

    Every pair of a list has the weight 1 / (number of its pairs); lists without any have none.

    Args:
        losses: f32[N, K, K], of each pair.
        better: bool[N, K, K].
    Source: arXiv:2203.02155 eq. 1: 1 / (K choose 2), all pairs of a prompt in one batch. Pairs that are ties,
    or were not judged, are no pairs.
    """
    counts = jnp.sum(better, axis=(1, 2), dtype=jnp.float32)
    of_lists = jnp.sum(keep(losses, better), axis=(1, 2)) / jnp.maximum(counts, 1)
    return masked(of_lists, counts > 0)


def info_nce(scores: Array, better: Array, mask: Array) -> Mean:
    """Returns the mean of -log(exp(r+) / (exp(r+) + sum_i exp(r_i-))) over the lists.

    r+ is the score of the best completion, r_i- are those of the ones that it is better than. Where several
    are best, as none is better than they, each is the positive one in turn: the list's loss is their mean.

    Args:
        scores: f32[N, K]; the only input with a gradient.
        better: bool[N, K, K].
        mask: bool[N, K].
    Source: arXiv:1807.03748 eq. 4, with scores of completions in place of log density ratios.
    """
    among = better | (mask[:, :, None] & jnp.eye(mask.shape[1], dtype=bool))
    is_best = jnp.any(better, axis=2) & ~jnp.any(better, axis=1)
    losses = keep(_log_shares(scores, among, mask), is_best)
    counts = jnp.sum(is_best, axis=1, dtype=jnp.float32)
    return masked(-jnp.sum(losses, axis=1) / jnp.maximum(counts, 1), counts > 0)


def plackett_luce(scores: Array, ratings: Array, better: Array, mask: Array) -> Mean:
    """Returns the mean over lists of -sum_i log(exp(r_i) / sum_{j left of i} exp(r_j)).

    Left of i are i itself, what it is better than, and what is tied with it: has the same rating. In a whole
    order completions are chosen one after the other, the best first, each among those that are left; of those
    that are tied each among all of them and what is worse (Breslow), the last of a ranking too, so that a tie
    at the end pulls scores together, and a last one alone says nothing. Where judges compared some pairs
    alone, ratings are NaN: nothing is tied, and each completion is chosen among itself and those that it was
    judged better than. Two that were never compared meet at most in the choice of a third.

    Args:
        scores: f32[N, K]; the only input with a gradient.
        ratings: f32[N, K]; only whether they are equal is read.
        better: bool[N, K, K].
        mask: bool[N, K].
    Source: Plackett 1975; the mean over lists as in ListMLE, Xia et al. 2008. Ties: Breslow 1974, for the
    same likelihood of survival times. A choice among any set: Luce 1959; rankings of parts, such as of the
    first k, as choices: Maystre and Grossglauser 2015. The choices of a partial order that is not a ranking
    of its first k are taken as independent, which they are not.
    """
    tied = (ratings[:, None, :] == ratings[:, :, None]) & mask[:, None, :] & mask[:, :, None]
    left = (better | tied) & ~jnp.eye(mask.shape[1], dtype=bool)
    losses = -jnp.sum(_log_shares(scores, left, mask), axis=1)
    return masked(losses, jnp.any(left, axis=(1, 2)))


def _log_shares(scores: Array, among: Array, mask: Array) -> Array:
    """Returns f32[N, K], scores_i - log sum_{j: among_ij} exp(scores_j); 0 where there is no completion i."""
    scores = keep(scores, mask)
    among = among | jnp.eye(mask.shape[1], dtype=bool)  # never none, of which the gradient would be NaN
    total = jax.nn.logsumexp(jnp.where(among, scores[:, None, :], -jnp.inf), axis=2)
    return keep(scores - total, mask)


def centering(scores: Array, mask: Array) -> Mean:
    """Returns the mean over lists of each list's mean of (r_i + r_j)^2 over all pairs of its completions.

    Comparisons leave the scores' common constant free; this draws it to 0.

    Args:
        scores: f32[N, K]; the only input with a gradient.
        mask: bool[N, K].
    Source: arXiv:2312.09244 eq. 2, for pairs.
    """
    pairs = mask[:, :, None] & mask[:, None, :] & jnp.tri(mask.shape[1], k=-1, dtype=bool)
    sums = keep(scores[:, :, None], pairs) + keep(scores[:, None, :], pairs)
    return over_pairs(jnp.square(sums), pairs)


def squared_error(scores: Array, ratings: Array, mask: Array) -> Mean:
    """Returns the mean of (r - rating)^2 over the completions that there are.

    Args:
        scores, ratings: f32, of any one shape; scores alone have a gradient.
        mask: bool, of that shape.
    Source: arXiv:2406.08673, whose reward models are regressions on ratings.
    """
    return masked(jnp.square(keep(scores, mask) - keep(ratings, mask)), mask)


def pair_accuracy(scores: Array, better: Array) -> Mean:
    """Returns the share of all pairs whose better completion scores higher; equal scores count one half."""
    return share_above(gaps(scores, better), better)
