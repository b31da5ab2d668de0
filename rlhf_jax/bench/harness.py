"""What the benchmarks measure: shapes, options, the parts of a stage on random weights.

Shapes and sizes are the usual ones of CPU comparisons: 16 prompts of 32 random tokens, 64 new tokens, no
early end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax import Array
from jax.sharding import Mesh
from tokenizers import models, pre_tokenizers

from rlhf_jax import config, offline_config, online_config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params, Prompts, Rollout, Rows
from rlhf_jax.data.collate import Row, collate_prompts, collate_rows
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.host_memory import keep_freed_memory
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import init_score_head
from rlhf_jax.models.transformer import Model, make_model
from rlhf_jax.programs import Programs, TokenIds, build_programs
from rlhf_jax.role_parts import role_shardings
from rlhf_jax.rollout.generate import assemble
from rlhf_jax.rollout.sampling import read_sampling
from rlhf_jax.rollout.slots import Completions, Engine, Queue, Slots
from rlhf_jax.sharding import make_mesh, place_rows, traced_on

SHAPES = {  # width, layers, heads, kv heads, mlp, vocabulary; embeddings tied but in UNTIED
    "tiny": (32, 2, 4, 2, 64, 512),
    "15m": (288, 6, 6, 6, 768, 32000),
    "60m": (576, 12, 9, 3, 1536, 32000),
    "0.5b": (896, 24, 14, 2, 4864, 151936),  # Qwen2.5, like the next
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
UNTIED = ("8b",)
PAD, FIRST_WORD = 0, 4
NEVER = TokenIds(eos=-1, pad=PAD)  # no token is EOS: every completion has its full length
MEAN_LENGTH = 0.35  # of long-tailed completions, of the longest
PASSES = {
    "epochs": {"type": int, "default": 4, "help": "passes over a rollout"},
    "minibatches": {"type": int, "default": 4, "help": "optimizer steps of a pass"},
}
"""Options of the benchmarks of updates that are made of several optimiser steps."""
ROLLOUTS = {
    "sequences_per_row": {"type": int, "default": 1, "help": "that share a row in scoring and update"},
    "length_buckets": {"type": int, "default": 1, "help": "lengths of rows in scoring and update"},
    "slots": {"type": int, "default": 0, "help": "completions that are sampled at once; 0: all"},
    "refill": {"type": int, "default": 0, "help": "prompts prefilled at once; 0: for a quarter of the slots"},
    "tail": {"action": "store_true", "help": "long-tailed completions, with a mean of 0.35 of --new"},
}
"""Options of the benchmarks of a stage with rollouts."""
GROUPS = {
    "group_size": {"type": int, "default": 4, "help": "completions of a prompt"},
    "refill_unit": {
        "choices": ["group", "completion"],
        "default": "group",
        "help": "what slots take: a prompt with all of its completions, which wait for the longest of them; "
        "or one completion, for which its prompt is prefilled",
    },
}
"""Options of the benchmarks of a stage with groups of completions; --batch is the number of these."""
CACHED = {
    "cached_reference": {
        "action": "store_true",
        "help": "the reference's log-probabilities are computed before the steps",
    }
}
"""The option of the benchmark of a stage that compares with a reference."""


def arguments(description: str, batch: str = "prompts", /, **more: dict[str, Any]) -> argparse.Namespace:
    """Returns the command line that all benchmarks have, and more options of one's own.

    Args:
        description: of the benchmark.
        batch: what --batch is the number of.
        more: options and what they are made with.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--batch", type=int, default=16, help=batch)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--unroll", type=int, default=0, help="blocks that one turn of the loop over them computes"
    )
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def make_architecture(shape: str, context_length: int) -> Architecture:
    """Returns the architecture of a shape."""
    width, layers, heads, kv_heads, mlp, vocabulary = SHAPES[shape]
    return Architecture(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_size=mlp,
        context_length=context_length,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=shape not in UNTIED,
    )


def make_stage(algorithm: Any, **sections: Any) -> config.StageConfig:
    """Returns a stage of an algorithm; sections that are not given have their defaults."""
    sections_of_stage = config.RUN_SECTIONS | config.STAGE_SECTIONS
    defaults = {name: made() for name, made in sections_of_stage.items() if name != "run"}
    fixed = {"start_from": "", "reward_from": "", "run": config.RunConfig(dir="unused")}
    return config.StageConfig(name=algorithm, algorithm=algorithm, **(fixed | defaults | sections))


