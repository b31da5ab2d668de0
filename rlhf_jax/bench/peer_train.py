"""Trains with another library, a step whenever it is told to; a script for the Python that has it.

It imports nothing of rlhf_jax. The first line of stdin is the job as JSON; each further one lets the
library's own trainer make one more step, which is answered with a line `peer: done`. All in float32, tied
embeddings, AdamW with clipping at 1, no recomputation, random tokens.

TRL's PPO is that of TRL 1.12, the last that has it. Completions of different lengths are forced: what its
rollout has made, which goes on until the longest row of the batch ends, is cut here to the rows' lengths,
with a stop token at their ends; of each batch, one row has the most tokens. The later passes know the ends,
but go over rows of the full length all the same.
Tunix's completions are cut in the same way. Its learner pads them to the full length again, so that its time
does not depend on their lengths either. It adds up the gradients of an epoch's minibatches and makes one
optimiser step of them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from peer_models import (
    FIRST_WORD,
    PAD,
    STOP,
    Words,
    llama_config,
    tunix_llama,
    turns,
    word_tokenizer,
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

LEARNING_RATE = 1e-6


def random_rows(job: dict[str, Any], count: int, length: int, seed: int) -> Any:
    """Returns [count, length] random tokens."""
    import numpy as np

    return np.random.default_rng(seed).integers(FIRST_WORD, job["vocab_size"], (count, length), np.int32)


def tell_lengths(job: dict[str, Any], turn: int, lengths: Any) -> None:
    """Says on stderr how long the completions of a turn are: as long as they had to be."""
    assert lengths == job["lengths"][turn], (turn, lengths)
    print(f"{sys.argv[1]}: completions of {sum(lengths) / len(lengths):.1f} tokens", file=sys.stderr)


def with_trl(job: dict[str, Any]) -> None:
    """Trains with TRL; ends when there are no further lines."""
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    batch, prompt, new = job["batch"], job["prompt"], job["new"]
    length, count = prompt + new, job["batch"] * job["steps"]
    turn = turns()

    class Turns(TrainerCallback):
        """Waits after every step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if next(turn, None) is None:
                raise SystemExit

    def language_model() -> Any:
        return AutoModelForCausalLM.from_config(llama_config(job))

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_config(llama_config(job, num_labels=1))

    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
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
    if job["task"] == "sft_step":
        from trl import SFTConfig, SFTTrainer

        rows = random_rows(job, count, length, 0).tolist()
        mask = [[0] * prompt + [1] * new] * count
        trainer = SFTTrainer(
            language_model(),
            args=SFTConfig(**settings, max_steps=job["steps"], max_length=length, completion_only_loss=True),
            train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": mask}),
            **rest,
        )
        (example,) = next(iter(trainer.get_train_dataloader()))["labels"][:1]
        assert (example != -100).sum() == new and len(example) == length, example
    elif job["task"] == "reward_step":
        from trl import RewardConfig, RewardTrainer

        sides = {
            f"{name}_ids": random_rows(job, count, length, seed).tolist()
            for seed, name in enumerate(("chosen", "rejected"))
        }
        trainer = RewardTrainer(
            scorer(),
            args=RewardConfig(**settings, max_steps=job["steps"], max_length=length),
            train_dataset=Dataset.from_dict(sides),
            **rest,
        )
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        if job["lengths"]:
            ppo_trainer.batch_generation = cut_at_lengths(job, ppo_trainer.batch_generation)
        data = Dataset.from_dict({"input_ids": random_rows(job, count, prompt, 0).tolist()})
        trainer = PPOTrainer(
            PPOConfig(
                **settings,
                total_episodes=count,
                num_ppo_epochs=job["epochs"],
                num_mini_batches=job["minibatches"],
                response_length=new,
                temperature=1.0,
                num_sample_generations=0,
                stop_token_id=STOP if job["lengths"] else None,
                local_rollout_forward_batch_size=batch,
            ),
            model=language_model(),
            ref_model=language_model(),
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=data,
            eval_dataset=data.select(range(batch)),
            **rest,
        )
    next(turn)
    trainer.train()


def cut_at_lengths(job: dict[str, Any], made: Callable[..., Any]) -> Callable[..., Any]:
    """Returns TRL's `batch_generation` with a stop token at the end of each completion and padding behind."""
    import torch

    lengths, columns = iter(enumerate(job["lengths"])), torch.arange(job["new"])

    def batch_generation(model: Any, queries: Any, *rest: Any) -> Any:
        rows, logits = made(model, queries, *rest)
        completions = rows[:, queries.shape[1] :]
        assert completions.shape[1] == job["new"], completions.shape
        turn, ends = next(lengths)
        last = torch.tensor(ends)[:, None] - 1
        words = completions.clamp(min=FIRST_WORD)
        completions[:] = torch.where(columns < last, words, torch.where(columns == last, STOP, PAD))
        tell_lengths(job, turn, (completions != PAD).sum(dim=1).tolist())
        return rows, logits

    return batch_generation


