"""The least time that a step of a stage can take on a TPU: operations and bytes against the chip's rates.

An estimate, made without compiling: of matrix products with weights and of attention, at the lengths that the
options allow, each array read or written once for each product. Norms, sampling and the like are left out,
and so is all overhead. What chips send each other comes from the compiled programs, see hlo.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp

from rlhf_jax.chips import Chip
from rlhf_jax.config import StageConfig
from rlhf_jax.hlo import Collective
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.row_attention import FLASH_LENGTH
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.plan import Plan
from rlhf_jax.programs import rows_per_unit

Bound = Literal["matrix", "memory", "network"]
ROW_AXES = ("slice", "data", "fsdp", "expert")
"""Axes of the mesh that divide rows."""
BETWEEN_SLICES = "slice"
_ALSO = {
    "rollout": ("rollout_start",),
    "greedy_rollout": ("greedy_rollout_start",),
    "score": ("reward", "advantages"),
}
"""Programs of phases beside those of their names; reward is that of a reward model of its own kind."""


class Work(NamedTuple):
    """What a chip does."""

    flops: float = 0.0
    bytes: float = 0.0
    """Of its memory, read and written."""

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        """Returns both."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> Work:
        """Returns so many of it."""
        return Work(self.flops * count, self.bytes * count)


class Phase(NamedTuple):
    """The least seconds of a part of a step, by what they are spent on; they may pass at the same time."""

    work: Work
    sent: float
    """Bytes that a chip sends to others."""
    matrix: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Returns the longest of the three."""
        return max(self.matrix, self.memory, self.network)

    @property
    def bound(self) -> Bound:
        """Returns what is the longest of the three."""
        return max(("matrix", "memory", "network"), key=lambda name: getattr(self, name))


def layer_shapes(architecture: Architecture) -> list[tuple[int, int]]:
    """Returns inputs and outputs of the matrices of a block that a token meets, of its experts too."""
    width, mlp = architecture.hidden_size, architecture.mlp_size
    queries, keys = (n * architecture.head_dim for n in (architecture.num_heads, architecture.num_kv_heads))
    of_mlp = [(width, mlp)] * (1 + architecture.gated) + [(mlp, width)]
    experts = max(architecture.experts_per_token, 1)
    return [(width, queries), (width, keys), (width, keys), (queries, width), *of_mlp * experts]


class Passes(NamedTuple):
    """How often the operations of a forward pass are done."""

    products: float = 1.0
    """Those of products with weights."""
    attention: float = 1.0
    """Those of queries, keys and values, which have derivatives also where all weights are frozen."""

    def __add__(self, other: Passes) -> Passes:  # type: ignore[override]
        """Returns both, one behind the other."""
        return Passes(self.products + other.products, self.attention + other.attention)


ONCE = Passes()


class ModelOnChip(NamedTuple):
    """A model on a mesh: what one of its chips does of a pass."""

    architecture: Architecture
    tensor: int
    size: int
    """Bytes of a number."""
    holds_scores: bool
    """Attention writes the scores of all pairs of tokens."""
    expert: int = 1
    """Chips that divide the experts."""

    def products(self, tokens: float, shapes: Iterable[tuple[int, int]]) -> Work:
        """Returns products of a chip's tokens with weights, which tensor divides, and so their wider side."""
        work = Work()
        for k, n in shapes:
            weights = k * n / self.tensor
            arrays = min(k, n) + max(k, n) / self.tensor
            work += Work(2 * tokens * weights, self.size * (weights + tokens * arrays))
        return work

    def blocks(self, tokens: float) -> Work:
        """Returns the products of a chip's tokens with the weights of all layers.

        Of the experts that lie on the chip as many are read as its tokens meet at most.
        """
        of = self.architecture
        work = self.products(tokens, layer_shapes(of))
        if of.num_experts:
            met = min(of.num_experts / self.expert, tokens * of.experts_per_token)
            weights = (2 + of.gated) * of.hidden_size * of.mlp_size / self.tensor
            work += Work(0.0, self.size * weights * (met - of.experts_per_token))
        return work.times(of.num_layers)

    def trunk(self, tokens: float, length: float, passes: Passes = ONCE) -> Work:
        """Returns passes over a chip's tokens, each of which sees half of the length on average.

        In layers with a window it sees no more than that.
        """
        of = self.architecture
        heads, kv_heads = (
            of.num_heads * of.head_dim / self.tensor,
            of.num_kv_heads * of.head_dim / self.tensor,
        )
        attention = Work(0.0, 2 * self.size * tokens * (heads + kv_heads))
        if self.holds_scores:
            attention += Work(0.0, 4 * 4 * tokens * length * of.num_heads / self.tensor)
        attention = attention.times(of.num_layers)
        attention += Work(4 * tokens * sum(_seen(length, kind.window) for kind in of.layer_kinds) * heads)
        return self.blocks(tokens).times(passes.products) + attention.times(passes.attention)

    def head(self, columns: float, passes: Passes = ONCE) -> Work:
        """Returns the LM head's product."""
        shape = self.architecture.hidden_size, self.architecture.vocab_size
        return self.products(columns, [shape]).times(passes.products)

    def decode_step(self, rows: float, prompt: float, completed: float, group_size: int) -> Work:
        """Returns a token of each of a chip's rows, after a prompt and so many others.

        A group of rows reads the keys and values of its prompt once.
        """
        of, attention = self.architecture, Work()
        for kind in of.layer_kinds:
            own = min(completed, kind.window or completed)
            shared = min(prompt, kind.window - own if kind.window else prompt)
            seen, read = (rows * (shared / by + own) * of.head_dim / self.tensor for by in (1, group_size))
            attention += Work(4 * seen * of.num_heads, 2 * self.size * read * of.num_kv_heads)
        return self.blocks(rows) + attention + self.head(rows)


