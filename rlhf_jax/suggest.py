"""The fastest way to run a configuration that fits a slice: mesh, microbatches, rematerialisation, sharing.

Candidates are ordered by the least time that their step can take, estimated; those that cannot fit by an
estimate of their memory are left out; the others are compiled in turn until one fits. What the compiler says
of one that does not fit corrects the estimates of those that are like it: where they cannot fit by these,
they come behind all others, also behind other ways of sharing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.chips import Chip
from rlhf_jax.config import MeshConfig
from rlhf_jax.mesh_checks import check_mesh
from rlhf_jax.models.transformer import POLICY, make_model
from rlhf_jax.plan import Plan
from rlhf_jax.programs import rows_per_unit
from rlhf_jax.roofline import ROW_AXES, Work, phase_works
from rlhf_jax.sharding import axis_rules, make_mesh
from rlhf_jax.stage import stage_model
from rlhf_jax.stage_report import ProgramReport, StageReport, report_stage

REMATS = ("none", "dots", "full")
KEPT = {"none": 1.0, "dots": 0.5, "full": 0.0, "offload": 0.0}
"""The share of what a block computes that waits for the backward pass."""
FIRST = ("update", "rollout", "score", "greedy_rollout", "greedy_score")
"""Programs that are compiled before the others: those that need most, and have a least time."""
LONG = 8192
"""Rows from which on their tokens are divided too."""


class Candidate(NamedTuple):
    """A way to run a configuration."""

    sizes: Mapping[str, int]
    """Of the mesh."""
    rows: int
    """Of a microbatch on each chip that divides rows; 0: all."""
    remat: str
    sharing: str
    """Empty: as in the configuration."""

    def flags(self, plans: Sequence[Plan]) -> list[str]:
        """Returns the flags that set it for stages."""
        flags = [word for axis, size in self.sizes.items() for word in (f"--mesh.{axis}", str(size))]
        for plan in plans:
            name, algorithm = plan.stage.name, plan.stage.algorithm
            flags += [f"--stages.{name}.model.remat", self.remat]
            size = self.microbatch_size(plan)
            flags += [f"--stages.{name}.{algorithm}.microbatch_size", str(size)]
            if self.sharing and algorithm == "ppo":
                flags += [f"--stages.{name}.model.sharing", self.sharing]
                if self.sharing == "hydra" and not plan.stage.lora.rank:
                    flags += [f"--stages.{name}.lora.rank", "16"]
        return flags

    def microbatch_size(self, plan: Plan) -> int:
        """Returns the option's value for a stage; 0: a whole minibatch."""
        settings = plan.stage.settings
        of_minibatch = settings.rows_per_update // settings.num_minibatches
        of_minibatch //= getattr(settings, "sequences_per_row", 1)
        per_unit = rows_per_unit(plan.stage, plan.algorithm)
        size = self.rows * row_parts(self.sizes) // per_unit
        return 0 if not self.rows or size >= of_minibatch or of_minibatch % max(size, 1) else size


class Needs(NamedTuple):
    """About the bytes of a chip that a candidate takes, rather too few."""

    update: float
    rollout: float

    def corrected(self, candidate: Candidate, factors: Mapping[tuple[str, ...], float]) -> float:
        """Returns the most that it takes, by what was seen of others."""
        update = self.update * factors.get(("update", candidate.remat, candidate.sharing), 1.0)
        return max(update, self.rollout * factors.get(("rollout", candidate.sharing), 1.0))

    def correct(
        self, candidate: Candidate, program: str, found: int, factors: dict[tuple[str, ...], float]
    ) -> None:
        """Notes what a program of a candidate was found to take."""
        if program == "update":
            name, of = ("update", candidate.remat, candidate.sharing), self.update
        else:
            name, of = ("rollout", candidate.sharing), self.rollout
        factors[name] = max(factors.get(name, 1.0), found / max(of, 1.0))


class Suggestion(NamedTuple):
    """What was found."""

    flags: list[str]
    reports: list[StageReport]
    compiled: int
    """Candidates of which a program was compiled."""


class _DoesNotFitError(Exception):
    """A program of a candidate needs more than there is: its name and the bytes."""


def row_parts(sizes: Mapping[str, int]) -> int:
    """Returns over how many chips a mesh divides rows."""
    return math.prod(sizes.get(axis, 1) for axis in ROW_AXES)


