"""Each role's parameters on the mesh: of a stage of this or another run, a checkpoint, or a fresh start."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from rlhf_jax import keys
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.batch import Params
from rlhf_jax.checkpoint import load_aux, load_info, load_params
from rlhf_jax.config import ModelConfig, StageConfig
from rlhf_jax.models import hf
from rlhf_jax.models.heads import average, fold_normalizer, init_score_head, zero_score_head
from rlhf_jax.models.lora import merge
from rlhf_jax.models.peft import read_adapter
from rlhf_jax.models.scorers import RAW, Normalizer, Role, load_scorer, read_scorer
from rlhf_jax.models.transformer import POLICY, Model, make_model
from rlhf_jax.offline_config import RewardModelConfig
from rlhf_jax.origins import (
    Origins,
    check_base,
    checked_base,
    is_stage_dir,
    reward_adapter_info,
    stored_adapters,
    stored_ensemble,
)
from rlhf_jax.role_parts import part_shardings, part_structs, role_parts, role_shardings
from rlhf_jax.sharding import Memory, in_memory, replicated


def load_roles(
    stage: StageConfig,
    algorithm: Algorithm,
    where: Origins,
    model: Model,
    mesh: Mesh,
    root: Array,
    teacher: Model | None = None,
) -> tuple[Params, Params]:
    """Returns (trained, frozen): parameters by role, on the mesh; `role_parts` says what each holds.

    policy     the stage or checkpoint that this stage starts from, or fresh; or a fresh adapter to it
               (or the one that the stage goes on with, also of a reward model, with a head where it has one)
    base       with adapters: that policy, or of a reward model its trunk
    reference  a copy of that policy; of a base there is none
    reward     to be read: the reward stage's or checkpoint's, its normaliser folded into the head;
               to be trained: the policy's trunk, a fresh one or a fresh adapter to it, with a fresh head
    value      a copy of that reward model where it has the parts that the value model has, or without one the
               policy's trunk, or a fresh adapter to it, with a zero head
    teacher    the policy of the stage or checkpoint that is the teacher, a model of its own kind

    Raises:
        ValueError: adapters of a model that has changed, or of another than this stage's base.
    """
    cfg, width, reads = stage.model, model.architecture.hidden_size, algorithm.reads(stage.settings)
    # Beside adapters it is the base and nothing else, and never in the host's memory in a wider type.
    policy_dtype = "float32" if model.lora is None else cfg.base_dtype
    settings = stage.settings
    is_fresh = isinstance(settings, RewardModelConfig) and settings.fresh_trunk
    policy = (
        load_policy(where.policy, model, mesh, policy_dtype)
        if where.policy and not is_fresh
        else _fresh(model, mesh, root)
    )
    lora = model.lora if reward_adapter_info(where.reward) else None  # of the reward model
    parts = role_parts(stage, algorithm, reward_is_whole=lora is None)
    start, reward = None, None
    if where.reward is not None and lora is not None:
        check_base(stage, where, lora)
        adapter, normalizer = load_adapter(where.reward, "reward", model, mesh)
        reward = _fold(adapter, *normalizer)
    elif where.reward is not None:
        is_copied = "trunk" in parts.get("value", ())  # what is trained starts unrounded
        reward = load_reward(where.reward, model, mesh, "float32" if is_copied else cfg.role_dtype)
    if where.adapter is not None:
        adapters = part_shardings(model, mesh, ("adapter",))["adapter"]
        start = read_adapter(where.adapter, model.architecture, adapters)

    def made(role: str) -> Params | None:
        match role:
            case "reward" if role in reads:
                return reward
            case "value" if reward is not None and reward.keys() == set(parts[role]):
                return reward
        heads = {
            "reward": lambda: (
                (start and start.score_head)
                or init_score_head(keys.named(root, "head"), width, model.ensemble.num_heads)
            ),
            "value": lambda: zero_score_head(width),
        }
        number = (*algorithm.trains, *reads, "base").index(role)
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

    def placed(role: str, dtype: str, memory: Memory = "device") -> Params | None:
        weights = made(role)
        if weights is None:
            return None
        shardings = part_shardings(model, mesh, weights)
        # These are what was loaded, the other roles copies, so that the trained ones can be donated.
        is_loaded = "trunk" in weights and (
            role in ("policy", "base") or (role == "reward" and role in reads)
        )
        is_ready = is_loaded and jax.tree.leaves(weights["trunk"])[0].dtype == jnp.dtype(dtype)
        return _moved(weights if is_ready else _copy(weights, shardings, dtype), memory)

    trained = {role: placed(role, "float32") for role in algorithm.trains}
    frozen = {role: placed(role, cfg.role_dtype, cfg.frozen_memory) for role in reads if role in parts}
    if "base" in parts:
        frozen["base"] = placed("base", cfg.base_dtype)
    if teacher is not None:
        assert where.teacher is not None
        frozen["teacher"] = load_policy(where.teacher, teacher, mesh, cfg.role_dtype)
    return trained, {role: weights for role, weights in frozen.items() if weights is not None}


def load_policy(path: Path, model: Model, mesh: Mesh, dtype: hf.Dtype = "float32") -> Params:
    """Returns the policy of a stage's newest checkpoint or of a Hugging Face directory, on the mesh.

    An adapter is merged with the model that it belongs to, in float32, and the sum is rounded to the dtype.
    """
    if is_stage_dir(path):
        return _load_whole(path, "policy", model, mesh, dtype)
    return hf.load_policy(path, model.architecture, role_shardings(model, mesh, "policy"), dtype)


def _fresh(model: Model, mesh: Mesh, root: Array) -> Params:
    init = jax.jit(model.init_policy, out_shardings=role_shardings(model, mesh, "policy"))
    return init(keys.named(root, "init"))


def load_reward(path: Path, model: Model, mesh: Mesh, dtype: hf.Dtype = "float32") -> Params:
    """Returns the reward model of a stage or Hugging Face directory, its normaliser folded into the head.

    The trunk is of the dtype, the head float32. Several heads, each with its normaliser, become the one of
    their mean, unless the model has as many.
    """
    if not is_stage_dir(path):
        return load_scorer(path, read_scorer(path), role_shardings(model, mesh, "reward"), dtype)
    if model.ensemble.num_heads > 1:
        return _fold(_load_whole(path, "reward", model, mesh, dtype), *_normalizers(path))
    scorer, normalizer = load_trained_scorer(path, "reward", model, mesh, dtype)
    return _fold(scorer, *normalizer)


def load_frozen_reward(cfg: ModelConfig, path: Path, model: Model, mesh: Mesh) -> Params:
    """Returns the reward model in the type, and in the memory, of frozen models of their own."""
    return _moved(load_reward(path, model, mesh, cfg.role_dtype), cfg.frozen_memory)


def load_trained_scorer(
    path: Path, role: Role, model: Model, mesh: Mesh, dtype: hf.Dtype = "float32"
) -> tuple[Params, Normalizer]:
    """Returns a stage's reward or value model as it was trained, on the mesh, and its scores' normaliser.

    Several heads become one, see `load_reward`, which needs no normaliser.
    """
    return _with_one_head(path, role, _load_whole(path, role, model, mesh, dtype), mesh)


def load_adapter(path: Path, role: str, model: Model, mesh: Mesh) -> tuple[Params, Normalizer]:
    """Returns the adapter of a stage's role, with a scorer's head, and its scores' normaliser.

    The model that they belong to is not read, and need not be there.
    """
    parts = ("adapter",) if role == "policy" else ("adapter", "score_head")
    model = make_model(model.architecture, lora=model.lora, ensemble=stored_ensemble(load_info(path)))
    return _with_one_head(path, role, load_params(path, role, part_structs(model, mesh, parts)), mesh)


def _with_one_head(path: Path, role: str, weights: Params, mesh: Mesh) -> tuple[Params, Normalizer]:
    if role != "reward":
        return weights, RAW
    if weights["score_head"]["kernel"].ndim == 1:
        return weights, Normalizer(*map(float, _normalizers(path)))
    folded = _fold(weights, *_normalizers(path))
    head = jax.device_put(jax.jit(average)(folded["score_head"]), replicated(mesh))
    return folded | {"score_head": head}, RAW


def _normalizers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    aux = load_aux(path)
    return aux["normalizer_mean"], aux["normalizer_std"]


def _fold(weights: Params, mean: ArrayLike, std: ArrayLike) -> Params:
    fold = jax.jit(partial(fold_normalizer, mean=mean, std=std))
    head = weights["score_head"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, head)
    return weights | {"score_head": jax.device_put(fold(head), shardings)}


def _load_whole(path: Path, role: str, model: Model, mesh: Mesh, dtype: hf.Dtype) -> Params:
    """Returns a role of a stage as a model of its own: what its tree lacks comes from its base."""
    info = load_info(path)
    lora = stored_adapters(info)
    model = make_model(model.architecture, lora=lora, ensemble=stored_ensemble(info))
    shardings = role_shardings(model, mesh, role)
    parts = info["parts"][role] if "parts" in info else tuple(shardings)
    own = load_params(path, role, part_structs(model, mesh, parts, dtype))
    if "trunk" in own:
        return own
    if lora is None:  # a head on the policy
        return {"trunk": load_policy(path, model, mesh, dtype)["trunk"]} | own
    base = load_policy(checked_base(path, info), model, mesh, info["base"]["dtype"])

    def merged(base: Params, own: Params) -> Params:
        whole = base | own | {"trunk": merge(base["trunk"], own["adapter"], lora)}
        return _typed({part: whole[part] for part in shardings}, dtype)

    return jax.jit(merged, out_shardings=shardings)(base, own)


def _copy(params: Params, shardings: Params, dtype: str) -> Params:
    """Returns the parameters, see `_typed`, in buffers of their own, so that the trained can be donated."""
    return jax.jit(partial(_typed, dtype=dtype), out_shardings=shardings)(params)


def _typed(params: Params, dtype: str) -> Params:
    """Returns copies of a role's parameters: trunk and LM head of the dtype, the rest float32."""
    types = {part: dtype if part in POLICY else "float32" for part in params}
    return {
        part: jax.tree.map(lambda leaf, to=types[part]: jnp.array(leaf, to, copy=True), weights)
        for part, weights in params.items()
    }


def _moved(params: Params, memory: Memory) -> Params:
    """Returns a role's parameters in that memory; of the host only a model of its own, which has a trunk."""
    if memory == "device" or "trunk" not in params:
        return params
    return jax.device_put(params, in_memory(jax.tree.map(lambda x: x.sharding, params), memory))
