"""On-policy distillation: on what the policy samples, its distributions are made like a frozen teacher's."""

from __future__ import annotations

from rlhf_jax.algos.algorithm import Algorithm, Aux, Measure, Term, Terms
from rlhf_jax.algos.ppo import PPO
from rlhf_jax.batch import Metrics, Params, Rows, Scored
from rlhf_jax.models.forward import Forward
from rlhf_jax.online_config import DistillConfig
from rlhf_jax.ops.masking import masked


def loss(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: DistillConfig
) -> tuple[Terms, Metrics]:
    """Returns the mean divergence of teacher and policy, nats per completion token, and what else they say.

    L = mean_t JSD_beta(teacher(. | x, y_<t), policy(. | x, y_<t)),   y by the policy, as it samples

    Of whole distributions at the temperature of sampling, see `ops.divergence.generalized_jsd`. There is no
    gradient through the sampling, and none of the teacher. policy/teacher_kl is KL(policy || teacher)
    whatever beta is.

    Args:
        forward: reads compare.
        params: with the policy.
        frozen: with the teacher.
        batch: completions by the policy.
        settings: reads beta.
    Source: arXiv:2306.13649 eq. 1 and algorithm 1 with lambda 1: no completions of data or teacher are mixed
        in. With beta 1 it is MiniLLM's objective (arXiv:2306.08543) of single tokens: what a token does to
        those behind it is left out. The mean is one over all tokens of the minibatch, as in
        trl.experimental.gkd; the paper's is over completions, each the mean of its tokens.
    """
    assert forward.compare is not None
    said, mask = forward.compare(params, frozen, batch, settings.beta), batch.completion_mask
    return {"divergence": Term(masked(said.divergence, mask))}, {
        "policy/teacher_kl": masked(said.kl, mask),
        "policy/entropy": masked(said.entropy, mask),
        "teacher/entropy": masked(said.teacher_entropy, mask),
    }


def evaluate(
    forward: Forward, params: Params, frozen: Params, batch: Rows, settings: DistillConfig
) -> Metrics:
    """Returns the same of completions of held-out prompts."""
    terms, metrics = loss(forward, params, frozen, batch, settings)
    return {f"eval/{name}": x for name, x in metrics.items()} | {"eval/divergence": terms["divergence"].mean}


def prepare(scored: Scored, aux: Aux, settings: DistillConfig) -> tuple[Rows, Metrics]:
    """Returns the rows of the rollout, all of which are learned, whatever their scores."""
    return scored.rollout.rows, {}


DISTILL = Algorithm(
    trains=("policy",),
    reads=lambda settings: ("reward",),
    loss=loss,
    evaluate=evaluate,
    figures=("loss/divergence", "policy/teacher_kl", "reward/score", "rollout/length"),
    reports=(
        Measure("divergence", "eval/divergence"),
        Measure("teacher_kl", "eval/policy/teacher_kl"),
        *PPO.reports,
    ),
    prepare=prepare,
)
