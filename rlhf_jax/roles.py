"""Each role's parameters on the mesh: of a stage of this or another run, a checkpoint, or a fresh start."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import keys
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import Params
from rlhf_jax.checkpoint import load_aux, load_info, load_params
from rlhf_jax.config import StageConfig
from rlhf_jax.models import hf
from rlhf_jax.models.heads import fold_normalizer, init_score_head, zero_score_head
from rlhf_jax.models.lora import merge
from rlhf_jax.models.peft import read_adapter
from rlhf_jax.models.scorers import RAW, Normalizer, Role, load_scorer, read_scorer
from rlhf_jax.models.transformer import POLICY, Model, make_model
from rlhf_jax.origins import (
    Origins,
    check_base,
    checked_base,
    is_stage_dir,
    reward_adapter_info,
    stored_adapters,
)
from rlhf_jax.programs import part_shardings, role_parts, role_shardings
from rlhf_jax.sharding import placed_structs


def load_roles(
    stage: StageConfig, algorithm: Algorithm, where: Origins, model: Model, mesh: Mesh, root: Array
) -> tuple[Params, Params]:
    """Returns (trained, frozen): parameters by role, on the mesh; `role_parts` says what each holds.

    policy     the stage or checkpoint that this stage starts from, or fresh; or a fresh adapter to it
               (or the one that the stage goes on with, also of a reward model, with a head where it has one)
    base       with adapters: that policy, or of a reward model its trunk
    reference  a copy of that policy; of a base there is none
    reward     to be read: the reward stage's or checkpoint's, its normaliser folded into the head;
               to be trained: the policy's trunk, or a fresh adapter to it, with a fresh head
    value      a copy of that reward model where it has the parts that the value model has, or without one the
               policy's trunk, or a fresh adapter to it, with a zero head

    Raises:
        ValueError: adapters of a model that has changed, or of another than this stage's base.
    """
    policy = load_policy(where.policy, model, mesh) if where.policy else _fresh(model, mesh, root)
    width = model.architecture.hidden_size
    reward, is_whole = None, True
    if where.reward is not None:
        if model.lora is not None and reward_adapter_info(where.reward):
            check_base(stage, where, model.lora)
            reward, is_whole = _fold(*load_adapter(where.reward, "reward", model, mesh)), False
        else:
            reward = load_reward(where.reward, model, mesh)
    parts = role_parts(stage, algorithm, reward_is_whole=is_whole)
    start = None
    if where.adapter is not None:
        adapters = part_shardings(model, mesh, ("adapter",))["adapter"]
        start = read_adapter(where.adapter, model.architecture, adapters)

    def made(role: str) -> Params | None:
        match role:
            case "reward" if role in algorithm.reads:
                return reward
            case "value" if reward is not None and reward.keys() == set(parts[role]):
                return reward
        heads = {
            "reward": lambda: (
                (start and start.score_head) or init_score_head(keys.named(root, "head"), width)
            ),
            "value": lambda: zero_score_head(width),
        }
        number = (*algorithm.trains, *algorithm.reads, "base").index(role)
        adapter_key = jax.random.fold_in(keys.named(root, "adapter"), number)
        fresh = {
            "score_head": heads.get(role, dict),
            "adapter": lambda: start.params if start else jax.jit(model.init_adapter)(adapter_key),
        }
        return {
            part: fresh[part]() if part in fresh else policy[part]
            for part in parts[role]
            if part in model.shapes
        }

    def placed(role: str, dtype: str, memory: str = "device") -> Params | None:
        weights = made(role)
        if weights is None:
            return None
        shardings = part_shardings(model, mesh, weights)
        # These are what was loaded, the other roles copies, so that the trained ones can be donated.
        is_loaded = "trunk" in weights and (
            role == "policy" or (role == "reward" and role in algorithm.reads)
        )
        own = weights if is_loaded and dtype == "float32" else _copy(weights, shardings, dtype)
        if memory == "host" and "trunk" in weights:
            own = jax.device_put(own, jax.tree.map(lambda at: at.with_memory_kind("pinned_host"), shardings))
        return own

    cfg = stage.model
    trained = {role: placed(role, "float32") for role in algorithm.trains}
    frozen = {
        role: placed(role, cfg.role_dtype, cfg.frozen_memory) for role in algorithm.reads if role in parts
    }
    if "base" in parts:
        frozen["base"] = placed("base", cfg.base_dtype)
    return trained, {role: weights for role, weights in frozen.items() if weights is not None}


def load_policy(path: Path, model: Model, mesh: Mesh) -> Params:
    """Returns the policy of a stage's newest checkpoint or of a Hugging Face directory, on the mesh.

    An adapter is merged with the model that it belongs to.
    """
    if is_stage_dir(path):
        return _load_whole(path, "policy", model, mesh)
    return hf.load_policy(path, model.architecture, role_shardings(model, mesh, "policy"))


def _fresh(model: Model, mesh: Mesh, root: Array) -> Params:
    init = jax.jit(model.init_policy, out_shardings=role_shardings(model, mesh, "policy"))
    return init(keys.named(root, "init"))


def load_reward(path: Path, model: Model, mesh: Mesh) -> Params:
    """Returns the reward model of a stage or Hugging Face directory, its normaliser folded into the head."""
    if not is_stage_dir(path):
        return load_scorer(path, read_scorer(path), role_shardings(model, mesh, "reward"))
    return _fold(*load_trained_scorer(path, "reward", model, mesh))


def load_trained_scorer(path: Path, role: Role, model: Model, mesh: Mesh) -> tuple[Params, Normalizer]:
    """Returns a stage's reward or value model as it was trained, on the mesh, and its scores' normaliser."""
    return _load_whole(path, role, model, mesh), _normalizer(path, role)


def load_adapter(path: Path, role: str, model: Model, mesh: Mesh) -> tuple[Params, Normalizer]:
    """Returns the adapter of a stage's role, with a scorer's head, and its scores' normaliser.

    Raises:
        ValueError: the model that they belong to has changed.
    """
    checked_base(path, load_info(path))
    parts = ("adapter",) if role == "policy" else ("adapter", "score_head")
    abstract = placed_structs(model.shapes_of(parts), part_shardings(model, mesh, parts))
    return load_params(path, role, abstract), _normalizer(path, role)


def _normalizer(path: Path, role: str) -> Normalizer:
    if role != "reward":
        return RAW
    aux = load_aux(path)
    return Normalizer(float(aux["normalizer_mean"]), float(aux["normalizer_std"]))


def _fold(weights: Params, normalizer: Normalizer) -> Params:
    fold = jax.jit(partial(fold_normalizer, mean=normalizer.mean, std=normalizer.std))
    head = weights["score_head"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, head)
    return weights | {"score_head": jax.device_put(fold(head), shardings)}


def _load_whole(path: Path, role: str, model: Model, mesh: Mesh) -> Params:
    """Returns a role of a stage as a model of its own: what its tree lacks comes from its base."""
    info, shardings = load_info(path), role_shardings(model, mesh, role)
    lora = stored_adapters(info)
    model = make_model(model.architecture, lora=lora)
    parts = info["parts"][role] if "parts" in info else tuple(shardings)
    own = load_params(path, role, placed_structs(model.shapes_of(parts), part_shardings(model, mesh, parts)))
    if "trunk" in own:
        return own
    if lora is None:  # a head on the policy
        return {"trunk": load_policy(path, model, mesh)["trunk"]} | own
    base = load_policy(checked_base(path, info), model, mesh)
    base = _copy(base, part_shardings(model, mesh, base), info["base"]["dtype"])

    def merged(base: Params, own: Params) -> Params:
        whole = base | own | {"trunk": merge(base["trunk"], own["adapter"], lora)}
        return {part: jax.tree.map(jnp.float32, whole[part]) for part in shardings}

    return jax.jit(merged, out_shardings=shardings)(base, own)


def _copy(params: Params, shardings: Params, dtype: str = "float32") -> Params:
    """Returns the parameters in buffers of their own, so that the trained role can be donated.

    Args:
        params: of a role.
        shardings: of the parameters.
        dtype: of trunk and LM head; heads of scores and adapters are float32.
    """

    def copied(params: Params) -> Params:
        types = {part: dtype if part in POLICY else "float32" for part in params}
        return {
            part: jax.tree.map(lambda leaf, to=types[part]: jnp.array(leaf, to, copy=True), weights)
            for part, weights in params.items()
        }

    return jax.jit(copied, out_shardings=shardings)(params)
