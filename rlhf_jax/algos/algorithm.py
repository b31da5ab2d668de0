"""What an algorithm is: a value that names its roles, its loss and where else it has a say.

Its section, in `offline_config.py` or `online_config.py`, names its data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array

from rlhf_jax.batch import Mean, Metrics, Params, PolicyBatch, Rows, Scored
from rlhf_jax.models.forward import Forward

Aux = dict[str, Array]


class Term(NamedTuple):
    """One term of a loss: coef * total / weight, to minimise. The weight depends on masks and data alone."""

    mean: Mean
    coef: float = 1.0


Terms = dict[str, Term]
LossFunction = Callable[..., tuple[Terms, Metrics]]


class Measure(NamedTuple):
    """A figure of summary.json."""

    name: str
    metric: str
    """Of the evaluation."""
    is_compared: bool = True
    """Stands there twice, before the first step and after the last."""


class Algorithm(NamedTuple):
    """An algorithm; the trainer reads these fields and never asks for its name."""

    trains: tuple[str, ...]
    """Roles in the optimiser."""
    reports: tuple[Measure, ...]
    """What the summary says of a stage; measures that an evaluation does not have are left out."""
    figures: tuple[str, ...]
    """The three or four metrics that the progress display shows, of those that there are."""
    loss: LossFunction
    """loss(forward, params, frozen, batch, settings, **minibatch_stats) -> terms, metrics."""
    reads: Callable[[Any], tuple[str, ...]] = lambda settings: ()
    """Roles that are frozen; a teacher is none of them, for it is a model of its own kind."""
    minibatch_stats: Callable[[Forward, Params, Params, Any, Any], dict[str, Mean]] | None = None
    """What a loss needs of the whole minibatch, without a gradient: sums over a part of it, of the same
    arguments as the loss, which is given their values by name."""
    evaluate: Callable[[Forward, Params, Params, Any, Any], Metrics] | None = None
    """Sums over one held-out batch, of the same arguments as the loss; online, where it is given, over the
    completions of held-out prompts."""
    rows_per_record: int = 1
    """Sequences of a batch that belong together: one behind the other, never parted, not by a microbatch. Of
    rankings and ratings the data decide it, and the plan has it."""
    adam_eps: float = 1e-8
    """Adam's epsilon where the configuration leaves it open."""
    init_aux: Callable[[Any], Mapping[str, float | tuple[float, ...]]] = lambda settings: {}
    """Named float32 scalars, or vectors, of the train state, and their first values."""
    prepare: Callable[[Scored, Aux, Any], tuple[PolicyBatch | Rows, Metrics]] | None = None
    """Online: a scored rollout -> what the loss reads, and metrics of the rollout."""
    informative_groups: Callable[[Scored, Aux, Any], Array] | None = None
    """Online: bool[N], the groups of a scored rollout from which something is to be learned."""
    reads_greedy: Callable[[Any], bool] = lambda settings: False
    """Online: whether `prepare` reads the score of each prompt's greedy completion."""
    update_aux: Callable[[Aux, Any, Metrics, Any], Aux] = lambda aux, batch, metrics, settings: aux
    """The aux of the next iteration, from batch and metrics of this one; `NAME_last` is a mean over the last
    pass alone."""
    alarms: tuple[tuple[str, float], ...] = ()
    """Metrics, and the value above which something is wrong; a warning names them."""
    leaves_out: Callable[[Any], bool] = lambda settings: False
    """Online: whether completions without EOS leave the metrics, as they leave the loss."""
    rates: Callable[[Any], dict[str, float]] = lambda settings: {}
    """Learning rates of roles that have their own."""
    waits: Callable[[Any], dict[str, int]] = lambda settings: {}
    """Optimiser steps, at the beginning, in which a role does not learn."""
    make_update: Callable[..., Any] | None = None
    """Its own update rule, with the arguments of step.make_update, in whose place it is called."""
    without_optimizer: tuple[str, ...] = ()
    """Trained roles that no optimiser steps, but make_update by itself; their opt_state is empty."""
    normalizes_scores: bool = False
    """After the last step, the mean and deviation of scores on demonstrations go into aux."""
