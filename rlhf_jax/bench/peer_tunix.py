"""The steps of Tunix's trainers.

With completions of different lengths its learners pad them to the full length again, so that their time
does not depend on their lengths. PPO's adds up the gradients of an epoch's minibatches and makes one
optimiser step of them; GRPO's prefills a prompt for each of its completions. DPO's trainer computes the
reference in each step, whatever the job says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import tunix
from flax import nnx
from peer_models import LEARNING_RATE, Cut, Words, as_text, random_rows, text_reward, tunix_llama, turns
from tunix.rl import rl_cluster
from tunix.rl.rollout import base_rollout
from tunix.sft import utils
from tunix.sft.dpo import dpo_trainer
from tunix.sft.peft_trainer import TrainingInput


def train(job: dict[str, Any]) -> None:
    """Trains; ends when there are no further lines."""
    # Not jax.make_mesh: its axes are Explicit, and Tunix stops at them.
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    match job["task"]:
        case "sft_step" | "dpo_step":
            trainer, batch = {"sft_step": sft_step, "dpo_step": dpo_step}[job["task"]](job)
            trainers = (trainer,)
        case "grpo_step":
            trainer = grpo_step(job, mesh)
            trainers, batch = (
                (trainer.rl_cluster.actor_trainer,),
                prompts_of(job, job["batch"] // job["group_size"]),
            )
        case "train_step":
            trainer = ppo_step(job, mesh)
            trainers = trainer.rl_cluster.actor_trainer, trainer.rl_cluster.critic_trainer
            batch = prompts_of(job, job["batch"])
        case task:
            raise SystemExit(f"Tunix has no {task}")

    def batches() -> Iterator[Any]:  # the next is asked for while the step still runs
        for turn in turns(lambda: jax.block_until_ready([nnx.state(each.model) for each in trainers])):
            yield batch(turn)

    with mesh:
        trainer.train(batches())


def adamw() -> optax.GradientTransformation:
    """Returns the optimiser of all models."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of a trainer that is given rows."""
    return {"eval_every_n_steps": 10**9, "max_steps": job["steps"] + 1, "max_inflight_computations": 1}


def sft_step(job: dict[str, Any]) -> tuple[Any, Callable[[int], Any]]:
    """Returns the trainer of rows whose completions carry loss, and the batch of each turn."""
    batch, prompt, length = job["batch"], job["prompt"], job["prompt"] + job["new"]
    trainer = tunix.PeftTrainer(tunix_llama(job), adamw(), tunix.TrainingConfig(**settings(job)))
    whole = np.ones((batch, length), np.int32)
    trainer = trainer.with_gen_model_input_fn(
        lambda rows: {
            "input_tokens": rows.input_tokens,
            "input_mask": rows.input_mask,
            "positions": utils.build_positions_from_mask(whole),
            "attention_mask": utils.make_causal_attn_mask(whole),
        }
    )
    carries_loss = (np.arange(length) >= np.full((batch, 1), prompt)).astype(np.int32)
    return trainer, lambda turn: TrainingInput(
        input_tokens=random_rows(job, batch, length, turn), input_mask=carries_loss
    )


def dpo_step(job: dict[str, Any]) -> tuple[Any, Callable[[int], Any]]:
    """Returns DPO's trainer, and the pairs of each turn."""
    batch, prompt, new = job["batch"], job["prompt"], job["new"]
    trainer = tunix.DPOTrainer(
        tunix_llama(job), tunix_llama(job), adamw(), tunix.DPOTrainingConfig(**settings(job))
    )
    prepared = trainer._prepare_inputs

    def checked(rows: Any) -> Any:
        found = prepared(rows)
        assert found.input_ids.shape == (2 * batch, prompt + new), found.input_ids.shape
        assert found.completion_mask.shape == (2 * batch, new) and found.logits_to_keep == new
        assert found.ref_chosen_logps.shape == found.ref_rejected_logps.shape == (batch,)
        return found

    trainer._prepare_inputs = checked

    def pairs(turn: int) -> Any:
        sides = {"prompt": prompt, "chosen": new, "rejected": new}
        rows = {
            f"{name}_ids": random_rows(job, batch, length, 3 * turn + i)
            for i, (name, length) in enumerate(sides.items())
        }
        masks = {f"{name}_mask": np.ones((batch, length), np.int32) for name, length in sides.items()}
        return dpo_trainer.TrainingInput(**rows, **masks)

    return trainer, pairs


def prompts_of(job: dict[str, Any], count: int) -> Callable[[int], Any]:
    """Returns the prompts of each turn."""
    return lambda turn: {"prompts": np.array(as_text(random_rows(job, count, job["prompt"], turn)))}


def grpo_step(job: dict[str, Any], mesh: Any) -> Any:
    """Returns GRPO's learner; each step samples, judges and makes one update."""
    num_prompts = job["batch"] // job["group_size"]
    return tunix.GRPOLearner(
        rl_cluster=cluster(job, mesh, num_prompts, num_prompts),
        reward_fns=text_reward,
        algo_config=tunix.GRPOConfig(num_generations=job["group_size"], num_iterations=1, beta=0.04),
    )


def ppo_step(job: dict[str, Any], mesh: Any) -> Any:
    """Returns PPO's learner, with a reward model."""

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

    batch = job["batch"]
    models = {"critic": Scorer(1), "reward": Scorer(2)}
    return tunix.PPOLearner(
        cluster(job, mesh, batch, batch // job["minibatches"], **models),
        tunix.PPOConfig(num_iterations=job["epochs"], beta=0.05),
    )


def cluster(job: dict[str, Any], mesh: Any, num_prompts: int, at_once: int, **models: Any) -> Any:
    """Returns policy, reference and other models, with completions of the job's lengths.

    Args:
        job: of the benchmark.
        mesh: where everything lies.
        num_prompts: of a step.
        at_once: prompts of a forward and backward pass.
        models: by role.
    """
    prompt, new = job["prompt"], job["new"]
    roles = rl_cluster.Role
    found = rl_cluster.RLCluster(
        actor=tunix_llama(job),
        reference=tunix_llama(job),
        tokenizer=Words(),
        **models,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(
                (roles.ACTOR, roles.ROLLOUT, roles.REFERENCE, roles.CRITIC, roles.REWARD), mesh
            ),
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=adamw(),
                critic_optimizer=adamw() if "critic" in models else None,
                eval_every_n_steps=10**9,
                max_steps=10**6,
                mini_batch_size=num_prompts,
                train_micro_batch_size=at_once,
                rollout_micro_batch_size=num_prompts,
                compute_logps_micro_batch_size=num_prompts,
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
    made, cut = found.rollout.generate, Cut(job)

    def generate(*args: Any, **options: Any) -> Any:
        rollout = made(*args, **options)
        assert rollout.left_padded_prompt_tokens.shape == (job["batch"], prompt)
        rollout.tokens = cut(rollout.tokens)
        return rollout

    found.rollout.generate = generate
    return found
