"""Losses of policies without a critic and their gradients against TRL's; see make_policy_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import PolicyBatch, Rows
from rlhf_jax.models.forward import blank_forward
from tests.parity import make_policy_golden as made

GOLDEN = np.load(made.GOLDEN)
VALUE, GRADIENT = 1e-5, 1e-5
CLIP = {"clip_eps": made.CLIP, "clip_eps_high": made.CLIP}
SETTINGS = {
    "grpo": ("grpo", CLIP),
    "grpo_clipped_twice": ("grpo", CLIP | {"dual_clip": made.DUAL_CLIP}),
    "dr_grpo": ("dr_grpo", CLIP),
    "dapo": ("dapo", CLIP | {"clip_eps_high": made.CLIP_HIGH}),
    "dapo_entropy": ("dapo", {"clip_eps_high": made.CLIP_HIGH, "entropy_coef": made.ENTROPY_COEF}),
    "gspo": ("gspo", CLIP),
    "grpo_importance": ("grpo", CLIP),
    "rloo": ("rloo", CLIP),
}


def policy_batch(of, name):
    rows = Rows(
        *(jnp.asarray(x, jnp.int32) for x in (0 * of["logprobs"], of["prompt_lengths"], of["lengths"]))
    )
    has_kl = made.LOSSES[name].get("beta", 0) > 0
    return PolicyBatch(
        rows,
        rows.completion_mask,
        jnp.asarray(of["old_logprobs"]),
        jnp.asarray(of["ref_logprobs"]) if has_kl else None,
        None,
        jnp.broadcast_to(of["advantages"][:, None], of["logprobs"].shape),
        None,
        importance=jnp.asarray(of["importance"]) if name == "grpo_importance" else None,
        kl_weights=jnp.full(of["logprobs"].shape, made.KL_COEF) if has_kl else None,
    )


@pytest.mark.parametrize("batch", made.SCALES)
@pytest.mark.parametrize("name", made.LOSSES)
def test_policy_loss(name, batch):
    of = {
        part: GOLDEN[f"{batch}/{part}"] for part in ("prompt_lengths", "lengths", "advantages", *made.TABLES)
    }
    algorithm, options = SETTINGS[name]
    settings, batch_of = (
        ALGORITHM_SECTIONS[algorithm](**options),
        policy_batch(of, name),
    )
    forward = blank_forward()._replace(
        logprobs=lambda params, frozen, rows: params["policy"], longest=made.LONGEST
    )

    def objective(said):
        terms, _ = ALGORITHMS[algorithm].loss(forward, {"policy": said}, {}, batch_of, settings)
        return sum(term.coef * term.mean.value for term in terms.values())

    said = tuple(jnp.asarray(of[table]) for table in ("logprobs", "entropy"))
    value, gradients = jax.jit(jax.value_and_grad(objective))(said)
    expected = float(GOLDEN[f"{batch}/{name}/value"])
    assert abs(value - expected) <= VALUE * max(1, abs(expected))
    for table, gradient in zip(("logprobs", "entropy"), gradients, strict=True):
        if (key := f"{batch}/{name}/{table}") not in GOLDEN:
            assert not np.any(gradient)
            continue
        norm = np.linalg.norm(GOLDEN[key])
        assert norm > 0
        assert np.linalg.norm(gradient - GOLDEN[key]) <= GRADIENT * norm
