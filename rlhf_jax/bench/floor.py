"""The least time that a step can take: its matrix products at their very shapes, and the optimiser's bytes.

Both are measured in the same process, and so are the ceilings, the rates of matrix products and of memory.
Attention's own products, norms, softmax and sampling are left out.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections import Counter
from functools import cache
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
ADAM_BYTES = 28
"""Of each float32 parameter: it, its gradient and both moments are read, all but the gradient written."""


class Product(NamedTuple):
    """A matrix product."""

    equation: str
    """In m tokens, k inputs, n outputs."""
    m: int
    k: int
    n: int


def trunk_products(architecture: Architecture, tokens: float, *, trained: bool) -> Counter[Product]:
    """Returns the products with the blocks' weights for so many tokens, and how often each occurs.

    Args:
        architecture: without experts.
        tokens: of all rows.
        trained: the backward pass as well.
    """
    shapes = layer_shapes(architecture)
    equations = (FORWARD, *BACKWARD) if trained else (FORWARD,)
    found: Counter[Product] = Counter()
    for equation in equations:
        for k, n in shapes:
            found[Product(equation, max(round(tokens), 1), k, n)] += architecture.num_layers
    return found


def head_products(architecture: Architecture, columns: float, *, trained: bool) -> Counter[Product]:
    """Returns the LM head's products where so many tokens are predicted; see `trunk_products`."""
    forward = TIED_FORWARD if architecture.tie_embeddings else FORWARD
    backward = TIED_BACKWARD if architecture.tie_embeddings else BACKWARD
    sizes = max(round(columns), 1), architecture.hidden_size, architecture.vocab_size
    return Counter({Product(equation, *sizes): 1 for equation in (forward, *backward * trained)})


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
    tokens, columns = batch * (prompt + mean_new), batch * mean_new

    def trunk(count: float, *, trained: bool = False) -> Counter[Product]:
        return trunk_products(architecture, count, trained=trained)

    def head(count: float, *, trained: bool = False) -> Counter[Product]:
        return head_products(architecture, count, trained=trained)

    if task == "sft_step":
        return {"update": times(1, trunk(tokens, trained=True), head(columns, trained=True))}
    if task == "reward_step":
        return {"update": times(1, trunk(2 * tokens, trained=True))}  # pairs
    if task == "dpo_step":
        phases = {"reference": times(1, trunk(2 * tokens), head(2 * columns))}
        phases["update"] = times(1, trunk(2 * tokens, trained=True), head(2 * columns, trained=True))
        return {"update": phases["update"]} if args.cached_reference else phases
    slots = getattr(args, "slots", 0) or batch
    decoded = times(columns / slots, trunk(slots), head(slots))
    if task == "grpo_step":  # with one update, the probabilities before it are its own
        return {
            "rollout": added(times(1, trunk(batch // args.group_size * prompt)), decoded),
            "scores": times(1, trunk(tokens), head(columns)),
            "update": times(1, trunk(tokens, trained=True), head(columns, trained=True)),
        }
    epochs, parts = getattr(args, "epochs", 1), getattr(args, "minibatches", 1)
    trained = trunk(tokens / parts, trained=True)
    phases = {
        "rollout": added(times(1, trunk(batch * prompt)), decoded),
        "scores": added(times(4, trunk(tokens)), times(2, head(columns))),
        "update": added(
            times(2 * epochs * parts, trained),
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
