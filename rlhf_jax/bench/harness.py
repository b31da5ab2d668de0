"""What the benchmarks share: shapes, parts on random weights, timing, the JSON line.

Every benchmark warms up, blocks until the device is ready, and prints one JSON line with the median and the
share of the ceiling, the matrix rate measured in the same process. Shapes and sizes are the usual ones of CPU
comparisons: 16 prompts of 32 random tokens, 64 new tokens, no early end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax import Array
from jax.sharding import Mesh
from tokenizers import models, pre_tokenizers

from rlhf_jax import algo_config, config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params, Prompts, Rollout
from rlhf_jax.data.collate import collate_prompts
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.host_memory import keep_freed_memory
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.forward import policy_parts
from rlhf_jax.models.heads import init_score_head
from rlhf_jax.models.transformer import Model, make_model
from rlhf_jax.programs import Programs, TokenIds, build_programs
from rlhf_jax.role_parts import role_shardings
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.sharding import make_mesh, traced_on

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
PACKING = {
    "sequences_per_row": {"type": int, "default": 1, "help": "that share a row in scoring and update"},
    "length_buckets": {"type": int, "default": 1, "help": "lengths of rows in scoring and update"},
    "tail": {"action": "store_true", "help": "long-tailed completions, with a mean of 0.35 of --new"},
}
"""Options of the benchmarks of an update."""


def arguments(description: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Returns the command line that all benchmarks have, and more options of one's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--batch", type=int, default=16, help="prompts")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
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


def tailed_lengths(num_prompts: int, longest: int, seed: int = 0) -> np.ndarray:
    """Returns i32[Q] geometric lengths, at most `longest`, whose mean is MEAN_LENGTH of it.

    They are the distribution's Q quantiles in an order of the seed, so that their mean is that of many more.
    """
    target = MEAN_LENGTH * longest
    low, high = 1 / longest / 100, 1.0
    for _ in range(60):  # the mean of min(geometric(p), n) is (1 - (1 - p)^n) / p
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** longest) / p > target else (low, p)
    shares = (np.random.default_rng(seed).permutation(num_prompts) + 0.5) / num_prompts
    quantiles = np.ceil(np.log1p(-shares) / np.log1p(-low))
    return np.clip(quantiles, 1, longest).astype(np.int32)


class Bench:
    """A PPO stage on random weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Builds the programs; nothing is compiled yet."""
        keep_freed_memory()
        self.args = args
        architecture = make_architecture(args.shape, args.prompt + args.new)
        self.architecture = architecture
        self.mesh: Mesh = make_mesh(config.MeshConfig())
        self.model: Model = make_model(architecture, args.dtype)
        self.stage = make_stage(
            "ppo",
            settings=algo_config.PPOConfig(
                batch_size=args.batch,
                num_epochs=args.epochs,
                num_minibatches=args.minibatches,
                sequences_per_row=getattr(args, "sequences_per_row", 1),
                length_buckets=getattr(args, "length_buckets", 1),
            ),
            model=config.ModelConfig(dtype=args.dtype),
            optimizer=config.OptimizerConfig(learning_rate=1e-6),
            rollout=config.RolloutConfig(max_new_tokens=args.new),
        )
        self.programs: Programs = build_programs(
            self.stage, ALGORITHMS["ppo"], self.model, self.mesh, args.new, NEVER, args.prompt
        )
        self.made: list[np.ndarray] = []
        """Tokens of the completions of each rollout with --tail."""
        if getattr(args, "tail", False):
            self.programs = self.programs._replace(rollout=cast(Any, self.tailed_rollout()))

    def tailed_rollout(self) -> Callable[[Params, Params, Prompts, Array], Rollout]:
        """Returns a rollout of long-tailed completions: the lengths of its i-th call are always the same."""

        def of(params: Params, frozen: Params, prompts: Prompts, key: Array, limits: Array) -> Rollout:
            return generate(
                self.model,
                policy_parts(params, frozen),
                prompts,
                key,
                Sampling(1.0, jnp.asarray([NEVER.eos])),
                max_new_tokens=self.args.new,
                pad_id=NEVER.pad,
                limits=limits,
            )

        compiled = jax.jit(traced_on(self.mesh, of))

        def rollout(params: Params, frozen: Params, prompts: Prompts, key: Array) -> Rollout:
            limits = tailed_lengths(self.args.batch, self.args.new, seed=len(self.made))
            made = compiled(params, frozen, prompts, key, limits)
            self.made.append(np.asarray(made.rows.lengths - made.rows.prompt_lengths))
            return made

        return rollout

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
        algorithm = ALGORITHMS["ppo"]
        reads = algorithm.reads(self.stage.settings)
        trained = {role: self.weights(role, i) for i, role in enumerate(algorithm.trains)}
        return trained, {role: self.weights(role, 8 + i) for i, role in enumerate(reads)}

    def prompts(self, seed: int = 0, num_prompts: int = 0) -> Prompts:
        """Returns random prompts on the host: a batch, or as many as are asked for."""
        count = num_prompts or self.args.batch
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

    def useful_flops(self, task: str) -> float:
        """Returns operations of one step by 2ND forward, 6ND forward and backward; no credit for waste.

        The embedding counts as the head's product in the policy, not at all in models with a score head.
        """
        n, body = self.num_parameters()
        args = self.args
        tokens = args.batch * (args.prompt + self.mean_new)
        generate = 2 * n * args.batch * self.mean_new + 2 * body * args.batch * args.prompt
        update = args.epochs * 6 * (n + body) * tokens
        return {
            "generate": generate,
            "ppo_update": update,
            "train_step": generate + (2 * n + 4 * body) * tokens + update,
        }[task]

    def of_memory(self, seconds: float) -> dict[str, float]:
        """Returns what decoding has to read of memory, beside what the memory can: GB/s, and the share.

        For each token all weights, once for all rows, and each row's keys and values so far.
        """
        args, architecture = self.args, self.architecture
        size = jnp.dtype(args.dtype).itemsize
        per_token = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim * size
        cached = args.batch * (args.prompt + args.new / 2) * per_token
        read = args.new * (self.num_parameters()[0] * size + cached) / seconds / 1e9
        ceiling = memory_rate()
        return {
            "memory_gb_s": round(read, 1),
            "memory_ceiling_gb_s": round(ceiling, 1),
            "share_of_memory": round(read / ceiling, 3),
        }

    def header(self, task: str) -> dict[str, Any]:
        """Returns what a benchmark's line says of what is measured."""
        args = self.args
        return {
            "bench": task,
            "commit": commit(),
            "device": jax.devices()[0].device_kind,
            "mesh": dict(self.mesh.shape),
            "shape": args.shape,
            "batch": args.batch,
            "prompt": args.prompt,
            "new": args.new,
            "dtype": args.dtype,
        }

    def report(self, task: str, step: Callable[[int], Any], tokens: int = 0) -> None:
        """Times step(i) and prints the JSON line; the step returns what has to be ready.

        Tokens are the useful ones of a step; 0: those of the completions.
        """
        args = self.args
        start = time.perf_counter()
        for i in range(args.warmup):
            jax.block_until_ready(step(i))
        warm = time.perf_counter() - start
        seconds = []
        for i in range(args.steps):
            start = time.perf_counter()
            jax.block_until_ready(step(args.warmup + i))
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        ceiling = matrix_rate(args.dtype)
        tokens = tokens or round(args.batch * self.mean_new)
        rate = self.useful_flops(task) / median / 1e9
        line = {
            **self.header(task),
            "epochs": args.epochs,
            "minibatches": args.minibatches,
            **{name: getattr(args, name) for name in PACKING if name in args},
            **({"mean_new": round(self.mean_new, 1)} if self.made else {}),
            "ms": round(1000 * median, 1),
            "ms_min": round(1000 * min(seconds), 1),
            "ms_max": round(1000 * max(seconds), 1),
            "tokens_per_s": round(tokens / median, 1),
            "useful_gflops": round(rate, 1),
            "ceiling_gflops": round(ceiling, 1),
            "share_of_ceiling": round(rate / ceiling, 3),
            **(self.of_memory(median) if task == "generate" else {}),
            "warmup_s": round(warm, 1),
            **resources(),
        }
        print(json.dumps(line), flush=True)


def resources() -> dict[str, float]:
    """Returns the process's peak memory so far, and how busy the machine was."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_rss_mib": round(peak), "load_1m": round(os.getloadavg()[0], 2)}


def matrix_rate(dtype: str, repeats: int = 5) -> float:
    """Returns GFLOP/s of a square matrix product: the best of several."""
    product = jax.jit(jnp.matmul)
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def memory_rate(repeats: int = 5) -> float:
    """Returns GB/s of reading a large array: the best of several."""
    total = jax.jit(jnp.sum)
    x = jnp.ones((2**26 if jax.default_backend() == "cpu" else 2**30,), jnp.float32)
    total(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds) / 1e9


def commit() -> str:
    """Returns the commit that is measured."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
