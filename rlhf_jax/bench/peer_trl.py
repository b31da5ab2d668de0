"""The steps of TRL's trainers; PPO is that of TRL 1.12, the last that has it.

With completions of different lengths PPO's later passes know the ends, but go over rows of the full length
all the same; GRPO's go over rows as long as the longest. GRPO prefills a prompt for each of its completions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset
from peer_models import (
    LEARNING_RATE,
    PAD,
    STOP,
    Cut,
    as_text,
    llama_config,
    random_rows,
    text_reward,
    turns,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

Options = dict[str, Any]


def train(job: dict[str, Any]) -> None:
    """Trains; ends when there are no further lines."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    turn = turns()

    class Turns(TrainerCallback):
        """Waits after every step."""

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
            if next(turn, None) is None:
                raise SystemExit

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": job["batch"],
            "learning_rate": LEARNING_RATE,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "seed": 0,
        }
        rest = {"processing_class": word_tokenizer(job), "callbacks": [Turns()]}
        trainer = TRAINERS[job["task"]](job, settings, rest)
        next(turn)
        trainer.train()


def language_model(job: dict[str, Any]) -> Any:
    """Returns a Llama on random weights."""
    return AutoModelForCausalLM.from_config(llama_config(job))


def scorer(job: dict[str, Any]) -> Any:
    """Returns the same with a score head."""
    return AutoModelForSequenceClassification.from_config(llama_config(job, num_labels=1))


def sft_step(job: dict[str, Any], settings: Options, rest: Options) -> Any:
    """Returns the trainer of rows whose completions carry loss."""
    from trl import SFTConfig, SFTTrainer

    prompt, new, count = job["prompt"], job["new"], job["batch"] * job["steps"]
    rows = random_rows(job, count, prompt + new, 0).tolist()
    mask = [[0] * prompt + [1] * new] * count
    trainer = SFTTrainer(
        language_model(job),
        args=SFTConfig(
            **settings, max_steps=job["steps"], max_length=prompt + new, completion_only_loss=True
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": mask}),
        **rest,
    )
    (example,) = next(iter(trainer.get_train_dataloader()))["labels"][:1]
    assert (example != -100).sum() == new and len(example) == prompt + new, example
    return trainer


def reward_step(job: dict[str, Any], settings: Options, rest: Options) -> Any:
    """Returns the trainer of a reward model on pairs."""
    from trl import RewardConfig, RewardTrainer

    length, count = job["prompt"] + job["new"], job["batch"] * job["steps"]
    sides = {
        f"{name}_ids": random_rows(job, count, length, seed).tolist()
        for seed, name in enumerate(("chosen", "rejected"))
    }
    return RewardTrainer(
        scorer(job),
        args=RewardConfig(**settings, max_steps=job["steps"], max_length=length),
        train_dataset=Dataset.from_dict(sides),
        **rest,
    )


def dpo_step(job: dict[str, Any], settings: Options, rest: Options) -> Any:
    """Returns DPO's trainer on pairs; it appends a stop token to completions."""
    from trl import DPOConfig, DPOTrainer

    prompt, new, count = job["prompt"], job["new"], job["batch"] * job["steps"]
    columns = {"prompt": prompt, "chosen": new - 1, "rejected": new - 1}
    texts = {
        name: as_text(random_rows(job, count, length, seed), "w")
        for seed, (name, length) in enumerate(columns.items())
    }
    texts |= {name: [" " + text for text in texts[name]] for name in ("chosen", "rejected")}
    cached = job["cached_reference"]
    trainer = DPOTrainer(
        language_model(job),
        ref_model=None if cached else language_model(job),
        args=DPOConfig(
            **settings,
            max_steps=job["steps"],
            max_length=prompt + new,
            precompute_ref_log_probs=cached,
            precompute_ref_batch_size=job["batch"],
        ),
        train_dataset=Dataset.from_dict(texts),
        **rest,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (2 * job["batch"], prompt + new), batch["input_ids"].shape
    assert (batch["completion_mask"].sum(dim=1) == new).all() and batch["attention_mask"].all(), batch
    assert ("ref_chosen_logps" in batch) == cached
    return trainer


def grpo_step(job: dict[str, Any], settings: Options, rest: Options) -> Any:
    """Returns GRPO's trainer; each step samples, judges and makes one update."""
    from trl import GRPOConfig, GRPOTrainer

    prompt, new = job["prompt"], job["new"]
    count = job["batch"] // job["group_size"] * job["steps"]
    language_model(job).save_pretrained(settings["output_dir"])  # the reference is loaded from there as well
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(settings["output_dir"], dtype=torch.float32),
        reward_funcs=text_reward,
        args=GRPOConfig(
            **settings,
            max_steps=job["steps"],
            num_generations=job["group_size"],
            max_completion_length=new,
            generation_kwargs={"min_new_tokens": new},
            temperature=1.0,
            num_iterations=1,
            beta=0.04,
            loss_type="grpo",
        ),
        train_dataset=Dataset.from_dict({"prompt": as_text(random_rows(job, count, prompt, 0), "w")}),
        **rest,
    )
    assert trainer.ref_model is not None and trainer.ref_model.dtype == torch.float32
    made, cut = trainer._generate_single_turn, Cut(job)

    def generate(prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        assert [len(row) for row in prompt_ids] == [prompt] * job["batch"], prompt_ids
        completions, logprobs = made(prompt_ids, *rest, **options)
        return [[int(token) for token in row] for row in cut(completions)], logprobs

    trainer._generate_single_turn = generate
    return trainer


def train_step(job: dict[str, Any], settings: Options, rest: Options) -> Any:
    """Returns PPO's trainer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    batch, prompt, count = job["batch"], job["prompt"], job["batch"] * job["steps"]
    if job["lengths"]:
        ppo_trainer.batch_generation = cut_at_lengths(job, ppo_trainer.batch_generation)
    data = Dataset.from_dict({"input_ids": random_rows(job, count, prompt, 0).tolist()})
    return PPOTrainer(
        PPOConfig(
            **settings,
            total_episodes=count,
            num_ppo_epochs=job["epochs"],
            num_mini_batches=job["minibatches"],
            response_length=job["new"],
            temperature=1.0,
            num_sample_generations=0,
            stop_token_id=STOP if job["lengths"] else None,
            local_rollout_forward_batch_size=batch,
        ),
        model=language_model(job),
        ref_model=language_model(job),
        reward_model=scorer(job),
        value_model=scorer(job),
        train_dataset=data,
        eval_dataset=data.select(range(batch)),
        **rest,
    )


def cut_at_lengths(job: dict[str, Any], made: Callable[..., Any]) -> Callable[..., Any]:
    """Returns PPO's `batch_generation` with completions of the job's lengths and padding behind them."""
    cut = Cut(job)

    def batch_generation(model: Any, queries: Any, *rest: Any) -> Any:
        rows, logits = made(model, queries, *rest)
        completions = rows[:, queries.shape[1] :]
        for row, words in zip(completions, cut(completions.numpy()), strict=True):
            row[:] = PAD
            row[: len(words)] = torch.from_numpy(words)
        return rows, logits

    return batch_generation


TRAINERS: dict[str, Callable[[dict[str, Any], Options, Options], Any]] = {
    "sft_step": sft_step,
    "reward_step": reward_step,
    "dpo_step": dpo_step,
    "grpo_step": grpo_step,
    "train_step": train_step,
}
