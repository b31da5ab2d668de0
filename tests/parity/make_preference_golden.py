"""Makes golden/preference.npz: losses and gradients of TRL's preference trainers, for test_preference.py.

    python -m tests.parity.make_preference_golden    # with torch and trl, which the project does not have

The trainers' own loss methods run, on trainers that are nothing but their settings and a model that says what
a table holds. Three batches: usual log-probabilities, sharp ones, and ones so extreme that sigmoids saturate.

Where TRL has another convention, ours is set here:

* Label smoothing of DPO (cDPO), and IPO on sums, TRL's DPO trainer does not have: they come from the same
  formulas in its CPO trainer, which is given log ratios in place of log-probabilities.
* ORPO's likelihood term counts prompts too: here prompts have one token, which nothing predicts.

Seen with torch 2.13.0, trl 1.16.0.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "preference.npz"
SCALES = {"usual": 1.0, "sharp": 6.0, "extreme": 60.0}
"""Of each batch: nats of a token's log-probability, about."""
PAIRS, COLUMNS, WORDS = 3, 9, 6
BETA, SMOOTHING, GAMMA, NLL_COEF, ODDS_RATIO_COEF = 0.1, 0.2, 0.7, 0.4, 0.3
DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 1.2, 0.7


def tables(scale: float, seed: int) -> dict[str, np.ndarray]:
    """Returns ragged rows, chosen and rejected in turn, and what two models say of their tokens."""
    rng = np.random.default_rng(seed)
    shape = (2 * PAIRS, COLUMNS)
    prompts = rng.integers(1, 4, 2 * PAIRS)
    logprobs = -scale * rng.exponential(size=shape)
    return {
        "prompt_lengths": prompts,
        "lengths": prompts + rng.integers(1, COLUMNS - 3, 2 * PAIRS),
        "tokens": rng.integers(0, WORDS, shape),
        "logprobs": np.float32(logprobs),
        "ref_logprobs": np.float32(np.minimum(logprobs + 0.4 * scale * rng.normal(size=shape), 0)),
        "logits": np.float32(scale * rng.normal(size=(*shape, WORDS))),
        "other_logprobs": np.float32(logprobs[::-1]),
        "other_ref_logprobs": np.float32(logprobs[::-1] - 0.02 * scale),
        "is_desirable": np.arange(2 * PAIRS) % 3 > 0,
    }


def trainer(cls: type, **settings: object) -> object:
    """Returns a trainer that has these settings and nothing else."""
    import torch

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    made = object.__new__(cls)
    usual = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (usual | settings).items():
        setattr(made, name, value)
    return made


