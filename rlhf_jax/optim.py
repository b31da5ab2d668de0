"""The optimiser: clipping by global norm, AdamW or another by name, decoupled decay, a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from rlhf_jax.batch import ADAPTER, Params
from rlhf_jax.config import OptimizerConfig

_MATRICES = {"q": (1, 2), "k": (1, 2), "v": (1, 2), "o": (2, 1)}
_MATRICES |= dict.fromkeys(("gate", "up", "down", "router"), (1, 1))
"""Leaf names of the blocks' matrices, and over how many dimensions inputs and outputs go; these are the last,
and before them stand the layers, and the experts of a mixture."""

FACTORED_FROM = 128
"""Adafactor factors the second moment of matrices with at least so many inputs and outputs, as optax does."""


def make_schedule(
    cfg: OptimizerConfig, num_steps: int, learning_rate: float | None = None, wait: int = 0
) -> optax.Schedule:
    """Returns the learning rate as a function of the optimiser steps already done, f32[].

    warm-up:    lr_n = lr (n + 1) / warmup_steps,   n < warmup_steps; the first step already moves
    after it:   lr_n = lr f(p),   p = (n - warmup_steps) / (num_steps - warmup_steps)
                f = 1 (constant), end + (1 - end) d(p) (others)
                d = 1 - p (linear), (1 + cos(pi p)) / 2 (cosine), min(1, (1 - p) / decay) (wsd)
                end = end_fraction, decay = decay_fraction
    The decay reaches its end when all num_steps are done, so the last step still moves where the end is 0.
    With a wait the rate is 0 for so many steps first, and n and num_steps are counted from there.

    Args:
        cfg: reads learning_rate, schedule, warmup_steps, end_fraction, decay_fraction.
        num_steps: optimiser steps of the stage, over all epochs and minibatches.
        learning_rate: peak, instead of the section's; a value model may have its own.
        wait: optimiser steps before the schedule begins.

    Raises:
        ValueError: the warm-up is longer than the stage.
    Source: of wsd, arXiv:2404.06395 section 4.2; ours decays linearly, as in arXiv:2405.18392.
    """
    if cfg.warmup_steps > num_steps - wait:
        raise ValueError(
            f"optimizer.warmup_steps is {cfg.warmup_steps}, but the stage makes only {num_steps - wait} "
            f"optimiser steps; choose at most {num_steps - wait}"
        )
    peak = cfg.learning_rate if learning_rate is None else learning_rate
    decay = {
        "constant": jnp.ones_like,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
        "wsd": lambda p: jnp.minimum(1.0, (1 - p) / cfg.decay_fraction),
    }[cfg.schedule]

    def schedule(count: ArrayLike) -> Array:
        done = jnp.asarray(count, jnp.float32) - wait
        progress = (done - cfg.warmup_steps) / max(1, num_steps - wait - cfg.warmup_steps)
        warmup = (done + 1) / max(1, cfg.warmup_steps)
        decayed = cfg.end_fraction + (1 - cfg.end_fraction) * decay(jnp.clip(progress, 0.0, 1.0))
        return peak * jnp.where(done < 0, 0.0, jnp.where(done < cfg.warmup_steps, warmup, decayed))

    return schedule


def make_optimizer(
    cfg: OptimizerConfig,
    num_steps: int,
    learning_rate: float | None = None,
    *,
    eps: float = 1e-8,
    wait: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by global norm, then an optimiser by name; the updates are to be added to parameters.

    g <- g min(1, max_grad_norm / ||g||)
    update = -lr_n (direction + weight_decay w)

    adamw       m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
                direction = m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)
    lion        direction = sign(beta1 m + (1 - beta1) g);   m <- beta2 m + (1 - beta2) g
    adafactor   see `_adafactor`; the learning rate is relative to the size of what it changes
    muon        see `_muon`, of the blocks' matrices and their adapters'; AdamW of norms, biases, embeddings
                and heads

    State, updates and what they are computed from are float32. Norms and biases are not decayed. A gradient
    that is not finite gives updates that are not finite: `step.py` skips those. The norm before clipping is
    the caller's to log, with optax.tree.norm; given to `update` as grad_norm, it is not computed again.

    Args:
        cfg: every field but those of storage.
        num_steps: see make_schedule.
        learning_rate: see make_schedule.
        eps: Adam's, where cfg.eps is 0.
        wait: see make_schedule.
    Sources: arXiv:1711.05101 algorithm 2; arXiv:2302.06675 algorithm 2. Weight decay is multiplied by the
        learning rate, as in PyTorch, in every one of them.
    """
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2 or 0.999, cfg.eps or eps)
    direction = {
        "adamw": lambda: adam,
        "lion": lambda: optax.scale_by_lion(cfg.beta1, cfg.beta2 or 0.99),
        "adafactor": _adafactor,
        "muon": lambda: optax.partition({"matrix": _muon(cfg.momentum), "other": adam}, _kinds),
    }[cfg.name]()
    step = optax.chain(
        direction,
        optax.add_decayed_weights(cfg.weight_decay, decay_mask),
        optax.scale_by_learning_rate(make_schedule(cfg, num_steps, learning_rate, wait)),
    )
    return optax.chain(_clip(cfg.max_grad_norm), step)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by the global norm, which the caller may know."""

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        grad_norm: Array | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decay_mask(params: Params) -> Params:
    """Returns the structure of params with True on the leaves that weight decay applies to.

    Layers are stacked, so that not the rank but the name tells a norm or a bias from a matrix.
    """
    return jax.tree.map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), params)


def map_moments(
    of_param: Callable[[Array, Any], Any], other: Callable[[Array], Any], state: Any, params: Params
) -> Any:
    """Returns an optimiser's state mapped: what it keeps of each parameter, and the rest.

    What is kept of a parameter has the parameter's path at the end of its own, whatever the optimiser.

    Args:
        of_param: of a leaf and the parameter that it belongs to.
        other: of any other leaf, such as a count.
        state: of an optimiser.
        params: their tree; leaves may be anything.
    """
    known = dict(jax.tree.leaves_with_path(params))

    def mapped(path: Any, leaf: Array) -> Any:
        ends = [path[start:] for start in range(len(path)) if path[start:] in known]
        return of_param(leaf, known[ends[0]]) if ends else other(leaf)

    return jax.tree.map_with_path(mapped, state)


def _muon(momentum: float) -> optax.GradientTransformation:
    """Returns the momentum of each matrix, made nearly orthogonal, with 0.2 as root mean square.

    m <- beta m + (1 - beta) g
    direction = 0.2 sqrt(max(in, out)) NewtonSchulz5(beta m / (1 - beta^(n+1)) + (1 - beta) g / (1 - beta^n))

    Stacked layers and experts are matrices of their own, and so are both factors of an adapter. The products
    have the platform's precision: on a TPU bfloat16, as its authors compute them.

    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; the size is that of arXiv:2502.16982
        eq. 4, with which one learning rate serves matrices and AdamW.
    """

    def sizes(updates: optax.Updates, _: optax.Params | None = None) -> optax.Updates:
        def sized(path: Any, update: Array) -> Array:
            return 0.2 * max(_matrix_shape(path, update)[-2:]) ** 0.5 * update

        return jax.tree.map_with_path(sized, updates)

    def dimensions(params: optax.Params) -> Any:
        def of(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers:
            inputs, outputs = _dimensions(path)
            split = leaf.ndim - outputs
            return optax.contrib.MuonDimensionNumbers(
                tuple(range(split - inputs, split)), tuple(range(split, leaf.ndim))
            )

        return jax.tree.map_with_path(of, params)

    orthogonal = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions)
    return optax.chain(orthogonal, optax.stateless(sizes))


def _adafactor() -> optax.GradientTransformation:
    """Returns gradients over the root of their factored second moment, clipped, and of the parameter's size.

    beta2_n = 1 - n^-0.8;   R, C <- beta2_n R, C + (1 - beta2_n) mean over rows, columns of (g^2 + 1e-30)
    u = g / sqrt(R C / mean(R));   direction = max(1e-3, rms(w)) u / max(1, rms(u))

    Heads count as one dimension of a matrix. Vectors and small matrices keep their whole second moment. Each
    layer and expert of a stack has its own sizes and is clipped by itself.

    Source: arXiv:1804.04235 algorithm 4, with its defaults and no momentum.
    """
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED_FROM)

    def seen(tree: Any) -> Any:
        return jax.tree.map_with_path(lambda path, x: x.reshape(_factored_shape(path, x)), tree)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        assert params is not None
        scaled, state = factored.update(seen(updates), state, seen(params))

        def sized(path: Any, u: Array, w: Array) -> Array:
            u = u.reshape(w.shape)

            def rms(x: Array) -> Array:
                return jnp.sqrt(jnp.mean(jnp.square(x), axis=_one_of_a_stack(path, x), keepdims=True))

            return jnp.maximum(1e-3, rms(w)) * u / jnp.maximum(1.0, rms(u))

        return jax.tree.map_with_path(sized, scaled, params), state

    return optax.GradientTransformation(lambda params: factored.init(seen(params)), update)


def _kinds(params: optax.Params) -> Any:
    return jax.tree.map_with_path(lambda path, _: "matrix" if any(_dimensions(path)) else "other", params)


def _dimensions(path: Any) -> tuple[int, int]:
    """Returns over how many dimensions inputs and outputs of a matrix go; zeros of what is none.

    Of an adapter's factors a [..., in, rank] and b [..., rank, out] the weight that they stand beside tells.
    """
    name = path[-1].key
    weight = path[-2].key.removesuffix(ADAPTER) if len(path) > 1 else ""
    if name in ("a", "b") and weight in _MATRICES:
        inputs, outputs = _MATRICES[weight]
        return (inputs, 1) if name == "a" else (1, outputs)
    return _MATRICES.get(name, (0, 0))


def _matrix_shape(path: Any, leaf: Array) -> tuple[int, ...]:
    """Returns (..., in, out) of a matrix, the heads and their dimensions being one."""
    inputs, outputs = _dimensions(path)
    split = leaf.ndim - outputs
    sizes = math.prod(leaf.shape[split - inputs : split]), math.prod(leaf.shape[split:])
    return (*leaf.shape[: split - inputs], *sizes)


def _factored_shape(path: Any, leaf: Array) -> tuple[int, ...]:
    """Returns the shape in which a leaf's second moment is factored; its own where it is not."""
    if not any(_dimensions(path)):
        return leaf.shape
    shape = _matrix_shape(path, leaf)
    return shape if min(shape[-2:]) >= FACTORED_FROM else leaf.shape


def _one_of_a_stack(path: Any, leaf: Array) -> tuple[int, ...]:
    """Returns the dimensions of one matrix or vector; those before are layers and experts."""
    if any(dimensions := _dimensions(path)):
        return tuple(range(leaf.ndim - sum(dimensions), leaf.ndim))
    is_stacked = any(part.key == "layers" for part in path)
    return tuple(range(int(is_stacked), leaf.ndim))
