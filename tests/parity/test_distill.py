"""The divergence of teacher and policy, and its gradient, against TRL's; see make_distill_golden.py."""

from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos.distill import loss
from rlhf_jax.batch import Rows
from rlhf_jax.models.forward import make_forward
from rlhf_jax.online_config import DistillConfig
from tests.parity import make_distill_golden as made

GOLDEN = np.load(made.GOLDEN)
GRADIENT = 1e-5
OF_DIFFERENCES = 2e-4
"""Of the reverse KL of extreme logits: its gradient, 1e-2, is a difference of log ratios of 1e2, of which one
digit in float32 is 8e-6; TRL in float32 is 6e-5 off, XLA without LLVM's passes 1.1e-4."""
MODEL = cast(
    Any,
    SimpleNamespace(
        architecture=SimpleNamespace(vocab_size=made.WORDS),
        hidden_of_roles=lambda trunk, adapters, tokens: (trunk,),
        hidden=lambda trunk, tokens: trunk,
        logits=lambda policy, hidden: hidden,
    ),
)
"""A model whose parameters are its logits [B, T, V]."""


@cache
def compiled(beta, temperature, chunk):
    """Returns the loss of a table of logits and its gradient, as the update computes them."""
    forward = make_forward(MODEL, made.COLUMNS - 2, temperature, chunk, teacher=MODEL)

    def objective(logits, teacher_logits, rows):
        params, frozen = {"policy": {"trunk": logits}}, {"teacher": {"trunk": teacher_logits}}
        terms, metrics = loss(forward, params, frozen, rows, DistillConfig(beta=beta))
        return terms["divergence"].mean.value, metrics

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("temperature", made.TEMPERATURES)
@pytest.mark.parametrize("beta", made.BETAS)
def test_divergences_are_as_in_trl(beta, temperature):
    chunk = 2 * made.ROWS if temperature != 1 else 0  # two columns at once, or all
    for name, of in made.batches().items():
        rows = Rows(*(jnp.asarray(of[key], jnp.int32) for key in ("tokens", "prompt_lengths", "lengths")))
        tables = of["logits"], of["teacher_logits"]
        (value, metrics), (gradient, of_teacher) = compiled(beta, temperature, chunk)(*tables, rows)
        case = made.key(name, beta, temperature)
        expected, theirs = GOLDEN[f"{case}/value"], GOLDEN[f"{case}/gradient"]
        assert abs(value - expected) <= 1e-5 * max(1, expected), name
        limit = OF_DIFFERENCES if (name, beta) == ("extreme", 1) else GRADIENT
        assert np.linalg.norm(gradient - theirs) <= limit * np.linalg.norm(theirs), name
        assert not np.any(of_teacher), name
        reverse = GOLDEN[f"{made.key(name, 1.0, temperature)}/value"]
        assert metrics["policy/teacher_kl"].value == pytest.approx(reverse, rel=1e-5)
