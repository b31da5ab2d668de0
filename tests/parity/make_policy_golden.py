"""Makes golden/policy.npz: losses and gradients of TRL's GRPO and RLOO trainers, for test_policy_losses.py.

    python -m tests.parity.make_policy_golden    # with torch and trl, which the project does not have

The trainers' own loss methods run in float64, on trainers that are nothing but their settings and a model
that says what a table holds. Three batches: usual log-probabilities, sharp ones, and ones so extreme that
most ratios are far outside of every clip. Completions are ragged, and the first one has a single token.

Where TRL has another convention, ours is set here:

* Its loss type `dapo` divides by the tokens of a whole generation batch: that is this batch.
* Its importance weights belong to samples of vLLM: it is told that these are.

Seen with torch 2.13.0, trl 1.16.0.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "policy.npz"
SCALES = {"usual": 0.1, "sharp": 0.5, "extreme": 4.0}
"""Of each batch: nats between two policies' log-probabilities of a token, about."""
ROWS, COLUMNS, LONGEST = 6, 10, 8
CLIP, CLIP_HIGH, DUAL_CLIP, KL_COEF, ENTROPY_COEF = 0.2, 0.28, 3.0, 0.04, 0.01
LOSSES = {
    "grpo": {"loss_type": "grpo", "beta": KL_COEF},
    "grpo_clipped_twice": {"loss_type": "grpo", "delta": DUAL_CLIP},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": KL_COEF},
    "dapo": {"loss_type": "dapo", "epsilon_high": CLIP_HIGH},
    "dapo_entropy": {"loss_type": "dapo", "epsilon_high": CLIP_HIGH, "_entropy_bonus_enabled": True},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": KL_COEF},
    "grpo_importance": {
        "loss_type": "grpo",
        "beta": KL_COEF,
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
    },
    "rloo": {},
}
TABLES = ("logprobs", "entropy", "old_logprobs", "ref_logprobs", "importance")


def tables(scale: float, seed: int) -> dict[str, np.ndarray]:
    """Returns ragged rows, advantages of their completions, and what policies say of each token."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, COLUMNS)
    prompts = rng.integers(1, 4, ROWS)
    logprobs = -10 * scale * rng.exponential(size=shape)

    def near(factor: float) -> np.ndarray:
        return np.float32(logprobs + factor * scale * rng.uniform(-1, 1, shape))

    return {
        "prompt_lengths": prompts,
        "lengths": prompts + np.array([1, *rng.integers(2, COLUMNS - 3, ROWS - 1)]),
        "logprobs": np.float32(logprobs),
        "old_logprobs": near(1),
        "ref_logprobs": near(2),
        "entropy": np.float32(rng.exponential(size=shape)),
        "importance": np.float32(rng.uniform(0.3, 2, shape)),
        "advantages": np.float32(rng.normal(size=ROWS)),
    }


def completion_mask(of: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the completions' places in right-padded rows, bool[B, T]."""
    columns = np.arange(COLUMNS)
    return (columns >= of["prompt_lengths"][:, None]) & (columns < of["lengths"][:, None])


def trainer(cls: type, settings: dict[str, object], model: object) -> object:
    """Returns a trainer that has these settings and nothing else."""
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    args = {"delta": settings.get("delta"), "use_bias_correction_kl": False, "steps_per_generation": 1}
    usual = {
        "accelerator": accelerator,
        "args": SimpleNamespace(**args),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": model,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": CLIP,
        "epsilon_high": CLIP,
        "max_completion_length": LONGEST,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "entropy_coef": ENTROPY_COEF,
    }
    made = object.__new__(cls)
    for name, value in (usual | settings).items():
        setattr(made, name, value)
    return made


def losses(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns values, and gradients by log-probability and entropy of each token, of every loss."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    mask = completion_mask(of)
    known = {name: torch.from_numpy(np.float64(of[name])) for name in (*TABLES, "advantages")}
    kept = torch.from_numpy(np.float64(mask))
    inputs = {
        "prompt_ids": torch.zeros((ROWS, 0), dtype=torch.long),
        "prompt_mask": torch.zeros((ROWS, 0), dtype=torch.long),
        "completion_ids": torch.zeros((ROWS, COLUMNS), dtype=torch.long),
        "completion_mask": kept,
        "advantages": known["advantages"],
        "old_per_token_logps": known["old_logprobs"],
        "ref_per_token_logps": known["ref_logprobs"],
        "importance_sampling_ratio": known["importance"],
        "old_logps": (known["old_logprobs"] * kept).sum(1),
        "num_items_in_batch": kept.sum(),
    }
    found = {}
    for name, settings in LOSSES.items():
        said = [known[table].clone().requires_grad_() for table in ("logprobs", "entropy")]
        cls = RLOOTrainer if name == "rloo" else GRPOTrainer
        made = trainer(cls, settings, lambda *_, said=said, **__: (*said, None))
        value = made._compute_loss(None, inputs)
        gradients = torch.autograd.grad(value, said, allow_unused=True)
        found[f"{name}/value"] = np.float64(value.detach())
        for table, gradient in zip(("logprobs", "entropy"), gradients, strict=True):
            if gradient is not None:
                found[f"{name}/{table}"] = gradient.numpy()
    return found


if __name__ == "__main__":
    golden = {}
    for seed, (name, scale) in enumerate(SCALES.items()):
        of = tables(scale, seed)
        found = losses(of)
        golden |= {f"{name}/{part}": x for part, x in (of | found).items()}
        print(name, {part: round(float(x), 4) for part, x in found.items() if x.ndim == 0})
    np.savez_compressed(GOLDEN, **golden)
