"""Makes golden/distill.npz: TRL's divergences of teacher and student, for test_distill.py.

    python -m tests.parity.make_distill_golden    # with torch and trl, which the project does not have

Values and gradients, by the student's logits, of GKDTrainer.generalized_jsd_loss on ragged completions. Three
batches: usual logits, sharp ones, and ones so extreme that probabilities underflow. TRL computes in float64
here: in float32 its gradient of the reverse KL of the extreme ones is 6e-5 off.

Seen with torch 2.13.0, trl 1.16.0.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "distill.npz"
SCALES = {"usual": 1.0, "sharp": 6.0, "extreme": 60.0}
"""Deviation of the logits of each batch."""
BETAS = (0.0, 0.1, 0.5, 1.0)
TEMPERATURES = (1.0, 0.7)
ROWS, COLUMNS, WORDS = 3, 7, 5


def tables(scale: float, seed: int) -> dict[str, np.ndarray]:
    """Returns ragged rows, and the logits of teacher and student at each of their columns."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 4, ROWS)
    logits = scale * rng.normal(size=(ROWS, COLUMNS, WORDS))
    return {
        "prompt_lengths": prompts,
        "lengths": prompts + rng.integers(1, COLUMNS - 2, ROWS),
        "tokens": rng.integers(0, WORDS, (ROWS, COLUMNS)),
        "logits": np.float32(logits),
        "teacher_logits": np.float32(logits + 0.7 * scale * rng.normal(size=logits.shape)),
    }


def batches() -> dict[str, dict[str, np.ndarray]]:
    """Returns the tables of each batch by its name."""
    return {name: tables(scale, seed) for seed, (name, scale) in enumerate(SCALES.items())}


def key(name: str, beta: float, temperature: float) -> str:
    """Returns what the arrays of a case begin with."""
    return f"{name}/{beta}/{temperature}"


def by_trl(of: dict[str, np.ndarray], beta: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss f32[] and its gradient f32[B, T, V]."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    columns = np.arange(COLUMNS)
    is_completion = (columns >= of["prompt_lengths"][:, None]) & (columns < of["lengths"][:, None])
    labels = torch.from_numpy(np.where(is_completion, of["tokens"], -100))
    logits = torch.from_numpy(of["logits"]).double().requires_grad_()
    value = GKDTrainer.generalized_jsd_loss(
        student_logits=logits[:, :-1],
        teacher_logits=torch.from_numpy(of["teacher_logits"]).double()[:, :-1],
        labels=labels[:, 1:],
        beta=beta,
        temperature=temperature,
    )
    (gradient,) = torch.autograd.grad(value, logits)
    return np.float32(value.detach().numpy()), np.float32(gradient.numpy())


def main() -> None:
    """Writes the golden arrays."""
    found = {}
    for (name, of), beta, temperature in itertools.product(batches().items(), BETAS, TEMPERATURES):
        value, gradient = by_trl(of, beta, temperature)
        case = key(name, beta, temperature)
        found |= {f"{case}/value": value, f"{case}/gradient": gradient}
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