def suggest(
    read: Callable[[Sequence[str]], list[Plan]],
    argv: Sequence[str],
    devices: Sequence[Any],
    chip: Chip,
    *,
    limit: int = 8,
    told: Callable[[str], None] = lambda line: None,
) -> Suggestion | None:
    """Returns the fastest way to run a configuration that fits; None where no candidate that was tried does.

    Args:
        read: gives the plans that flags ask for; raises ValueError where these do not go with each other.
        argv: the configuration's flags, --config FILE among them; what is suggested comes in their place.
        devices: descriptions of those of the slices.
        chip: what they are.
        limit: the most candidates that are compiled.
        told: called with a line for each candidate.
    """
    plans = read(argv)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    compiled = 0
    failed: list[tuple[Candidate, str]] = []
    factors: dict[tuple[str, ...], float] = {}
    seen: set[tuple[str, ...]] = set()  # microbatches that do not divide are whole minibatches
    left = _ordered(plans, len(devices), num_slices, chip)
    while left and compiled < limit:
        likely = (of for of in left if of[1].corrected(of[0], factors) <= chip.device_memory)
        chosen = next(likely, left[0])
        left.remove(chosen)
        candidate, needs = chosen
        if any(_is_no_better(candidate, *of) for of in failed):
            continue
        flags = candidate.flags(plans)
        if tuple(flags) in seen:
            continue
        seen.add(tuple(flags))
        try:
            own = read(_merged(argv, flags))
            mesh_config = own[0].stage.mesh
            with axis_rules(mesh_config.axes):
                mesh = make_mesh(mesh_config, devices)
                check_mesh(own, mesh)
        except ValueError:
            continue  # heads, rows or options that do not go with it
        compiled += 1
        try:
            with axis_rules(mesh_config.axes):
                reports = _reports(own, mesh, chip)
        except _DoesNotFitError as error:
            program, found = error.args
            failed.append((candidate, program))
            needs.correct(candidate, program, found, factors)
            told(f"{' '.join(flags)}: {program} does not fit, it needs {found / 2**30:.1f} GiB")
            continue
        told(f"{' '.join(flags)}: fits")
        return Suggestion(flags, reports, compiled)
    return None


