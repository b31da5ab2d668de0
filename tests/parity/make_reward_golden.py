"""Makes golden/reward.npz: losses of TRL's RewardTrainer and their gradients, for test_reward_losses.py.

    python -m tests.parity.make_reward_golden     # with torch and trl, which the project has not

The loss is written inline in RewardTrainer.compute_loss, so that is called, with a model that says given
scores. Seen with trl 1.16.0, torch 2.13.0.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "reward.npz"
NUM_PAIRS, NUM_BATCHES = 7, 3
COEFFICIENTS = {"plain": None, "centred": 0.01, "strongly_centred": 0.7}


def batch(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores of chosen and rejected completions and margins, f32[NUM_PAIRS] each; some extreme."""
    rng = np.random.default_rng(number)
    chosen, rejected = rng.normal(0.0, 2.0, (2, NUM_PAIRS))
    chosen[:3], rejected[:3] = (60.0, -300.0, 1e3), (-60.0, 300.0, 1e3)
    margins = rng.uniform(0.0, 3.0, NUM_PAIRS)
    margins[-1] = 0.0
    return chosen.astype(np.float32), rejected.astype(np.float32), margins.astype(np.float32)


def main() -> None:
    """Writes loss and gradients of every batch, with and without margins, centred and not."""
    import torch
    from trl import RewardTrainer

    def compute(number: int, *, has_margin: bool, coefficient: float | None) -> np.ndarray:
        chosen, rejected, margins = (torch.from_numpy(x) for x in batch(number))
        scores = torch.cat([chosen, rejected]).requires_grad_()
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(center_rewards_coefficient=coefficient),
            accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {"attention_mask": torch.ones(2 * NUM_PAIRS, 1)} | (
            {"margin": margins} if has_margin else {}
        )

        def model(**inputs: object) -> SimpleNamespace:
            return SimpleNamespace(logits=scores[:, None])

        loss = RewardTrainer.compute_loss(trainer, model, inputs)
        loss.backward()
        (accuracy,) = trainer._metrics["train"]["accuracy"]
        return np.asarray([loss.item(), accuracy, *scores.grad.numpy()], np.float32)

    golden = {
        f"{number}/{'margin' if has_margin else 'none'}/{name}": compute(
            number, has_margin=has_margin, coefficient=coefficient
        )
        for number in range(NUM_BATCHES)
        for has_margin in (False, True)
        for name, coefficient in COEFFICIENTS.items()
    }
    np.savez_compressed(GOLDEN, **golden)
    for name, numbers in golden.items():
        print(name, numbers)


if __name__ == "__main__":
    main()
