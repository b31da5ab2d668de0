"""The algorithms by name."""

from __future__ import annotations

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.ppo import PPO
from rlhf_jax.algos.reward_model import REWARD_MODEL
from rlhf_jax.algos.sft import SFT

ALGORITHMS: dict[str, Algorithm] = {"sft": SFT, "reward_model": REWARD_MODEL, "ppo": PPO}
