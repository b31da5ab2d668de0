"""The update: minibatches, accumulation, clipping, one optimiser step; skipped where it is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import DTypeLike

from rlhf_jax import keys
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import (
    Max,
    Mean,
    Metrics,
    Params,
    PolicyBatch,
    Rows,
    TrainState,
    num_rows,
    reduce_metrics,
)
from rlhf_jax.models.forward import Forward, blank_forward
from rlhf_jax.ops.packed_rows import Placement, RowLayout
from rlhf_jax.ops.rounding import rounded_like, widened
from rlhf_jax.optim import map_moments

OF_LAST_PASS = ("policy/approx_kl",)
"""Metrics that are told of the last pass over the batch too, as `NAME_last`."""
Optimizers = dict[str, optax.GradientTransformation]
Constrain = Callable[[Any], Any]
Update = Callable[[TrainState, Params, Any, Array], tuple[TrainState, Metrics]]


def init_state(
    params: Params,
    optimizers: Optimizers,
    aux: Mapping[str, float | tuple[float, ...]],
    *,
    param_dtype: DTypeLike = jnp.float32,
    state_dtype: DTypeLike = jnp.float32,
) -> TrainState:
    """Returns the state of a stage that has not yet made a step.

    Args:
        params: by role, in any floating-point type.
        optimizers: by role.
        aux: named scalars or vectors.
        param_dtype: in which parameters are stored.
        state_dtype: in which an optimiser stores what it keeps of each parameter.
    """

    def opt_state(role: str) -> Any:
        wide = widened(params[role])
        state = optimizers[role].init(wide)
        return map_moments(lambda leaf, _: leaf.astype(state_dtype), lambda leaf: leaf, state, wide)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        position=jnp.zeros((), jnp.int32),
        params=jax.tree.map(lambda x: x.astype(param_dtype), params),
        opt_state={role: opt_state(role) for role in params},
        aux={name: jnp.asarray(value, jnp.float32) for name, value in aux.items()},
    )


def make_update(
    algorithm: Algorithm,
    forward: Forward,
    optimizers: Optimizers,
    settings: Any,
    *,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
    rows_per_unit: int = 1,
    stochastic_rounding: bool = True,
    max_kl: float = 0.0,
    layout: RowLayout | None = None,
    constrain: Constrain = lambda batch: batch,
) -> Update:
    """Returns update(state, frozen, batch, key) -> (state, metrics), one program for all epochs of a batch.

    Scan over epochs and minibatches of scan over microbatches; what an algorithm needs of a whole minibatch
    comes from a scan of its own, before that. Losses are sums over microbatches divided by
    weights of the whole minibatch, so that the number of microbatches does not change the result. A step
    whose loss or gradient is not finite leaves parameters and optimiser alone and counts as update/skipped.

    Gradients of a microbatch have the type in which the parameters are stored; from there on, all is float32:
    their sum, the optimiser, the sum of parameter and update. Then it is rounded to what the state stores.

    Args:
        algorithm: gives the loss, the roles and the rule for aux.
        forward: forward passes by role.
        optimizers: by role; clipping is part of them, the norms logged are those before clipping.
        settings: the algorithm's section.
        num_epochs: passes over the batch; rows are shuffled anew in each when there are several minibatches.
        num_minibatches: optimiser steps of a pass; divides the rows.
        num_microbatches: parts of a minibatch's rows.
        rows_per_unit: rows that belong together and are never parted; divides those of a microbatch. Where
            a layout has several sequences in a row, such a row is one.
        stochastic_rounding: how bfloat16 parameters and moments are rounded; float32 ones are not.
        max_kl: a step before which policy/approx_kl of its minibatch is above this is not made, nor are those
            behind it, which count as update/stopped; 0: all are made.
        layout: in what rows a minibatch is computed; None: in its own.
        constrain: puts the rows of a minibatch on the mesh.
    """
    rows_per_part = rows_per_unit if layout is None or layout.sequences_per_row == 1 else 1

    def gradients(params: Params, frozen: Params, minibatch: Any) -> tuple[Params, dict[str, Mean], Metrics]:
        def in_rows(at: Placement) -> tuple[Params, dict[str, Mean], Metrics]:
            assert forward.with_columns is not None
            short = forward.with_columns(at.rung.num_completion)
            return of_rows(short, params, frozen, constrain(in_rows_of(at, minibatch)))

        if layout is None:
            return of_rows(forward, params, frozen, minibatch)
        rows = minibatch if isinstance(minibatch, Rows) else minibatch.rows
        return layout.in_short_rows(rows, in_rows, rows_per_unit)

    def of_rows(
        forward: Forward, params: Params, frozen: Params, minibatch: Any
    ) -> tuple[Params, dict[str, Mean], Metrics]:
        stats = stats_of(forward, params, frozen, minibatch)
        blank_terms, _ = algorithm.loss(blank_forward(), params, frozen, minibatch, settings, **stats)
        weights = {name: jnp.maximum(term.mean.weight, 1e-8) for name, term in blank_terms.items()}

        def objective(params: Params, microbatch: Any) -> tuple[Array, tuple[dict[str, Mean], Metrics]]:
            terms, metrics = algorithm.loss(forward, params, frozen, microbatch, settings, **stats)
            total = sum(term.coef * term.mean.total / weights[name] for name, term in terms.items())
            return jnp.asarray(total), ({name: term.mean for name, term in terms.items()}, metrics)

        def of_microbatch(microbatch: Any) -> tuple[Params, dict[str, Mean], Metrics]:
            grads, (means, metrics) = jax.grad(objective, has_aux=True)(params, microbatch)
            return widened(grads), means, metrics

        if num_microbatches == 1:
            return of_microbatch(minibatch)
        microbatches = split_rows(minibatch, num_microbatches, rows_per_part)

        def accumulate(grads: Params, microbatch: Any) -> tuple[Params, tuple[dict[str, Mean], Metrics]]:
            more, means, metrics = of_microbatch(constrain(microbatch))
            return jax.tree.map(jnp.add, grads, more), (means, metrics)

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        grads, (means, metrics) = lax.scan(accumulate, zeros, microbatches)
        means = jax.tree.map(lambda parts: jnp.sum(parts, axis=0), means)
        return grads, means, reduce_metrics(metrics)

    def stats_of(forward: Forward, params: Params, frozen: Params, minibatch: Any) -> dict[str, Array]:
        stats = algorithm.minibatch_stats
        if stats is None:
            return {}
        if num_microbatches == 1:
            sums = stats(forward, params, frozen, minibatch, settings)
        else:
            microbatches = split_rows(minibatch, num_microbatches, rows_per_part)
            parts = lax.map(
                lambda part: stats(forward, params, frozen, constrain(part), settings), microbatches
            )
            sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
        return {name: mean.value for name, mean in sums.items()}

    def optimizer_step(
        carry: tuple[Params, Params], frozen: Params, minibatch: Any, key: Array
    ) -> tuple[tuple[Params, Params], Metrics]:
        params, opt_state = carry
        grads, means, metrics = gradients(params, frozen, minibatch)
        norms = {role: optax.tree.norm(grads[role]) for role in grads}
        quantities = {f"loss/{name}": mean.total for name, mean in means.items()}
        quantities |= {f"{role}/grad_norm": norm for role, norm in norms.items()}
        finite = jnp.all(jnp.stack([jnp.isfinite(x) for x in quantities.values()]))

        def step(old: tuple[Params, Params]) -> tuple[Params, Params]:
            wide_params, wide_opt_state = widened(old)
            new_params, new_opt_state = {}, {}
            for role, optimizer in optimizers.items():
                updates, new_opt_state[role] = optax.with_extra_args_support(optimizer).update(
                    grads[role], wide_opt_state[role], wide_params[role], grad_norm=norms[role]
                )
                new_params[role] = optax.apply_updates(wide_params[role], updates)
            return rounded_like((new_params, new_opt_state), old, key if stochastic_rounding else None)

        goes_on = approx_kl(metrics) <= max_kl if max_kl else True
        # Not a choice between old and new, for which a CPU would keep copies of the old.
        params, opt_state = lax.cond(finite & goes_on, step, lambda old: old, (params, opt_state))
        one = jnp.float32(1)
        metrics = metrics | {f"loss/{name}": mean for name, mean in means.items()}
        metrics |= {f"{role}/grad_norm": Mean(norm, one) for role, norm in norms.items()}
        # Of the steps that were made, and the minibatch before whose step max_kl ended them.
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        metrics |= {
            f"not_finite/{name}": Max(jnp.float32(~jnp.isfinite(x))) for name, x in quantities.items()
        }
        return (params, opt_state), metrics | {"update/skipped": Mean(jnp.float32(~finite), one)}

    def update(state: TrainState, frozen: Params, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
        rows = num_rows(batch)

        def minibatch_step(carry: Any, inputs: tuple[Array, Array]) -> Any:
            row_index, key = inputs
            minibatch = constrain(jax.tree.map(lambda x: x[row_index], batch))
            return optimizer_step(carry, frozen, minibatch, key)

        def unless_stopped(carry: Any, inputs: tuple[Array, Array]) -> Any:
            """Makes a step, and no further one behind a minibatch whose KL is too large."""
            goes_on, carry = carry
            shapes = jax.eval_shape(minibatch_step, carry, inputs)[1]
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            carry, metrics = lax.cond(
                goes_on, minibatch_step, lambda carry, _: (carry, nothing), carry, inputs
            )
            goes_on &= approx_kl(metrics) <= max_kl
            return (goes_on, carry), metrics | {"update/stopped": Mean(jnp.float32(~goes_on), jnp.float32(1))}

        num_steps = num_epochs * num_minibatches
        rounding_keys = jax.random.split(keys.named(key, "rounding"), num_steps)
        carry = (state.params, state.opt_state)
        if num_steps == 1:
            carry, metrics = optimizer_step(carry, frozen, batch, rounding_keys[0])
            first = last = metrics
        else:
            epoch_keys = jax.random.split(key, num_epochs)
            units = jax.vmap(lambda k: jax.random.permutation(k, rows // rows_per_unit))(epoch_keys)
            order = rows_per_unit * units[..., None] + jnp.arange(rows_per_unit)
            inputs = (order.reshape(num_steps, -1), rounding_keys)
            if max_kl:
                (_, carry), metrics = lax.scan(unless_stopped, (jnp.bool(True), carry), inputs)
            else:
                carry, metrics = lax.scan(minibatch_step, carry, inputs)
            first = jax.tree.map(lambda x: x[0], metrics)
            last = reduce_metrics(jax.tree.map(lambda x: x[-num_minibatches:], metrics))
            metrics = reduce_metrics(metrics)
        maxima = {
            name: m for name, m in first.items() if isinstance(m, Max) and not name.startswith("not_finite")
        }
        metrics |= {f"{name}_first": maximum for name, maximum in maxima.items()}
        if not max_kl:  # else there may be none
            metrics |= {f"{name}_last": last[name] for name in OF_LAST_PASS if name in last}
        params, opt_state = carry
        aux = jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(new), new, old),
            algorithm.update_aux(state.aux, batch, metrics, settings),
            state.aux,
        )
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state, aux=aux), metrics

    return update


def in_rows_of(at: Placement, minibatch: Any) -> Any:
    """Returns a minibatch in the rows of a placement; demonstrations, placed already, stay where they are."""
    if not isinstance(minibatch, PolicyBatch) or minibatch.ptx is None:
        return at.pack(minibatch)
    return at.pack(minibatch._replace(ptx=None))._replace(ptx=minibatch.ptx)


def approx_kl(metrics: Metrics) -> Array:
    """Returns the mean KL from the old policy to the new one, nats per token."""
    mean = metrics["policy/approx_kl"]
    assert isinstance(mean, Mean)
    return mean.value


def split_rows(batch: Any, parts: int, rows_per_unit: int = 1) -> Any:
    """Returns the batch with leading axes [parts, rows / parts]; the rows of a unit stay together.

    Units are dealt in turn, so that rows that lie on one device stay there.
    """

    def split(x: Array) -> Array:
        dealt = x.reshape(-1, parts, rows_per_unit, *x.shape[1:])
        return jnp.moveaxis(dealt, 1, 0).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)
