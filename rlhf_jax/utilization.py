"""What of the devices' peak a step has used, told from its metrics: MFU, MBU, tokens for each chip.

Counted is what the mathematics need, by the tokens that were there: no padding, no slot that waits, nothing
that is computed again in the backward pass, no scores of attention that a mask or a window hides. The
operations are those of roofline.py; attention is counted at the mean length of a sequence, a little too few
where lengths differ. Demonstrations of a PTX mix and reward models of another kind are counted with padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from rlhf_jax.chips import peak_of
from rlhf_jax.machine import num_chips
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.plan import Plan
from rlhf_jax.programs import rows_per_unit
from rlhf_jax.roofline import Lengths, Work, phase_works

Utilization = Callable[[Mapping[str, float]], dict[str, float]]
"""Metrics of a step -> further ones."""


def utilization(plan: Plan, mesh: Mesh, sampling: Mesh) -> Utilization:
    """Returns what tells how well a step of a stage has used the devices.

    It reads the tokens, sequences and seconds among a step's metrics, and tells

        perf/tokens_per_s_per_chip
        perf/mfu                      operations of the step / (its seconds * peak of all devices)
        perf/score_mfu, update_mfu    the same of a phase of an online step
        perf/rollout_mbu              bytes that sampling needs / (its seconds * peak of the memory)

    all but the first where the peak of the device is known. Where rollouts have devices of their own, the
    phases overlap, and only the step is told.

    Args:
        plan: of the stage.
        mesh: that is trained on.
        sampling: that is sampled on; the same where rollouts have no devices of their own.
    """
    devices, kind = mesh.size, mesh.devices.flat[0].device_kind
    every_device = devices + (0 if sampling is mesh else sampling.size)
    peak, chips = peak_of(kind), num_chips(every_device, kind)
    whole = dict.fromkeys(mesh.shape, 1)

    def used(found: Mapping[str, float]) -> dict[str, float]:
        told = {"perf/tokens_per_s_per_chip": found["perf/tokens_per_s"] / chips}
        if peak is None:
            return told
        flops = {name: work.flops for name, work in needed_works(plan, whole, found).items()}
        told["perf/mfu"] = sum(flops.values()) / (found["perf/step_seconds"] * every_device * peak.flops)
        if sampling is not mesh or not isinstance(plan.stage.settings, OnlineConfig):
            return told
        for phase in ("score", "update"):
            seconds = found[f"perf/{phase}_seconds"]
            told[f"perf/{phase}_mfu"] = flops[phase] / (seconds * devices * peak.flops)
        read = needed_works(plan, mesh.shape, found)["rollout"].bytes
        told["perf/rollout_mbu"] = read / (found["perf/rollout_seconds"] * peak.bytes)
        return told

    return used


def needed_works(plan: Plan, mesh_shape: Mapping[str, int], found: Mapping[str, float]) -> dict[str, Work]:
    """Returns what a chip has to do in each phase of a step, of greedy completions as part of the others.

    Args:
        plan: of the stage.
        mesh_shape: sizes of its axes.
        found: metrics of the step.
    """
    stage, settings = plan.stage, plan.stage.settings
    model = dataclasses.replace(stage.model, remat="none")
    plan = plan._replace(stage=dataclasses.replace(stage, model=model))
    works = phase_works(plan, mesh_shape, 0.0, step_lengths(plan, found))
    if isinstance(settings, OnlineConfig):
        for name in ("rollout", "score"):
            work = works[name] + works.pop(f"greedy_{name}", Work())
            works[name] = work.times(found.get("rollout/rollouts", 1.0))
        num_steps = settings.num_epochs * settings.num_minibatches
        # The minibatch whose KL ended an update was computed.
        idle = max(found.get("update/stopped", 0.0) - 1 / num_steps, 0.0)
        works["update"] = works["update"].times(1 - idle)
    return works


def step_lengths(plan: Plan, found: Mapping[str, float]) -> Lengths:
    """Returns the mean lengths of a step's rows, from its metrics."""
    stage, settings = plan.stage, plan.stage.settings
    tokens, prompts, sequences = (found[f"perf/{name}"] for name in ("tokens", "prompt_tokens", "sequences"))
    if isinstance(settings, OnlineConfig):
        prompt, new = prompts / sequences, tokens / sequences
        return Lengths(row=prompt + new, sequence=prompt + new, columns=new, prompt=prompt, new=new)
    rows = settings.rows_per_update * rows_per_unit(stage, plan.algorithm)
    if plan.algorithm.minibatch_stats is not None:  # it has as many rows of its own
        rows *= 2
    return Lengths(row=tokens / rows, sequence=tokens / sequences, columns=(tokens - prompts) / rows)
