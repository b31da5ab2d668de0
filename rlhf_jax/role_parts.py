"""Which weights each role of a stage has, and where they, and what is kept of them, lie on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import Params, TrainState
from rlhf_jax.config import StageConfig
from rlhf_jax.models.kv_cache import DecodeWeights, by_layer
from rlhf_jax.models.transformer import POLICY, SCORER, Model
from rlhf_jax.optim import map_moments
from rlhf_jax.sharding import (
    Memory,
    decode_shardings,
    in_memory,
    param_shardings,
    placed_structs,
    replicated,
)

Parts = dict[str, tuple[str, ...]]
"""By role: which of trunk, lm_head, score_head and adapter its tree holds."""


def role_parts(stage: StageConfig, algorithm: Algorithm, *, reward_is_whole: bool = False) -> Parts:
    """Returns the parts of each role, and of the frozen `base` where roles are adapters on one.

    A trunk that a role lacks is the base's; a value model's without a base is the policy's. The reference of
    a base is the base alone, and has no tree.

    Args:
        stage: lora.rank and model.sharing decide.
        algorithm: of the stage.
        reward_is_whole: the frozen reward model was trained without adapters.
    """
    has_base = stage.lora.rank >= 1
    parts: Parts = {}
    reads = algorithm.reads(stage.settings)
    for role in (*algorithm.trains, *reads):
        own_trunk = not has_base or (role == "reward" and role in reads and reward_is_whole)
        if role in ("value", "reward"):
            shares = role == "value" and stage.model.sharing == "trunk"
            parts[role] = ("score_head",) if shares else SCORER if own_trunk else ("adapter", "score_head")
        elif own_trunk or role == "policy":
            parts[role] = POLICY if own_trunk else ("adapter",)
    if has_base:
        parts["base"] = POLICY if "policy" in algorithm.trains else ("trunk",)
    return parts


def part_shardings(model: Model, mesh: Mesh, parts: Iterable[str]) -> Params:
    """Returns the sharding of every parameter of these parts, of those that the model has."""
    parts = tuple(parts)
    return param_shardings(mesh, model.axes_of(parts), model.shapes_of(parts))


def part_structs(
    model: Model, mesh: Mesh, parts: Iterable[str], dtype: str = "float32", memory: Memory = "device"
) -> Params:
    """Returns shape structs of the parameters of these parts, of those that the model has, with shardings.

    Args:
        model: the transformer.
        mesh: where they lie.
        parts: see `Parts`.
        dtype: of trunk and LM head; heads of scores and adapters are float32.
        memory: where they lie if a trunk is among them; adapters and heads alone are on the devices.
    """
    shapes = model.shapes_of(parts)
    shardings = part_shardings(model, mesh, shapes)
    if "trunk" in shapes:
        shardings = in_memory(shardings, memory)

    def structs(part: str) -> Params:
        to = dtype if part in POLICY else "float32"
        typed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, to), shapes[part])
        return placed_structs(typed, shardings[part])

    return {part: structs(part) for part in shapes}


def role_shardings(model: Model, mesh: Mesh, role: str) -> Params:
    """Returns the sharding of every parameter of a role that is a model of its own."""
    return part_shardings(model, mesh, SCORER if role in ("value", "reward") else POLICY)


def weight_shardings(model: Model, mesh: Mesh, policy_parts: Iterable[str]) -> DecodeWeights:
    """Returns the sharding of each of the weights that decoding reads."""
    parts = tuple(policy_parts)
    stacked = decode_shardings(mesh, model.axes_of(parts), model.shapes_of(parts))

    def of_layer(_: int, sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))

    return by_layer(stacked, of_layer, model.architecture, model.lora)


def state_shardings(
    model: Model, mesh: Mesh, parts: Parts, init: Callable[[Params], TrainState], roles: Iterable[str]
) -> TrainState:
    """Returns the sharding of every leaf of the train state.

    What an optimiser keeps of a parameter lies as the parameter does, where it has its shape. The rest is on
    every device: counts, and the rows and columns of factored second moments, a thousandth of the matrices.

    Args:
        model: the transformer.
        mesh: where it all lies.
        parts: of each role.
        init: makes the state of parameters by role.
        roles: that are trained.
    """
    shapes = {role: model.shapes_of(parts[role]) for role in roles}
    params = {role: part_shardings(model, mesh, parts[role]) for role in shapes}
    state = jax.eval_shape(init, shapes)
    everywhere = jax.tree.map(lambda _: replicated(mesh), state)

    def beside(leaf: Array, param: jax.ShapeDtypeStruct) -> NamedSharding:
        assert isinstance(param.sharding, NamedSharding)
        return param.sharding if leaf.shape == param.shape else replicated(mesh)

    def opt_state(role: str) -> Params:
        lying = placed_structs(shapes[role], params[role])
        return map_moments(beside, lambda _: replicated(mesh), state.opt_state[role], lying)

    return everywhere._replace(params=params, opt_state={role: opt_state(role) for role in shapes})