def tailed_lengths(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """Returns i32[count] geometric lengths, at most `longest`, whose mean is MEAN_LENGTH of it.

    They are so many quantiles of the distribution in an order of the seed, so that their mean is that of many
    more.
    """
    target = MEAN_LENGTH * longest
    low, high = 1 / longest / 100, 1.0
    for _ in range(60):  # the mean of min(geometric(p), n) is (1 - (1 - p)^n) / p
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** longest) / p > target else (low, p)
    shares = (np.random.default_rng(seed).permutation(count) + 0.5) / count
    quantiles = np.ceil(np.log1p(-shares) / np.log1p(-low))
    return np.clip(quantiles, 1, longest).astype(np.int32)


class Bench:
    """A stage on random weights: of PPO, or of another algorithm; and what its steps tell of themselves."""

    def __init__(self, args: argparse.Namespace, algorithm: str = "ppo", reward: str = "") -> None:
        """Builds the programs; nothing is compiled yet.

        Args:
            args: of the command line.
            algorithm: of the stage.
            reward: a function `package.module:name` that judges completions; without one a reward model does.
        """
        keep_freed_memory()
        self.args = args
        self.algorithm = ALGORITHMS[algorithm]
        architecture = make_architecture(args.shape, args.prompt + args.new)
        self.architecture = architecture
        self.mesh: Mesh = make_mesh(config.MeshConfig())
        self.model: Model = make_model(architecture, args.dtype, unroll=args.unroll)
        slots, refill_size = getattr(args, "slots", 0), getattr(args, "refill", 0)
        self.group_size: int = getattr(args, "group_size", 1)
        self.stage = make_stage(
            algorithm,
            settings=_settings(algorithm, args),
            model=config.ModelConfig(dtype=args.dtype, unroll=args.unroll),
            optimizer=config.OptimizerConfig(learning_rate=1e-6),
            rollout=config.RolloutConfig(max_new_tokens=args.new, slots=slots, refill_size=refill_size),
            rewards=config.RewardsConfig(function=reward),
        )
        self.programs: Programs = build_programs(
            self.stage, self.algorithm, self.model, self.mesh, args.new, NEVER, args.prompt
        )
        self.made: list[np.ndarray] = []
        """Tokens of the completions of each rollout whose lengths were given."""
        self.laps: dict[str, list[float]] = {}
        """Seconds of each phase of a step."""
        self._lap_start = 0.0
        one_by_one = getattr(args, "refill_unit", "group") == "completion"
        if getattr(args, "tail", False) or one_by_one:
            self.programs = self.programs._replace(rollout=cast(Any, self._given_lengths(one_by_one)))

    def _given_lengths(self, one_by_one: bool) -> Callable[[Params, Params, Prompts, Array], Rollout]:
        """Returns the stage's rollout with completions of given lengths: its i-th call's are `lengths_of(i)`.

        Args:
            one_by_one: a slot has one completion, for which its prompt is prefilled, not a group of them.
        """
        group_size = 1 if one_by_one else self.group_size
        programs = self.programs.rollout_of_one if one_by_one else self.programs.rollout
        rollout, new = self.stage.rollout, self.args.new
        num_slots = -(-rollout.slots // group_size)
        engine = Engine(new, NEVER.pad, num_slots, rollout.refill_size, group_size)

        def run(weights: Any, queue: Queue, key: Array, slots: Slots) -> Slots:
            sampling = read_sampling(rollout, jnp.asarray([NEVER.eos]))
            return engine.run(weights, queue, sampling, key, slots, rollout.steps_per_call)

        def finish(queue: Queue, done: Completions) -> Rollout:
            return assemble(queue.prompts, engine.in_order(queue, done), NEVER.pad)

        def each_alone(prompts: Prompts) -> Prompts:
            tokens, lengths, index = (jnp.repeat(x, self.group_size, axis=0) for x in prompts)
            number = jnp.arange(len(index)) % self.group_size
            return Prompts(tokens, lengths, index * self.group_size + number)

        run = jax.jit(traced_on(self.mesh, run), donate_argnums=3)
        finish = jax.jit(traced_on(self.mesh, finish))
        each_alone = jax.jit(traced_on(self.mesh, each_alone))

        def made(params: Params, frozen: Params, prompts: Prompts, key: Array) -> Rollout:
            limits = place_rows(self.mesh, self.lengths_of(len(self.made)))
            of_queue = programs._replace(
                run=lambda weights, prompts, *rest: run(weights, Queue(prompts, limits), *rest),
                finish=lambda prompts, done: finish(Queue(prompts, limits), done),
            )
            found = of_queue(params, frozen, each_alone(prompts) if one_by_one else prompts, key)
            self.made.append(np.asarray(found.rows.lengths - found.rows.prompt_lengths))
            return found

        return made

    def lengths_of(self, step: int) -> np.ndarray:
        """Returns i32[B], the lengths of the completions of a step: long-tailed ones with --tail."""
        args = self.args
        if not args.tail:
            return np.full(args.batch, args.new, np.int32)
        return tailed_lengths(args.batch, args.new, seed=step)

    def begin(self) -> None:
        """A step begins now."""
        self._lap_start = time.perf_counter()

    def lap(self, phase: str, value: Any) -> Any:
        """Returns the value when it is ready; since the last one of the step, this phase was timed."""
        jax.block_until_ready(value)
        now = time.perf_counter()
        self.laps.setdefault(phase, []).append(now - self._lap_start)
        self._lap_start = now
        return value

    @property
    def mean_new(self) -> float:
        """Returns the tokens of a completion on average, of as many rollouts as are measured."""
        return float(np.mean(self.made[-self.args.steps :])) if self.made else float(self.args.new)

    def weights(self, role: str, seed: int) -> Params:
        """Returns random parameters of a role."""
        params = self.model.init_policy(jax.random.key(seed))
        if role in ("value", "reward"):
            head = init_score_head(jax.random.key(seed), self.architecture.hidden_size)
            params = {"trunk": params["trunk"], "score_head": head}
        return jax.device_put(params, role_shardings(self.model, self.mesh, role))

    def roles(self) -> tuple[Params, Params]:
        """Returns (trained, frozen)."""
        trained = {role: self.weights(role, i) for i, role in enumerate(self.algorithm.trains)}
        reads = list(self.algorithm.reads(self.stage.settings))
        if self.stage.rewards.functions:
            reads.remove("reward")
        return trained, {role: self.weights(role, 8 + i) for i, role in enumerate(reads)}

    def rows(self, num_rows: int, seed: int) -> Rows:
        """Returns random rows of a prompt and a completion, on the mesh."""
        shape = num_rows, self.args.prompt + self.args.new
        ids = np.random.default_rng(seed).integers(FIRST_WORD, self.architecture.vocab_size, shape)
        rows = [Row(row, self.args.prompt) for row in ids]
        return place_rows(self.mesh, collate_rows(rows, shape[1], PAD, num_rows))

    def prompts(self, seed: int = 0, num_prompts: int = 0) -> Prompts:
        """Returns random prompts on the host: a batch, or as many as are asked for."""
        count = num_prompts or self.args.batch // self.group_size
        ids = np.random.default_rng(seed).integers(
            FIRST_WORD, self.architecture.vocab_size, (count, self.args.prompt)
        )
        return collate_prompts(ids.tolist(), range(count), self.args.prompt, PAD, count)

    def tokenizer(self) -> Tokenizer:
        """Returns a word-level tokenizer: token i is the word w<i>."""
        from transformers import PreTrainedTokenizerFast

        words = {"<pad>": PAD, "<s>": 1, "</s>": 2, "<unk>": 3}
        words |= {f"w{i}": i for i in range(FIRST_WORD, self.architecture.vocab_size)}
        backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")

    def num_parameters(self) -> tuple[int, int]:
        """Returns (those of the blocks and the LM head, those of the blocks)."""
        everything = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.model.policy_shapes))
        embedding = self.architecture.vocab_size * self.architecture.hidden_size
        with_head = everything if self.architecture.tie_embeddings else everything - embedding
        return with_head, with_head - embedding

    def num_trained(self) -> int:
        """Returns the parameters of the roles that are trained."""
        trunk = self.architecture.vocab_size * self.architecture.hidden_size + self.num_parameters()[1]
        whole = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.model.policy_shapes))
        return sum(whole if role == "policy" else trunk for role in self.algorithm.trains)


def _settings(algorithm: str, args: argparse.Namespace) -> Any:
    layout: dict[str, Any] = {
        name: getattr(args, name, 1) for name in ("sequences_per_row", "length_buckets")
    }
    match algorithm:
        case "sft":
            return offline_config.SFTConfig(batch_size=args.batch)
        case "reward_model":
            return offline_config.RewardModelConfig(batch_size=args.batch)
        case "dpo":
            return offline_config.DPOConfig(batch_size=args.batch, precompute_ref=args.cached_reference)
        case "grpo":
            batch_size = args.batch // args.group_size
            return online_config.GRPOConfig(batch_size=batch_size, group_size=args.group_size, **layout)
    passes: dict[str, Any] = {f"num_{name}": getattr(args, name, 1) for name in PASSES}
    return online_config.PPOConfig(batch_size=args.batch, **passes, **layout)
