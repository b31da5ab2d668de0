"""The optimiser: clipping by global norm, AdamW, a learning-rate schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.batch import Params
from rlhf_jax.config import OptimizerConfig

UNDECAYED = (
    "scale",
    "bias",
)  # leaf names; layers are stacked, so the rank does not tell a norm from a matrix


def make_schedule(cfg: OptimizerConfig, num_steps: int, learning_rate: float | None = None) -> optax.Schedule:
    """Returns the learning rate as a function of the optimiser steps already done, f32[].

    warm-up:    lr_n = lr (n + 1) / warmup_steps,   n < warmup_steps; the first step already moves
    after it:   lr_n = lr f(p),   p = (n - warmup_steps) / (num_steps - warmup_steps)
                f = 1 (constant), 1 - p (linear), (1 + cos(pi p)) / 2 (cosine)
    The decay reaches zero when all num_steps are done, so the last step still moves.

    Args:
        cfg: reads learning_rate, schedule, warmup_steps.
        num_steps: optimiser steps of the stage, over all epochs and minibatches.
        learning_rate: peak, instead of the section's; a value model may have its own.

    Raises:
        ValueError: the warm-up is longer than the stage.
    """
    if cfg.warmup_steps > num_steps:
        raise ValueError(
            f"optimizer.warmup_steps is {cfg.warmup_steps}, but the stage makes only {num_steps} optimiser "
            f"steps; choose at most {num_steps}"
        )
    peak = cfg.learning_rate if learning_rate is None else learning_rate
    decay = {
        "constant": jnp.ones_like,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
    }[cfg.schedule]

    def schedule(count: ArrayLike) -> Array:
        done = jnp.asarray(count, jnp.float32)
        progress = (done - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
        warmup = (done + 1) / max(1, cfg.warmup_steps)
        return peak * jnp.where(done < cfg.warmup_steps, warmup, decay(jnp.clip(progress, 0.0, 1.0)))

    return schedule


def make_optimizer(
    cfg: OptimizerConfig, num_steps: int, learning_rate: float | None = None, *, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns clipping by global norm, then AdamW; the updates are for optax.apply_updates.

    g <- g min(1, max_grad_norm / ||g||)
    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
    update = -lr_n (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay w)

    Moments are float32. Leaves named scale or bias are not decayed. A gradient that is not finite gives
    updates that are not finite: `step.py` skips those. The norm before clipping is the caller's to log, with
    optax.tree.norm.

    Args:
        cfg: every field.
        num_steps: see make_schedule.
        learning_rate: see make_schedule.
        eps: where cfg.eps is 0.
    Source: arXiv:1711.05101 algorithm 2, but weight decay is multiplied by the learning rate, as in PyTorch.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(
            make_schedule(cfg, num_steps, learning_rate),
            b1=cfg.beta1,
            b2=cfg.beta2,
            eps=cfg.eps or eps,
            mu_dtype=jnp.float32,
            weight_decay=cfg.weight_decay,
            mask=decay_mask,
        ),
    )


def decay_mask(params: Params) -> Params:
    """Returns the structure of params with True on the leaves that weight decay applies to."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)