def says(logprobs_of: dict[int, object]) -> object:
    """Returns a model that gives log-probabilities, known by where its tokens are, 0 without a label."""
    import torch

    def model(input_ids, labels, **_):
        known = logprobs_of[input_ids.data_ptr()]
        zeros = torch.zeros(known.shape)
        return SimpleNamespace(
            log_probs=known * (labels[:, 1:] != -100),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    return model


def masks(of: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (attention mask, completion mask) of right-padded rows."""
    columns = np.arange(COLUMNS)
    attention = columns < of["lengths"][:, None]
    return attention, attention & (columns >= of["prompt_lengths"][:, None])


def apart(x: np.ndarray) -> np.ndarray:
    """Returns rows in TRL's order, all chosen before all rejected."""
    return np.concatenate([x[::2], x[1::2]])


def in_turn(x: np.ndarray) -> np.ndarray:
    """Returns rows in our order."""
    return np.stack([x[:PAIRS], x[PAIRS:]], axis=1).reshape(x.shape)


def with_reference(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns values and gradients, by per-token log-probability, of the losses of pairs with a reference."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

    attention, completion = (torch.from_numpy(apart(mask)) for mask in masks(of))
    ref = torch.from_numpy(apart(of["ref_logprobs"]))[:, 1:]
    ref_sums = (ref * completion[:, 1:]).sum(1)
    tokens = torch.from_numpy(apart(of["tokens"]))
    inputs = {
        "input_ids": tokens,
        "attention_mask": attention,
        "completion_mask": completion.long(),
        "ref_chosen_logps": ref_sums[:PAIRS],
        "ref_rejected_logps": ref_sums[PAIRS:],
    }

    def by_dpo(loss_type):
        dpo = trainer(
            DPOTrainer,
            loss_types=[loss_type],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
        )
        return lambda logprobs: dpo._compute_loss(says({tokens.data_ptr(): logprobs}), inputs, False)

    def by_cpo(loss_type):
        cpo = trainer(CPOTrainer, loss_type=loss_type, alpha=0.0)

        def loss(logprobs):
            ratios = (logprobs * completion[:, 1:]).sum(1) - ref_sums
            return cpo.cpo_loss(ratios[:PAIRS], ratios[PAIRS:])[0].mean()

        return loss

    losses = {name: by_dpo(name) for name in ("sigmoid", "robust", "ipo", "hinge", "sigmoid_norm")}
    losses |= {"sigmoid_smoothed": by_cpo("sigmoid"), "ipo_summed": by_cpo("ipo")}
    found = {}
    for name, loss in losses.items():
        logprobs = torch.from_numpy(apart(of["logprobs"]))[:, 1:].clone().requires_grad_()
        value = loss(logprobs)
        (gradient,) = torch.autograd.grad(value, logprobs)
        found |= {f"{name}/value": value.detach().numpy()}
        found |= {f"{name}/gradient": np.pad(in_turn(gradient.numpy()), ((0, 0), (1, 0)))}
    return found


def without_pairs(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns value and gradient of KTO's loss, and its reference point."""
    import torch
    from trl.trainer.kto_trainer import KTOTrainer

    attention, completion = (torch.from_numpy(mask) for mask in masks(of))
    tokens, other_tokens = torch.from_numpy(of["tokens"]), torch.from_numpy(of["tokens"].copy())

    def sums(name):
        return (torch.from_numpy(of[name])[:, 1:] * completion[:, 1:]).sum(1)

    batch = {
        "input_ids": tokens,
        "attention_mask": attention,
        "completion_mask": completion.long(),
        "KL_input_ids": other_tokens,
        "KL_attention_mask": attention,
        "KL_completion_mask": completion.long(),
        "label": torch.from_numpy(of["is_desirable"]),
        "ref_logps": sums("ref_logprobs"),
        "ref_KL_logps": sums("other_ref_logprobs"),
    }
    kto = trainer(
        KTOTrainer,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=DESIRABLE_WEIGHT,
        undesirable_weight=UNDESIRABLE_WEIGHT,
    )
    logprobs = torch.from_numpy(of["logprobs"])[:, 1:].clone().requires_grad_()
    other = torch.from_numpy(of["other_logprobs"])[:, 1:].clone().requires_grad_()
    model = says({tokens.data_ptr(): logprobs, other_tokens.data_ptr(): other})
    value = kto._compute_loss(model, batch, False)
    (gradient,) = torch.autograd.grad(value, logprobs)
    return {
        "kto/value": value.detach().numpy(),
        "kto/gradient": np.pad(gradient.numpy(), ((0, 0), (1, 0))),
        "kto/kl": np.float32(kto._metrics["train"]["kl"][0]),
    }


def without_reference(of: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns values and gradients, by logit, of the losses of pairs without a reference."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    def batch(of):
        attention, completion = masks(of)
        labels = np.where(completion, of["tokens"], -100)
        parts = {"input_ids": of["tokens"], "attention_mask": np.int64(attention), "labels": labels}
        return {
            f"{name}_{part}": torch.from_numpy(x[k::2])
            for part, x in parts.items()
            for k, name in enumerate(("chosen", "rejected"))
        }

    cpo = {"alpha": 0.0, "simpo_gamma": GAMMA, "is_encoder_decoder": False, "pad_token_id": 0}
    prompts = dict(of, prompt_lengths=np.ones_like(of["prompt_lengths"]))
    orpo = trainer(ORPOTrainer, beta=ODDS_RATIO_COEF, is_encoder_decoder=False, padding_value=0)
    made = {
        "simpo": (trainer(CPOTrainer, loss_type="simpo", cpo_alpha=0.0, **cpo), of),
        "cpo": (trainer(CPOTrainer, loss_type="sigmoid", cpo_alpha=NLL_COEF, **cpo), of),
        "orpo": (orpo, prompts),
    }
    found = {}
    for name, (made_trainer, of_name) in made.items():
        logits = torch.from_numpy(apart(of["logits"])).requires_grad_()

        def model(*_, logits=logits, **__):
            return SimpleNamespace(logits=logits)

        value, _ = made_trainer.get_batch_loss_metrics(model, batch(of_name))
        (gradient,) = torch.autograd.grad(value, logits)
        found |= {
            f"{name}/value": value.detach().numpy(),
            f"{name}/gradient": in_turn(gradient.numpy()),
        }
    return found


if __name__ == "__main__":
    golden = {}
    for seed, (name, scale) in enumerate(SCALES.items()):
        of = tables(scale, seed)
        found = with_reference(of) | without_pairs(of) | without_reference(of)
        golden |= {f"{name}/{part}": x for part, x in (of | found).items()}
        print(name, {part: round(float(x), 4) for part, x in found.items() if x.ndim == 0})
    np.savez_compressed(GOLDEN, **golden)
