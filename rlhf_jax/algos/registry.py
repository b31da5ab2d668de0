"""The algorithms by name."""

from __future__ import annotations

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.distill import DISTILL
from rlhf_jax.algos.dpo import DPO
from rlhf_jax.algos.grpo import GRPO
from rlhf_jax.algos.kto import KTO
from rlhf_jax.algos.online_dpo import ONLINE_DPO
from rlhf_jax.algos.ppo import PPO
from rlhf_jax.algos.raft import RAFT
from rlhf_jax.algos.reference_free import ORPO, SIMPO
from rlhf_jax.algos.reward_model import REWARD_MODEL
from rlhf_jax.algos.sft import SFT
from rlhf_jax.algos.trpo import TRPO

ALGORITHMS: dict[str, Algorithm] = {
    "sft": SFT,
    "reward_model": REWARD_MODEL,
    "ppo": PPO,
    "trpo": TRPO,
    # The same mathematics; their sections have other defaults.
    "grpo": GRPO,
    "dr_grpo": GRPO,
    "dapo": GRPO,
    "gspo": GRPO,
    "rloo": GRPO,
    "reinforce": GRPO,
    "reinforce_pp": GRPO,
    "remax": GRPO,
    "dpo": DPO,
    "cdpo": DPO,
    "robust_dpo": DPO,
    "ipo": DPO,
    "slic": DPO,
    "kto": KTO,
    "simpo": SIMPO,
    "cpo": SIMPO,
    "orpo": ORPO,
    "online_dpo": ONLINE_DPO,
    "raft": RAFT,
    "distill": DISTILL,
}
