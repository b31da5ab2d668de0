"""Advantage estimation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.masking import keep


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float) -> tuple[Array, Array]:
    """Returns generalised advantages and the returns that the value model is fitted to.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns_t = A_t + V_t

    t + 1 is the next token that the mask names, however many columns lie between; V and A are 0 after the
    last.

    Args:
        rewards: f32[B, T].
        values: f32[B, T], of the state before token t.
        mask: bool[B, T], the tokens that the policy chose; what stands elsewhere is never read.
        gamma: discount per token.
        lam: 0 is the one-step error, 1 the discounted sum of rewards less the value.

    Returns:
        advantages and returns, f32[B, T], 0 where the mask is false.
    Source: arXiv:1506.02438 eq. 16. A truncated completion ends like a finished one (no bootstrap).
    """

    def step(
        after: tuple[Array, Array], column: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = after
        reward, value, chosen = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        here = jnp.where(chosen, value, next_value), jnp.where(chosen, advantage, next_advantage)
        return here, advantage

    nothing = jnp.zeros_like(values[:, 0])
    columns = keep(rewards, mask).T, keep(values, mask).T, mask.T
    _, advantages_TB = jax.lax.scan(step, (nothing, nothing), columns, reverse=True)
    advantages = keep(advantages_TB.T, mask)
    return advantages, keep(advantages + values, mask)
