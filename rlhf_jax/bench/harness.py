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

from rlhf_jax import config, offline_config, online_config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params, Prompts, Rollout, Rows
from rlhf_jax.bench.floor import ADAM_BYTES, seconds_of, step_products
from rlhf_jax.bench.peers import in_turn, start_peers
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
ROLLOUTS = {
    "sequences_per_row": {"type": int, "default": 1, "help": "that share a row in scoring and update"},
    "length_buckets": {"type": int, "default": 1, "help": "lengths of rows in scoring and update"},
    "slots": {"type": int, "default": 0, "help": "completions that are sampled at once; 0: all"},
    "refill": {"type": int, "default": 0, "help": "prompts prefilled at once; 0: for a quarter of the slots"},
    "tail": {"action": "store_true", "help": "long-tailed completions, with a mean of 0.35 of --new"},
}
"""Options of the benchmarks of a stage with rollouts."""


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
    """A stage on random weights: of PPO, or of another algorithm."""

    def __init__(self, args: argparse.Namespace, algorithm: str = "ppo") -> None:
        """Builds the programs; nothing is compiled yet."""
        keep_freed_memory()
        self.args = args
        self.algorithm = ALGORITHMS[algorithm]
        architecture = make_architecture(args.shape, args.prompt + args.new)
        self.architecture = architecture
        self.mesh: Mesh = make_mesh(config.MeshConfig())
        self.model: Model = make_model(architecture, args.dtype, unroll=args.unroll)
        slots, refill_size = getattr(args, "slots", 0), getattr(args, "refill", 0)
        self.stage = make_stage(
            algorithm,
            settings=_settings(algorithm, args),
            model=config.ModelConfig(dtype=args.dtype, unroll=args.unroll),
            optimizer=config.OptimizerConfig(learning_rate=1e-6),
            rollout=config.RolloutConfig(max_new_tokens=args.new, slots=slots, refill_size=refill_size),
        )
        self.programs: Programs = build_programs(
            self.stage, self.algorithm, self.model, self.mesh, args.new, NEVER, args.prompt
        )
        self.made: list[np.ndarray] = []
        """Tokens of the completions of each rollout with --tail."""
        self.laps: dict[str, list[float]] = {}
        """Seconds of each phase of a step."""
        self._lap_start = 0.0
        if getattr(args, "tail", False):
            self.programs = self.programs._replace(rollout=cast(Any, self.tailed_rollout()))

    def tailed_rollout(self) -> Callable[[Params, Params, Prompts, Array], Rollout]:
        """Returns the stage's rollout with long-tailed completions: its i-th call's have `lengths_of(i)`."""
        programs, rollout, new = self.programs.rollout, self.stage.rollout, self.args.new
        engine = Engine(new, NEVER.pad, num_slots=rollout.slots, refill_size=rollout.refill_size)

        def run(weights: Any, queue: Queue, key: Array, slots: Slots) -> Slots:
            sampling = read_sampling(rollout, jnp.asarray([NEVER.eos]))
            return engine.run(weights, queue, sampling, key, slots, rollout.steps_per_call)

        def finish(queue: Queue, done: Completions) -> Rollout:
            return assemble(queue.prompts, engine.in_order(queue, done), NEVER.pad)

        run = jax.jit(traced_on(self.mesh, run), donate_argnums=3)
        finish = jax.jit(traced_on(self.mesh, finish))

        def tailed(params: Params, frozen: Params, prompts: Prompts, key: Array) -> Rollout:
            limits = place_rows(self.mesh, self.lengths_of(len(self.made)))
            of_queue = programs._replace(
                run=lambda weights, prompts, *rest: run(weights, Queue(prompts, limits), *rest),
                finish=lambda prompts, done: finish(Queue(prompts, limits), done),
            )
            made = of_queue(params, frozen, prompts, key)
            self.made.append(np.asarray(made.rows.lengths - made.rows.prompt_lengths))
            return made

        return tailed

    def lengths_of(self, step: int) -> np.ndarray:
        """Returns i32[Q], the long-tailed lengths of the completions of a step."""
        return tailed_lengths(self.args.batch, self.args.new, seed=step)

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
        reads = self.algorithm.reads(self.stage.settings)
        return trained, {role: self.weights(role, 8 + i) for i, role in enumerate(reads)}

    def rows(self, num_rows: int, seed: int) -> Rows:
        """Returns random rows of a prompt and a completion, on the mesh."""
        shape = num_rows, self.args.prompt + self.args.new
        ids = np.random.default_rng(seed).integers(FIRST_WORD, self.architecture.vocab_size, shape)
        rows = [Row(row, self.args.prompt) for row in ids]
        return place_rows(self.mesh, collate_rows(rows, shape[1], PAD, num_rows))

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

    def num_trained(self) -> int:
        """Returns the parameters of the roles that are trained."""
        trunk = self.architecture.vocab_size * self.architecture.hidden_size + self.num_parameters()[1]
        whole = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.model.policy_shapes))
        return sum(whole if role == "policy" else trunk for role in self.algorithm.trains)

    def useful_flops(self, task: str) -> float:
        """Returns operations of one step by 2ND forward, 6ND forward and backward; no credit for waste.

        The embedding counts as the head's product, where a completion's token is predicted; not at all in
        models with a score head.
        """
        n, body = self.num_parameters()
        args = self.args
        tokens, predicted = args.batch * (args.prompt + self.mean_new), args.batch * self.mean_new
        policy, scorer = body * tokens + (n - body) * predicted, body * tokens
        generate = 2 * n * predicted + 2 * body * args.batch * args.prompt
        score = 4 * policy + 4 * scorer
        update = args.epochs * 6 * (policy + scorer)
        return {
            "generate": generate,
            "score": score,
            "ppo_update": update,
            "train_step": generate + score + update,
            "sft_step": 6 * policy,
            "reward_step": 6 * 2 * scorer,
        }[task]

    def floor(self, task: str, seconds: float) -> dict[str, Any]:
        """Returns the seconds that a step takes at least, by phase and in all, and their share of its own."""
        args = self.args
        products = step_products(task, self.architecture, args, self.mean_new)
        floors = {phase: seconds_of(of_phase, args.dtype) for phase, of_phase in products.items()}
        if "update" in floors:
            steps = args.epochs * args.minibatches if self.algorithm.prepare else 1
            floors["optimizer"] = steps * ADAM_BYTES * self.num_trained() / memory_rate() / 1e9
        total = sum(floors.values())
        return {
            "floor_s": {phase: round(of_phase, 3) for phase, of_phase in floors.items()},
            "floor_ms": round(1000 * total, 1),
            "share_of_floor": round(total / seconds, 3),
        }

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

    def job(self, task: str) -> dict[str, Any]:
        """Returns what a peer has to know in order to make the same steps."""
        args = self.args
        count = args.warmup + args.steps
        lengths = [self.lengths_of(i).tolist() for i in range(count)] if getattr(args, "tail", False) else []
        names = ("batch", "prompt", "new", "epochs", "minibatches")
        return {name: getattr(args, name) for name in names} | {
            "task": task,
            "steps": count,
            "lengths": lengths,
        }

    def report(self, task: str, step: Callable[[int], Any], tokens: int = 0) -> None:
        """Times step(i), in turn with the peers' where there are some, and prints the JSON line.

        Args:
            task: name of the benchmark.
            step: returns what has to be ready.
            tokens: the useful ones of a step; 0: those of the completions.
        """
        args = self.args
        peers = getattr(args, "against", [])

        def ours(i: int) -> None:
            self._lap_start = time.perf_counter()
            jax.block_until_ready(step(i))

        ways: dict[str, Callable[[int], Any]] = {"ours": ours}
        for name, go in start_peers(peers, "peer_train.py", self.job(task), self.architecture).items():
            ways[name] = lambda _, go=go: go()
        seconds, first = in_turn(ways, args.warmup, args.steps)
        medians = {name: statistics.median(of) for name, of in seconds.items()}
        median = medians["ours"]
        ceiling = matrix_rate(args.dtype)
        tokens = tokens or round(args.batch * self.mean_new)
        rate = self.useful_flops(task) / median / 1e9
        line = {
            **self.header(task),
            "epochs": args.epochs,
            "minibatches": args.minibatches,
            **({name: getattr(args, name) for name in ROLLOUTS} if "tail" in args else {}),
            **({"mean_new": round(self.mean_new, 1)} if self.made else {}),
            "ms": round(1000 * median, 1),
            "ms_min": round(1000 * min(seconds["ours"]), 1),
            "ms_max": round(1000 * max(seconds["ours"]), 1),
            "tokens_per_s": round(tokens / median, 1),
            "useful_gflops": round(rate, 1),
            "ceiling_gflops": round(ceiling, 1),
            "share_of_ceiling": round(rate / ceiling, 3),
            **(self.of_memory(median) if task == "generate" else self.floor(task, median)),
        }
        if self.laps:
            laps = {phase: statistics.median(of[args.warmup :]) for phase, of in self.laps.items()}
            line["phases_s"] = {phase: round(of, 3) for phase, of in laps.items()}
        for name in ways.keys() - {"ours"}:
            line[f"{name}_ms"] = round(1000 * medians[name], 1)
            line[f"against_{name}"] = round(medians[name] / median, 2)
        if peers:
            line["first_s"] = {name: round(of, 1) for name, of in first.items()}
        print(json.dumps(line | {"warmup_s": round(first["ours"], 1)} | resources()), flush=True)


def _settings(algorithm: str, args: argparse.Namespace) -> Any:
    if algorithm == "sft":
        return offline_config.SFTConfig(batch_size=args.batch)
    if algorithm == "reward_model":
        return offline_config.RewardModelConfig(batch_size=args.batch)
    return online_config.PPOConfig(
        batch_size=args.batch,
        num_epochs=args.epochs,
        num_minibatches=args.minibatches,
        sequences_per_row=getattr(args, "sequences_per_row", 1),
        length_buckets=getattr(args, "length_buckets", 1),
    )


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
