"""Supervised fine-tuning: next-token cross-entropy on demonstrations."""

from __future__ import annotations

from rlhf_jax.algos.algorithm import Algorithm, Measure, Term, Terms
from rlhf_jax.batch import Metrics, Params, Rows
from rlhf_jax.models.forward import Forward
from rlhf_jax.offline_config import SFTConfig
from rlhf_jax.online_config import RAFTConfig
from rlhf_jax.ops.masking import masked


def loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: SFTConfig | RAFTConfig
) -> tuple[Terms, Metrics]:
    """Returns the mean negative log-likelihood of the tokens that carry loss, nats per token.

    Which tokens carry loss is in the rows: with `loss_on: all` their first token alone counts as prompt.
    """
    logprobs, entropy = forward.logprobs(params, frozen, batch)
    nll = masked(-logprobs, batch.completion_mask)
    return {"nll": Term(nll)}, {"policy/entropy": masked(entropy, batch.completion_mask)}


def evaluate(forward: Forward, params: Params, frozen: Params, batch: Rows, settings: SFTConfig) -> Metrics:
    """Returns eval/nll, nats per token; its exponential is the perplexity."""
    terms, _ = loss(forward, params, frozen, batch, settings)
    return {"eval/nll": terms["nll"].mean}


SFT = Algorithm(
    trains=("policy",),
    loss=loss,
    evaluate=evaluate,
    figures=("loss/nll",),
    reports=(Measure("eval_perplexity", "eval/perplexity"),),
)