def _seen(length: float, window: int) -> float:
    """Returns how many tokens one of a sequence sees on average: half of them, or fewer in a window."""
    most = min(window or length, length)
    return most - most**2 / (2 * length) if length else 0.0


class Lengths(NamedTuple):
    """How many tokens a step's rows have on average."""

    row: float
    """Of a row, of a packed one those of all its sequences."""
    sequence: float
    """Of a sequence."""
    columns: float
    """Of a row, those of which the LM head tells the log-probability."""
    prompt: float = 0.0
    """Of a prompt that is completed."""
    new: float = 0.0
    """Of a completion that is sampled."""


def longest(plan: Plan) -> Lengths:
    """Returns the most that the options allow."""
    stage = plan.stage
    if not stage.is_online:
        length = plan.train.length
        return Lengths(row=length, sequence=stage.data.max_length, columns=length)
    prompt, new = stage.data.max_prompt_length, stage.rollout.max_new_tokens
    return Lengths(row=prompt + new, sequence=prompt + new, columns=new, prompt=prompt, new=new)


def phase_works(
    plan: Plan, mesh_shape: Mapping[str, int], state_bytes: float, lengths: Lengths | None = None
) -> dict[str, Work]:
    """Returns what a chip does in each phase of a step: update, online rollout and score before it, and
    greedy_ of both where greedy completions are read.

    Args:
        plan: of the stage.
        mesh_shape: sizes of its axes.
        state_bytes: of what optimisers step on a chip: parameters and moments.
        lengths: of a step's rows, none of which waits for a longer one; by default the longest that are
            allowed.
    """
    stage, algorithm = plan.stage, plan.algorithm
    settings, attention = stage.settings, stage.model.attention
    row_parts, tensor = math.prod(mesh_shape[axis] for axis in ROW_AXES), mesh_shape["tensor"]
    parts = row_parts * mesh_shape["sequence"]
    length, sequence, columns, prompt, new = lengths or longest(plan)
    rows = settings.rows_per_update * rows_per_unit(stage, algorithm)

    def model_of(architecture: Architecture, length: float, *, forward_mode: bool = False) -> ModelOnChip:
        is_short = attention == "auto" and length < FLASH_LENGTH
        holds_scores = attention == "xla" or is_short or forward_mode
        size = jnp.dtype(stage.model.dtype).itemsize
        return ModelOnChip(architecture, tensor, size, holds_scores, mesh_shape["expert"])

    model = model_of(plan.architecture, length, forward_mode=settings.forward_mode)

    def forward(role: str, share: float = 1.0, passes: Passes = ONCE) -> Work:
        """Returns passes of a role over a share of the rows."""
        is_shared = role == "value" and stage.model.sharing == "trunk"
        trunk = Work() if is_shared else model.trunk(rows * share * length / parts, sequence, passes)
        has_words = role in ("policy", "reference")
        return trunk + (model.head(rows * share * columns / parts, passes) if has_words else Work())

    def teacher(share: float) -> Work:
        """Returns a pass of the teacher over a share of the rows."""
        if plan.teacher is None:
            return Work()
        of = model_of(plan.teacher, length)
        return of.trunk(rows * share * length / parts, sequence) + of.head(rows * share * columns / parts)

    reads = algorithm.reads(settings)
    works: dict[str, Work] = {}
    if isinstance(settings, OnlineConfig):
        roles = [role for role in plan.parts() if role != "base"]
        roles += ["reference"] * ("base" in plan.parts())  # the base itself is that
        prompts = settings.batch_size
        decoding = model._replace(holds_scores=False)

        def rollout(sampled: int, group_size: int) -> Work:
            slots = min(stage.rollout.slots or sampled, sampled)
            of_token = decoding.decode_step(slots / row_parts, prompt, new / 2, group_size)
            of_prompts = model.trunk(prompts * prompt / row_parts, prompt)
            steps = new * sampled / slots if lengths else _decode_steps(stage, sampled)
            return of_prompts + of_token.times(steps)

        def external(sampled: int) -> Work:
            if plan.external is None:
                return Work()
            read = plan.external.reader.row_length(math.ceil(length))
            return model_of(plan.external.architecture, read).trunk(sampled * read / parts, read)

        def score(roles: Iterable[str], sampled: int) -> Work:
            return sum((forward(role, sampled / rows) for role in roles), external(sampled))

        sampled = settings.rows_per_rollout
        works["rollout"] = rollout(sampled, settings.group_size)
        works["score"] = score(roles, sampled)
        if algorithm.reads_greedy(settings):
            works["greedy_rollout"] = rollout(prompts, 1)
            works["greedy_score"] = score({"reward"} & set(roles), prompts)
    num_minibatches = settings.num_minibatches
    rows_of_one = rows // num_minibatches
    pieces = max(
        rows_of_one // (settings.microbatch_size * rows_per_unit(stage, algorithm) or rows_of_one), 1
    )
    share = 1 / num_minibatches / pieces
    # Forward, and backward for inputs and weights; frozen weights have no gradient.
    backward = Passes(1 + (stage.lora.rank == 0), 2)
    passes = ONCE + backward + (ONCE if stage.model.remat in ("full", "offload") else Passes(0, 0))
    stepped = [role for role in algorithm.trains if role not in algorithm.without_optimizer]
    of_piece = sum((forward(role, share, passes) for role in stepped), teacher(share))
    if plan.ptx is not None:
        rows_of_piece = rows * share / parts
        of_piece += model.trunk(rows_of_piece * plan.ptx.length, plan.ptx.longest_row, passes)
        of_piece += model.head(rows_of_piece * plan.ptx.most_loss_tokens, passes)
    if not stage.is_online:
        of_piece += sum((forward(role, share) for role in reads), Work())
        if algorithm.minibatch_stats is not None:
            of_piece += sum((forward(role, share) for role in (*algorithm.trains, *reads)), Work())
    optimizer = Work(0.0, 2 * state_bytes)
    of_minibatch = of_piece.times(pieces) + optimizer
    works["update"] = of_minibatch.times(settings.num_epochs * num_minibatches)
    for role in algorithm.without_optimizer:
        # Once over the batch: a gradient; one product with the Fisher matrix, for which a derivative along a
        # direction comes first, as much as a backward pass; such a derivative for the length of the step; one
        # trial, of the new policy beside the old one.
        gradient, product, length_of_step, trial = passes, passes + backward, ONCE + backward, ONCE + ONCE
        every = gradient + product + length_of_step + trial
        works["update"] += forward(role, share, every).times(pieces * num_minibatches)
    return works


