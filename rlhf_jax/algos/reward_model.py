"""Reward model: Bradley-Terry on preference pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algo_config import RewardModelConfig
from rlhf_jax.algos.algorithm import Algorithm, Measure, Term, Terms
from rlhf_jax.batch import Mean, Metrics, Params, Rows
from rlhf_jax.models.forward import Forward
from rlhf_jax.ops.masking import masked


def bradley_terry(chosen_scores: Array, rejected_scores: Array, mask: Array) -> Mean:
    """Returns the mean of -log sigmoid(r_chosen - r_rejected) over the pairs, nats.

    Args:
        chosen_scores, rejected_scores: f32[N]; both with a gradient.
        mask: bool[N], the pairs that are data.
    Source: Bradley and Terry 1952; arXiv:2203.02155 eq. 1.
    """
    return masked(-jax.nn.log_sigmoid(chosen_scores - rejected_scores), mask)


def accuracy(chosen_scores: Array, rejected_scores: Array, mask: Array) -> Mean:
    """Returns the share of pairs whose chosen completion scores higher; equal scores count one half."""
    margin = chosen_scores - rejected_scores
    return masked(jnp.where(margin == 0, 0.5, jnp.float32(margin > 0)), mask)


def loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: RewardModelConfig
) -> tuple[Terms, Metrics]:
    """Returns the Bradley-Terry loss of sequences that alternate chosen, rejected; both in one forward."""
    chosen, rejected = forward.scores(params, frozen, batch).reshape(-1, 2).T
    mask = batch.sequence_mask[::2]
    return {"bradley_terry": Term(bradley_terry(chosen, rejected, mask))}, {
        "reward/accuracy": accuracy(chosen, rejected, mask),
        "reward/margin": masked(chosen - rejected, mask),
    }


def evaluate(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: RewardModelConfig
) -> Metrics:
    """Returns loss, accuracy and margin of a held-out batch."""
    terms, metrics = loss(forward, params, frozen, batch, settings)
    return {
        "eval/loss": terms["bradley_terry"].mean,
        "eval/accuracy": metrics["reward/accuracy"],
        "eval/margin": metrics["reward/margin"],
    }


REWARD_MODEL = Algorithm(
    trains=("reward",),
    loss=loss,
    evaluate=evaluate,
    figures=("loss/bradley_terry", "reward/accuracy"),
    reports=(Measure("eval_accuracy", "eval/accuracy", is_compared=False),),
    rows_per_record=2,
    init_aux=lambda settings: {"normalizer_mean": 0.0, "normalizer_std": 1.0},
    normalizes_scores=True,
)
