"""The least time that a step can take: its matrix products at their very shapes, and the optimiser's bytes.

Both are measured in the same process, and so are the ceilings, the rates of matrix products and of memory.
Attention has the scores of all pairs of tokens, of which a kernel of a TPU or a GPU computes half.
Left out are norms, softmax and sampling, and the attention of a token that is decoded.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections import Counter
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.models.architecture import Architecture
from rlhf_jax.roofline import layer_shapes

FORWARD = "mk,kn->mn"
BACKWARD = ("mn,kn->mk", "mk,mn->kn")
"""Of the gradient of what goes in, and of the weights."""
TIED_FORWARD = "mk,nk->mn"
TIED_BACKWARD = ("mn,nk->mk", "mn,mk->nk")
ATTENTION_FORWARD = ("bmk,bnk->bmn", "bmn,bnk->bmk")
"""Scores of all pairs of tokens, half of which nothing needs, and sums of values; b: rows times heads."""
ATTENTION_BACKWARD = ("bmk,bnk->bmn", "bmn,bmk->bnk", "bmn,bnk->bmk", "bmn,bmk->bnk")
"""Gradients of the scores, of values, queries and keys."""
ADAM_BYTES = 28
"""Of each float32 parameter: it, its gradient and both moments are read, all but the gradient written."""


class Product(NamedTuple):
    """A matrix product."""

    equation: str
    """In m tokens, k inputs, n outputs."""
    m: int
    k: int
    n: int
    b: int = 1
    """Of such products side by side."""


def trunk_products(
    architecture: Architecture, rows: float, length: float = 1, *, trained: bool = False
) -> Counter[Product]:
    """Returns the blocks' products for so many rows of so many tokens, and how often each occurs.

    Args:
        architecture: without experts.
        rows: of tokens that see each other.
        length: tokens of a row; of one that is decoded 1, whose attention does not count.
        trained: the backward pass as well.
    """
    tokens, length = _whole(rows * length), _whole(length)
    found: Counter[Product] = Counter()
    for equation in (FORWARD, *BACKWARD * trained):
        for k, n in layer_shapes(architecture):
            found[Product(equation, tokens, k, n)] += architecture.num_layers
    if length > 1:
        sizes = length, architecture.head_dim, length, _whole(rows * architecture.num_heads)
        for equation in (*ATTENTION_FORWARD, *ATTENTION_BACKWARD * trained):
            found[Product(equation, *sizes)] += architecture.num_layers
    return found


def head_products(architecture: Architecture, columns: float, *, trained: bool = False) -> Counter[Product]:
    """Returns the LM head's products where so many tokens are predicted; see `trunk_products`."""
    forward = TIED_FORWARD if architecture.tie_embeddings else FORWARD
    backward = TIED_BACKWARD if architecture.tie_embeddings else BACKWARD
    sizes = _whole(columns), architecture.hidden_size, architecture.vocab_size
    return Counter({Product(equation, *sizes): 1 for equation in (forward, *backward * trained)})


def _whole(count: float) -> int:
    return max(round(count), 1)


def times(count: float, *parts: Counter[Product]) -> dict[Product, float]:
    """Returns the products of all parts, so many times."""
    return {product: count * number for product, number in sum(parts, Counter()).items()}


def added(*parts: dict[Product, float]) -> dict[Product, float]:
    """Returns the products of all parts."""
    return {product: sum(part.get(product, 0) for part in parts) for part in parts for product in part}


def step_products(
    task: str, architecture: Architecture, args: Namespace, mean_new: float
) -> dict[str, dict[Product, float]]:
    """Returns the products of each phase of a step, of useful tokens alone.

    Args:
        task: name of the benchmark.
        architecture: of all roles.
        args: of the benchmark.
        mean_new: tokens of a completion on average.
    """
    batch, prompt = args.batch, args.prompt
    length, columns = prompt + mean_new, batch * mean_new
    trunk, head = partial(trunk_products, architecture), partial(head_products, architecture)
    if task == "sft_step":
        return {"update": times(1, trunk(batch, length, trained=True), head(columns, trained=True))}
    if task == "reward_step":
        return {"update": times(1, trunk(2 * batch, length, trained=True))}  # pairs
    if task == "dpo_step":
        phases = {"reference": times(1, trunk(2 * batch, length), head(2 * columns))}
        phases["update"] = times(1, trunk(2 * batch, length, trained=True), head(2 * columns, trained=True))
        return {"update": phases["update"]} if args.cached_reference else phases
    slots = getattr(args, "slots", 0) or batch
    decoded = times(columns / slots, trunk(slots), head(slots))
    if task == "grpo_step":  # with one update, the probabilities before it are its own
        return {
            "rollout": added(times(1, trunk(batch // args.group_size, prompt)), decoded),
            "scores": times(1, trunk(batch, length), head(columns)),
            "update": times(1, trunk(batch, length, trained=True), head(columns, trained=True)),
        }
    epochs, parts = getattr(args, "epochs", 1), getattr(args, "minibatches", 1)
    phases = {
        "rollout": added(times(1, trunk(batch, prompt)), decoded),
        "scores": added(times(4, trunk(batch, length)), times(2, head(columns))),
        "update": added(
            times(2 * epochs * parts, trunk(batch / parts, length, trained=True)),
            times(epochs * parts, head(columns / parts, trained=True)),
        ),
    }
    return {
        "score": {"scores": phases["scores"]},
        "ppo_update": {"update": phases["update"]},
        "train_step": phases,
    }[task]


def seconds_of(products: dict[Product, float], dtype: str) -> float:
    """Returns the seconds that products take, each measured in this process."""
    return sum(count * product_seconds(product, dtype) for product, count in products.items())


@cache
def product_seconds(product: Product, dtype: str, repeats: int = 5) -> float:
    """Returns the seconds of a product: the best of several."""
    operands, result = product.equation.split("->")
    *shapes, size = ([getattr(product, axis) for axis in axes] for axes in (*operands.split(","), result))
    # Several in one call, as in a model: the call itself costs as much as a small product.
    copies = max(1, min(8, 2**24 // sum(map(math.prod, (*shapes, size)))))
    pairs = [[jnp.full(shape, i, dtype) for shape in shapes] for i in range(copies)]
    multiply = jax.jit(lambda pairs: [jnp.einsum(product.equation, *pair) for pair in pairs])
    seconds = []
    for _ in range(1 + repeats):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(multiply(pairs))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / copies


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