def phases_of(
    works: Mapping[str, Work], chip: Chip, collectives: Mapping[str, Sequence[Collective]], stage: StageConfig
) -> dict[str, Phase]:
    """Returns the least time of each phase.

    Args:
        works: of `phase_works`, on a chip.
        chip: that does it.
        collectives: of each program that was compiled.
        stage: says how often the loop of a rollout goes round: of those in it the one that sends least is
            that of tokens. Other loops of unknown length go round once.
    """
    flops, memory, link, network = (
        rate / chip.devices for rate in (chip.bf16_flops, chip.hbm_rate, chip.link_rate, chip.network_rate)
    )
    steps, settings = {}, stage.settings
    if isinstance(settings, OnlineConfig):
        sampled = {"rollout": settings.rows_per_rollout, "greedy_rollout": settings.batch_size}
        steps = {name: _decode_steps(stage, count) for name, count in sampled.items()}
    found = {}
    for name, work in works.items():
        sent = seconds = 0.0
        for program in (name, *_ALSO.get(name, ())):
            for one, count in _counted(collectives.get(program, ()), steps.get(program, 1)):
                sent += one.sent * count
                # An axis is taken to be a ring along a dimension of the torus: two links of each chip.
                seconds += one.sent * count / (network if BETWEEN_SLICES in one.axes else 2 * link)
        found[name] = Phase(work, sent, work.flops / flops, work.bytes / memory, seconds)
    return found


def _decode_steps(stage: StageConfig, sampled: int) -> int:
    """Returns the most steps of decoding so many completions."""
    return stage.rollout.max_new_tokens * math.ceil(sampled / (stage.rollout.slots or sampled))


def _counted(collectives: Sequence[Collective], steps: int) -> Iterable[tuple[Collective, int]]:
    """Yields collectives, each with how often it is done beyond what the program tells; of decoding steps."""
    sums: dict[str, int] = {}
    for one in collectives:
        if one.loop:
            sums[one.loop] = sums.get(one.loop, 0) + one.sent
    of_tokens = min(sums, key=lambda loop: sums[loop], default="")
    for one in collectives:
        yield one, steps if one.loop and one.loop == of_tokens else 1