def with_tunix(job: dict[str, Any]) -> None:
    """Trains with Tunix; ends when there are no further lines."""
    import jax
    import numpy as np
    import optax
    import tunix
    from flax import nnx
    from tunix.sft import utils
    from tunix.sft.peft_trainer import TrainingInput

    batch, prompt, length = job["batch"], job["prompt"], job["prompt"] + job["new"]
    # Not jax.make_mesh: its axes are Explicit, and Tunix stops at them.
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))

    def adamw() -> Any:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))

    if job["task"] == "sft_step":
        trainer = tunix.PeftTrainer(
            tunix_llama(job),
            adamw(),
            tunix.TrainingConfig(
                eval_every_n_steps=10**9, max_steps=job["steps"] + 1, max_inflight_computations=1
            ),
        )
        whole = np.ones((batch, length), np.int32)
        trainer = trainer.with_gen_model_input_fn(
            lambda rows: {
                "input_tokens": rows.input_tokens,
                "input_mask": rows.input_mask,
                "positions": utils.build_positions_from_mask(whole),
                "attention_mask": utils.make_causal_attn_mask(whole),
            }
        )
        carries_loss = np.arange(length) >= np.full((batch, 1), prompt)

        def batches() -> Iterator[Any]:  # the next is asked for while the step still runs
            for turn in turns(lambda: jax.block_until_ready(nnx.state(trainer.model))):
                yield TrainingInput(
                    input_tokens=random_rows(job, batch, length, turn),
                    input_mask=carries_loss.astype(np.int32),
                )

        with mesh:
            trainer.train(batches())
    else:
        learner = tunix_ppo(job, mesh, adamw)
        trainers = learner.rl_cluster.actor_trainer, learner.rl_cluster.critic_trainer

        def prompts() -> Iterator[Any]:  # as well
            for turn in turns(lambda: jax.block_until_ready([nnx.state(each.model) for each in trainers])):
                rows = random_rows(job, batch, prompt, turn)
                yield {"prompts": np.array([" ".join(map(str, row)) for row in rows])}

        with mesh:
            learner.train(prompts())


def tunix_ppo(job: dict[str, Any], mesh: Any, adamw: Callable[[], Any]) -> Any:
    """Returns Tunix's PPO learner, with a reward model and completions of the job's lengths."""
    import numpy as np
    import tunix
    from flax import nnx
    from tunix.rl import rl_cluster
    from tunix.rl.rollout import base_rollout

    class Scorer(nnx.Module):
        """A Llama with a score head instead of the LM head; Tunix has none ready."""

        def __init__(self, seed: int) -> None:
            self.body = tunix_llama(job, seed)
            self.config = self.body.config
            self.score = nnx.Linear(job["hidden_size"], 1, use_bias=False, rngs=nnx.Rngs(seed))

        def __call__(
            self, input_tokens: Any, positions: Any, cache: Any = None, attention_mask: Any = None, **_: Any
        ) -> Any:
            x = self.body.embedder.encode(input_tokens)
            for layer in self.body.layers:
                _, x = layer(x, positions, None, attention_mask)
            return self.score(self.body.final_norm(x))

    batch, prompt, new = job["batch"], job["prompt"], job["new"]
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=tunix_llama(job),
        reference=tunix_llama(job),
        critic=Scorer(1),
        reward=Scorer(2),
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (roles.ACTOR, roles.ROLLOUT, roles.REFERENCE, roles.CRITIC, roles.REWARD), mesh
            ),
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=adamw(),
                critic_optimizer=adamw(),
                eval_every_n_steps=10**9,
                max_steps=10**6,
                mini_batch_size=batch,
                train_micro_batch_size=batch // job["minibatches"],
                rollout_micro_batch_size=batch,
                compute_logps_micro_batch_size=batch,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=new,
                max_prompt_length=prompt,
                kv_cache_size=prompt + new,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[job["vocab_size"] + 7],  # none
            ),
        ),
    )
    if job["lengths"]:
        lengths, made = iter(enumerate(job["lengths"])), cluster.rollout.generate

        def generate(*args: Any, **options: Any) -> Any:
            found = made(*args, **options)
            assert all(len(row) == new for row in found.tokens), [len(row) for row in found.tokens]
            turn, ends = next(lengths)
            words = [np.maximum(row, FIRST_WORD) for row in found.tokens]
            found.tokens = [np.append(row[: end - 1], STOP) for row, end in zip(words, ends, strict=True)]
            tell_lengths(job, turn, [len(row) for row in found.tokens])
            return found

        cluster.rollout.generate = generate
    return tunix.PPOLearner(cluster, tunix.PPOConfig(num_iterations=job["epochs"], beta=0.05))


if __name__ == "__main__":
    {"trl": with_trl, "tunix": with_tunix}[sys.argv[1]](json.loads(sys.stdin.readline()))
