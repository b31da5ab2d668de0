"""Trust region policy optimisation: one step of the policy per rollout, as far as a KL lets it go.

maximise    L(new) = mean of r_t A_t,   r_t = exp(logprobs_t - old_logprobs_t)
subject to  D(new) = mean of KL_t(old || new) <= delta

Means are over the completion tokens of the whole batch, the KL of a token is that of its distribution over
the whole vocabulary. The gradient g of L and the Fisher matrix F, which is the Hessian of D at the old
parameters, give the direction x = (F + damping I)^-1 g by conjugate gradients, and the length of the step,
sqrt(2 delta / x'Fx), for which D is delta up to third order. Shorter and shorter parts of it are tried until
both D <= delta and L has risen. The value model learns by its own optimiser, as PPO's does.

Source: arXiv:1502.05477, its appendix C; advantages are those of arXiv:1506.02438.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax import step
from rlhf_jax.algos.algorithm import Algorithm, Term, Terms
from rlhf_jax.algos.ppo import PPO, clipped_value_loss
from rlhf_jax.batch import Max, Mean, Metrics, Params, PolicyBatch, TrainState, reduce_metrics
from rlhf_jax.models.forward import Forward
from rlhf_jax.online_config import TRPOConfig
from rlhf_jax.ops.conjugate_gradient import conjugate_gradient, tree_add, tree_dot
from rlhf_jax.ops.kl import log_ratio
from rlhf_jax.ops.masking import keep, masked, masked_max
from rlhf_jax.ops.packed_rows import Placement, RowLayout

OverBatch = Callable[[Callable[[PolicyBatch], tuple[Any, Metrics]]], tuple[Any, Metrics]]
"""Of a function of a part of the batch, which gives a tree and metrics: the tree's sum over all parts, and
metrics of the whole batch."""


def surrogate_gain(logprobs: Array, start: Array, batch: PolicyBatch) -> Mean:
    """Returns how much the surrogate rises on the way from one policy to another.

    L(new) - L(start) = mean of w_t exp(start_t - old_logprobs_t) (exp(logprobs_t - start_t) - 1) A_t

    As one mean over completion tokens it keeps the digits that the difference of two would lose.

    Args:
        logprobs: f32[B, T], nats, under the new policy; the only input with a gradient.
        start: f32[B, T], nats, under the policy that the step starts from, by the same program as logprobs;
            they are old_logprobs, but for rounding.
        batch: old_logprobs and advantages f32[B, T], completion_mask bool[B, T], and w: importance f32[B, T]
            where another policy than the old one has sampled; else w is 1.
    Source: arXiv:1502.05477 eq. 14, with advantages in place of action values.
    """
    mask = batch.completion_mask
    start = lax.stop_gradient(start)
    gain = jnp.expm1(log_ratio(logprobs, start, mask)) * keep(batch.advantages, mask)
    gain = jnp.exp(log_ratio(start, batch.old_logprobs, mask)) * gain
    if batch.importance is not None:
        gain = keep(batch.importance, mask) * gain
    return masked(gain, mask)


class Direction(NamedTuple):
    """A step of the policy that has not been tried."""

    step: Params  # tree of the policy's parameters: sqrt(2 delta / x'Fx) x
    is_finite: Array  # bool[]
    metrics: Metrics


def natural_step(
    forward: Forward,
    params: Params,
    frozen: Params,
    over_batch: OverBatch,
    num_tokens: Array,
    settings: TRPOConfig,
) -> Direction:
    """Returns the step along the natural gradient for which the quadratic model of the KL is delta.

    Args:
        forward: its logprobs and fisher.
        params: of trained roles.
        frozen: the others.
        over_batch: see `OverBatch`.
        num_tokens: f32[], completion tokens of the whole batch.
        settings: delta, damping, cg_iterations, cg_tolerance.
    """
    assert forward.fisher is not None
    fisher, policy = forward.fisher, params["policy"]

    def of_gradient(batch: PolicyBatch) -> tuple[Params, Metrics]:
        def objective(policy: Params) -> tuple[Array, Metrics]:
            mask = batch.completion_mask
            logprobs, entropy = forward.logprobs(params | {"policy": policy}, frozen, batch.rows)
            ratio = jnp.exp(log_ratio(logprobs, batch.old_logprobs, mask))
            metrics = {
                "policy/entropy": masked(entropy, mask),
                "policy/ratio_gap_first": Max(masked_max(jnp.abs(ratio - 1), mask)),
            }
            return surrogate_gain(logprobs, logprobs, batch).total / num_tokens, metrics

        return jax.grad(objective, has_aux=True)(policy)

    def squared_length(move: Params, batch: PolicyBatch) -> Array:
        return keep(fisher(params, move, frozen, batch.rows), batch.completion_mask).sum() / num_tokens

    def damped_product(move: Params) -> Params:
        def of_part(batch: PolicyBatch) -> tuple[Params, Metrics]:
            return jax.grad(lambda move: 0.5 * squared_length(move, batch))(move), {}

        return tree_add(over_batch(of_part)[0], move, settings.damping)

    gradient, metrics = over_batch(of_gradient)
    grad_norm = jnp.sqrt(tree_dot(gradient, gradient))
    found = conjugate_gradient(
        damped_product, gradient, num_iterations=settings.cg_iterations, tolerance=settings.cg_tolerance
    )
    curvature, _ = over_batch(lambda batch: (squared_length(found.x, batch), {}))
    is_curved = curvature > 0
    length = jnp.where(is_curved, jnp.sqrt(2 * settings.delta / jnp.where(is_curved, curvature, 1.0)), 0.0)
    move = jax.tree.map(lambda x: length * x, found.x)
    step_norm = jnp.sqrt(tree_dot(move, move))
    residual = jnp.sqrt(tree_dot(found.residual, found.residual)) / jnp.maximum(grad_norm, 1e-30)
    metrics = metrics | {
        "policy/grad_norm": _once(grad_norm),
        "policy/step_norm": _once(step_norm),
        "policy/cg_residual": _once(residual),
        "policy/cg_iterations": _once(found.num_iterations),
    }
    # A product that is not finite leaves x as it was: the residual alone tells.
    quantities = {
        "grad_norm": grad_norm,
        "cg_residual": residual,
        "curvature": curvature,
        "step_norm": step_norm,
    }
    bad = {f"not_finite/policy/{name}": ~jnp.isfinite(x) for name, x in quantities.items()}
    is_finite = ~jnp.any(jnp.stack(list(bad.values())))
    return Direction(move, is_finite, metrics | {name: Max(jnp.float32(x)) for name, x in bad.items()})


class Tried(NamedTuple):
    """A policy that the line search has tried, and what it was like."""

    policy: Params
    gain: Array  # f32[], of the surrogate
    kl: Array  # f32[], exact, old to new, mean per token
    ratios: Metrics
    is_taken: Array  # bool[]
    number: Array  # i32[], policies tried


def line_search(
    forward: Forward,
    params: Params,
    frozen: Params,
    over_batch: OverBatch,
    num_tokens: Array,
    direction: Direction,
    settings: TRPOConfig,
) -> tuple[Params, Metrics]:
    """Returns the policy after the largest of the tried steps that keeps to the KL and improves.

    Steps are factor^k times the whole one, k = 0, 1, ...; where none of them is taken, or the step is not
    finite, the policy stays what it was, to the bit.

    Args:
        forward: its policy_change.
        params, frozen, over_batch, num_tokens: as `natural_step` has them.
        direction: the step.
        settings: delta, line_search_steps, line_search_factor.
    """
    assert forward.policy_change is not None
    policy_change, policy = forward.policy_change, params["policy"]

    def measured(policy: Params) -> tuple[tuple[Array, Array], Metrics]:
        def of_part(batch: PolicyBatch) -> tuple[tuple[Array, Array], Metrics]:
            mask = batch.completion_mask
            new = params | {"policy": policy}
            logprobs, start, kl = policy_change(new, params, frozen, batch.rows)
            ratio = jnp.exp(log_ratio(logprobs, batch.old_logprobs, mask))
            ratios = {
                "policy/ratio": masked(ratio, mask),
                "policy/ratio_max": Max(masked_max(ratio, mask)),
                "policy/ratio_gap": Max(masked_max(jnp.abs(ratio - 1), mask)),
            }
            totals = surrogate_gain(logprobs, start, batch).total, masked(kl, mask).total
            return jax.tree.map(lambda total: total / num_tokens, totals), ratios

        return over_batch(of_part)

    def attempt(last: Tried) -> Tried:
        fraction = settings.line_search_factor ** last.number.astype(jnp.float32)
        new = tree_add(policy, direction.step, fraction)
        (gain, kl), ratios = measured(new)
        return Tried(new, gain, kl, ratios, (kl <= settings.delta) & (gain > 0), last.number + 1)

    def goes_on(last: Tried) -> Array:
        return direction.is_finite & ~last.is_taken & (last.number < settings.line_search_steps)

    nothing, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    ratios = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measured, policy)[1])
    last = lax.while_loop(goes_on, attempt, Tried(policy, nothing, nothing, ratios, none > 0, none))
    taken = last.is_taken
    new = jax.tree.map(lambda new, old: jnp.where(taken, new, old), last.policy, policy)
    metrics = {
        "policy/surrogate_gain": _once(jnp.where(taken, last.gain, 0.0)),
        "policy/approx_kl": _once(jnp.where(taken, last.kl, 0.0)),
        "policy/line_search_steps": _once(last.number),
        "policy/line_search_failed": _once(~taken),
    }
    metrics = {name: _counted(metric, direction.is_finite) for name, metric in metrics.items()}
    ratios = jax.tree.map(lambda x: jnp.where(taken, x, 0.0), last.ratios)
    return new, metrics | ratios


def update_policy(
    forward: Forward,
    params: Params,
    frozen: Params,
    batch: PolicyBatch,
    settings: TRPOConfig,
    *,
    num_parts: int = 1,
    rows_per_unit: int = 1,
    constrain: step.Constrain = lambda batch: batch,
) -> tuple[Params, Metrics]:
    """Returns the policy after one step, and what the step was like.

    Args:
        forward: forward passes by role.
        params: of trained roles; the policy's are float32, as those of a step that is checked have to be.
        frozen: the others.
        batch: the whole of it.
        settings: the algorithm's section.
        num_parts: parts of the rows that go through the model one after the other.
        rows_per_unit: rows that are never parted.
        constrain: puts rows on the mesh.
    """

    def over_batch(function: Callable[[PolicyBatch], tuple[Any, Metrics]]) -> tuple[Any, Metrics]:
        if num_parts == 1:
            return function(batch)
        parts = step.split_rows(batch, num_parts, rows_per_unit)

        def add(total: Any, part: PolicyBatch) -> tuple[Any, Metrics]:
            more, metrics = function(constrain(part))
            return jax.tree.map(jnp.add, total, more), metrics

        shapes, _ = jax.eval_shape(lambda parts: function(jax.tree.map(lambda x: x[0], parts)), parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, metrics = lax.scan(add, zeros, parts)
        return total, reduce_metrics(metrics)

    num_tokens = jnp.maximum(jnp.sum(batch.completion_mask, dtype=jnp.float32), 1e-8)
    direction = natural_step(forward, params, frozen, over_batch, num_tokens, settings)
    policy, metrics = line_search(forward, params, frozen, over_batch, num_tokens, direction, settings)
    of_step = {
        name: metric if name.startswith("not_finite/") else _counted(metric, direction.is_finite)
        for name, metric in direction.metrics.items()
    }
    skipped = {"update/skipped": _once(~direction.is_finite)}
    return policy, of_step | metrics | skipped


def make_update(
    algorithm: Algorithm,
    forward: Forward,
    optimizers: step.Optimizers,
    settings: TRPOConfig,
    *,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
    rows_per_unit: int = 1,
    layout: RowLayout | None = None,
    constrain: step.Constrain = lambda batch: batch,
    **of_optimizer: Any,
) -> step.Update:
    """Returns update(state, frozen, batch, key) -> (state, metrics): first the policy, then the value model.

    The value model is updated by `step.make_update`, which is given all arguments. The policy's step is over
    the whole batch, in parts of as many rows as a microbatch has. Either is skipped where it is not finite.
    """
    update_values = step.make_update(
        algorithm,
        forward,
        {"value": optimizers["value"]},
        settings,
        num_minibatches=num_minibatches,
        num_microbatches=num_microbatches,
        rows_per_unit=rows_per_unit,
        layout=layout,
        constrain=constrain,
        **of_optimizer,
    )
    in_parts = partial(
        update_policy,
        settings=settings,
        num_parts=num_minibatches * num_microbatches,
        rows_per_unit=rows_per_unit,
        constrain=constrain,
    )

    def update(
        state: TrainState, frozen: Params, batch: PolicyBatch, key: Array
    ) -> tuple[TrainState, Metrics]:
        def in_rows(at: Placement) -> tuple[Params, Metrics]:
            assert forward.with_columns is not None
            short = forward.with_columns(at.rung.num_completion)
            return in_parts(short, state.params, frozen, constrain(at.pack(batch)))

        if layout is None:
            policy, metrics = in_parts(forward, state.params, frozen, batch)
        else:
            policy, metrics = layout.in_short_rows(batch.rows, in_rows)

        def of_values(tree: Params) -> Params:
            return {"value": tree["value"]}

        values = state._replace(params=of_values(state.params), opt_state=of_values(state.opt_state))
        values, value_metrics = update_values(values, frozen, batch, key)
        skipped = {"update/skipped": _sum(metrics["update/skipped"], value_metrics["update/skipped"])}
        params, opt_state = state.params | values.params, state.opt_state | values.opt_state
        state = values._replace(params=params | {"policy": policy}, opt_state=opt_state)
        return state, metrics | value_metrics | skipped

    return update


def value_loss(
    forward: Forward, params: Params, frozen: Params, batch: PolicyBatch, settings: TRPOConfig
) -> tuple[Terms, Metrics]:
    """Returns PPO's value loss, which is all that the optimiser minimises."""
    values = forward.values(params, frozen, batch.rows)
    loss, metrics = clipped_value_loss(values, batch, settings.value_clip_eps)
    return {"value": Term(loss)}, metrics


def _once(x: Array) -> Mean:
    return Mean(x.astype(jnp.float32), jnp.float32(1))


def _counted(metric: Any, condition: Array) -> Any:
    """Returns a metric that counts where a condition holds."""
    return jax.tree.map(lambda x: jnp.where(condition, x, 0.0), metric)


def _sum(a: Any, b: Any) -> Mean:
    return Mean(a.total + b.total, a.weight + b.weight)


TRPO = PPO._replace(
    loss=value_loss,
    make_update=make_update,
    without_optimizer=("policy",),
    rates=lambda settings: {},
    waits=lambda settings: {},
)