def _merged(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Returns the flags, without those of a configuration's that they replace."""
    ours, kept, words = set(flags[::2]), [], list(argv)
    while words:
        word = words.pop(0)
        value = [] if "=" in word or not words or words[0].startswith("--") else [words.pop(0)]
        if word.partition("=")[0] not in ours:
            kept += [word, *value]
    return [*kept, *flags]


def _reports(plans: Sequence[Plan], mesh: Mesh, chip: Chip) -> list[StageReport]:
    """Returns the reports of all stages; raises _DoesNotFitError at the first program that does not fit."""

    def check(program: ProgramReport) -> None:
        if program.has_failed or program.memory.peak > chip.device_memory:
            raise _DoesNotFitError(program.name, program.memory.peak)

    reports = []
    for plan in reversed(plans):
        first = report_stage(plan, mesh, chip, wanted=lambda name: name in FIRST, told=check, order=FIRST)
        others = report_stage(plan, mesh, chip, wanted=lambda name: name not in FIRST, told=check)
        reports.append(first._replace(programs=[*others.programs, *first.programs]))
    return reports[::-1]


def _is_no_better(candidate: Candidate, other: Candidate, program: str) -> bool:
    """Returns whether a candidate needs as much as another one, of which a program does not fit."""
    if (candidate.sizes, candidate.sharing) != (other.sizes, other.sharing):
        return False
    if program != "update":
        return True  # neither microbatches nor what is recomputed are read there
    has_more_rows = not candidate.rows or (bool(other.rows) and candidate.rows >= other.rows)
    return has_more_rows and REMATS.index(candidate.remat) <= REMATS.index(other.remat)


def _ordered(plans: Sequence[Plan], chips: int, num_slices: int, chip: Chip) -> list[tuple[Candidate, Needs]]:
    """Returns candidates that may fit, the fastest first; other ways of sharing behind all others."""
    found: list[tuple[int, float, float, Candidate, Needs]] = []
    longest = max(_length(plan) for plan in plans)
    for number, sharing in enumerate(_sharings(plans)):
        for sizes in _meshes(chips, num_slices, longest):
            for remat in REMATS:
                most = max(math.ceil(_minibatch_rows(plan) / row_parts(sizes)) for plan in plans)
                for rows in (0, *(2**k for k in range(10) if 2**k < most)):
                    candidate = Candidate(sizes, rows, remat, sharing)
                    seconds, of_plans = zip(
                        *(_estimate(plan, candidate, chip) for plan in plans), strict=True
                    )
                    needs = Needs(*map(max, zip(*of_plans, strict=True)))
                    if max(needs) <= chip.device_memory:
                        found.append((number, sum(seconds), max(needs), candidate, needs))
    return [(candidate, needs) for *_, candidate, needs in sorted(found, key=lambda of: of[:3])]


def _sharings(plans: Sequence[Plan]) -> list[str]:
    of_ppo = [plan.stage.model.sharing for plan in plans if plan.stage.algorithm == "ppo"]
    if not of_ppo or of_ppo[0] == "hydra":
        return [""]
    return ["", "hydra"] if of_ppo[0] == "trunk" else ["", "trunk", "hydra"]


def _meshes(chips: int, num_slices: int, longest: int) -> Iterator[dict[str, int]]:
    """Yields sizes of data, fsdp, sequence and tensor whose product with the slices is the chips' number."""
    within = chips // num_slices
    divisors = [size for size in range(1, within + 1) if within % size == 0]
    for tensor in (size for size in divisors if size <= 16):
        for sequence in divisors if longest >= LONG else (1,):
            if within % (tensor * sequence):
                continue
            others = within // (tensor * sequence)
            for data in (size for size in divisors if others % size == 0 and size in (1, 2, 4, others)):
                yield dict(slice=num_slices, data=data, fsdp=others // data, sequence=sequence, tensor=tensor)


def _length(plan: Plan) -> int:
    new = plan.stage.rollout.max_new_tokens if plan.stage.is_online else 0
    return plan.train.length + new


def _minibatch_rows(plan: Plan) -> int:
    settings = plan.stage.settings
    return settings.rows_per_update * rows_per_unit(plan.stage, plan.algorithm) // settings.num_minibatches


def _estimate(plan: Plan, candidate: Candidate, chip: Chip) -> tuple[float, Needs]:
    """Returns the least seconds of a step of a stage, and about what it takes of a chip."""
    stage, sizes = plan.stage, {**dict.fromkeys(MeshConfig().sizes, 1), **candidate.sizes}
    is_of_ppo = bool(candidate.sharing) and stage.algorithm == "ppo"
    rank = stage.lora.rank or (16 if is_of_ppo and candidate.sharing == "hydra" else 0)
    options: Any = {"remat": candidate.remat} | ({"sharing": candidate.sharing} if is_of_ppo else {})
    stage = dataclasses.replace(
        stage,
        model=dataclasses.replace(stage.model, **options),
        lora=dataclasses.replace(stage.lora, rank=rank),
        settings=dataclasses.replace(stage.settings, microbatch_size=candidate.microbatch_size(plan)),
    )
    of, tensor, divided = plan.architecture, sizes["tensor"], sizes["fsdp"] * sizes["tensor"]
    size = jnp.dtype(stage.model.dtype).itemsize
    shapes = stage_model(stage, of).shapes
    whole, adapter = (_count(shapes, parts) for parts in (("trunk", "lm_head"), ("adapter",)))
    roles, reads = len(plan.algorithm.trains), plan.algorithm.reads(stage.settings)
    if rank:
        trained, frozen = roles * adapter, whole * jnp.dtype(stage.model.base_dtype).itemsize
    else:
        trained = whole * (1 if stage.model.sharing == "trunk" else roles)
        is_near = stage.model.frozen_memory == "device"
        frozen = is_near * len(reads) * whole * jnp.dtype(stage.model.role_dtype).itemsize
    if plan.teacher is not None:
        frozen += _count(make_model(plan.teacher).shapes, POLICY) * jnp.dtype(stage.model.role_dtype).itemsize
    of_parameter = (
        jnp.dtype(stage.model.param_dtype).itemsize + 2 * jnp.dtype(stage.optimizer.state_dtype).itemsize
    )
    state = trained * of_parameter / divided
    resident = state + frozen / divided
    rows, length = _minibatch_rows(plan), _length(plan)
    pieces = max(rows // (stage.settings.microbatch_size * rows_per_unit(stage, plan.algorithm) or rows), 1)
    tokens = rows / pieces * length / row_parts(sizes) / sizes["sequence"]
    inner = (4 * of.hidden_size + 3 * of.mlp_size + 2 * of.num_heads * of.head_dim) / tensor
    kept = of.num_layers * tokens * size * (of.hidden_size + KEPT[candidate.remat] * inner)
    update = resident + trained * 4 / divided + roles * kept
    cache = 0.0
    if stage.is_online:
        sampled = getattr(stage.settings, "rows_per_rollout", 0)
        slots = min(stage.rollout.slots or sampled, sampled)
        per_token = 2 * of.num_layers * of.num_kv_heads * of.head_dim * size / tensor
        cache = slots / row_parts(sizes) * length * per_token + whole * size / tensor
    works = phase_works(plan._replace(stage=stage), sizes, state)
    seconds = sum(_seconds(work, chip) for work in works.values())
    sent = _sent(stage, pieces, whole * size, tokens, of.num_layers * of.hidden_size * size, sizes, roles)
    steps = stage.settings.num_epochs * stage.settings.num_minibatches
    return seconds + steps * sent * chip.devices / (2 * chip.link_rate), Needs(update, resident + cache)


def _sent(
    stage: Any, pieces: int, weights: float, tokens: float, width: float, sizes: Mapping[str, int], roles: int
) -> float:
    """Returns about the bytes that a chip sends in an optimiser step: weights and sums of activations."""
    fsdp, tensor, passes = sizes["fsdp"], sizes["tensor"], 2 + (stage.model.remat != "none")
    gathered = roles * pieces * passes * weights / tensor * (fsdp - 1) / fsdp
    summed = roles * pieces * passes * 2 * tokens * width * 2 * (tensor - 1) / tensor
    replicated = 0.0 if stage.lora.rank else 2 * roles * weights / tensor / fsdp * (sizes["data"] > 1)
    return gathered + summed + replicated


def _seconds(work: Work, chip: Chip) -> float:
    return max(work.flops / chip.bf16_flops, work.bytes / chip.hbm_rate) * chip.devices


def _count(shapes: Mapping[str, Any], parts: Sequence[str]) -> int:
    return sum(math.prod(x.shape) for part in parts for x in jax.tree.leaves(shapes.get(part, {})))
