"""Where each role's parameters come from: a stage of this or another run, a checkpoint, or a fresh start."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import keys
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params
from rlhf_jax.checkpoint import RESULT, load_aux, load_info, load_params, read_result
from rlhf_jax.config import StageConfig
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import fold_normalizer, init_score_head, zero_score_head
from rlhf_jax.models.scorers import RAW, Normalizer, Role, check_scorer, load_scorer, read_scorer
from rlhf_jax.models.transformer import Model
from rlhf_jax.programs import role_shardings

logger = logging.getLogger(__name__)


class Origins(NamedTuple):
    """Directories that a stage starts from: a stage's, a Hugging Face checkpoint's, or none: from scratch."""

    policy: Path | None
    reward: Path | None


def is_stage_dir(path: Path) -> bool:
    """Returns whether a directory is a stage's of some run."""
    return (path / "checkpoints").is_dir()


def origins(stage: StageConfig, stage_names: set[str]) -> Origins:
    """Returns where a stage starts from; names of stages of this run become their directories."""

    def directory(name: str) -> Path | None:
        if not name:
            return None
        return Path(stage.run.dir) / name if name in stage_names else Path(name)

    start = directory(stage.start_from) or (Path(stage.model.path) if stage.model.path else None)
    return Origins(start, directory(stage.reward_from))


def stored_architecture(path: Path, role: str) -> Architecture:
    """Returns the architecture of the policy, reward or value model in a stage's or Hugging Face directory.

    Args:
        path: the directory.
        role: policy, reward or value: what is to be found there.

    Raises:
        ValueError: there is no such model (the message names the stages of a run's directory), it is not
            finished, or its tensors do not fit its configuration.
    """
    if is_stage_dir(path):
        info = load_info(path)
        algorithm = ALGORITHMS.get(str(info.get("algorithm")))
        if algorithm is None or not isinstance(info.get("architecture"), dict):
            raise ValueError(f"the checkpoints in {path} are not those of a stage that this version can read")
        if role not in algorithm.trains:
            fitting = " or ".join(name for name, of in ALGORITHMS.items() if role in of.trains)
            raise ValueError(
                f"{path} is the result of {info['algorithm']}, which trains no {role}; "
                f"name the directory of a stage that runs {fitting}"
            )
        if read_result(path) is None:
            unfinished = f"stage {path} is not finished: it has no {RESULT}"
            if algorithm.normalizes_scores:
                raise ValueError(
                    f"{unfinished}, and its scores are not yet normalised; repeat the command of its run"
                )
            logger.warning("%s; its newest checkpoint is used", unfinished)
        return Architecture.from_dict(info["architecture"])
    architecture = checkpoint_architecture(path, role)
    if role == "policy":
        hf.check_policy(path, architecture)
    else:
        check_scorer(path, read_scorer(path))
    return architecture


def checkpoint_architecture(path: Path, role: str) -> Architecture:
    """Returns the architecture in a Hugging Face directory's config.json; raises as stored_architecture."""
    stages = sorted(str(entry) for entry in path.iterdir() if is_stage_dir(entry)) if path.is_dir() else []
    if stages:
        raise ValueError(f"{path} is a whole run; name one of its stages: {', '.join(stages)}")
    if role == "policy":
        return hf.read_architecture(path)
    scorer = read_scorer(path)
    if scorer.role != role:
        raise ValueError(
            f"{path} is a {scorer.role} model (score_role in its config.json), not a {role} model"
        )
    return scorer.architecture


def load_roles(
    stage: StageConfig, algorithm: Algorithm, where: Origins, model: Model, mesh: Mesh, root: Array
) -> tuple[Params, Params]:
    """Returns (trained, frozen): parameters by role, on the mesh.

    policy     the stage or checkpoint that this stage starts from, or fresh
    reference  a copy of that policy
    reward     to be read: the reward stage's or checkpoint's, its normaliser folded into the head;
               to be trained: the policy's trunk with a fresh head
    value      a copy of that reward model, or without one the policy's trunk with a zero head
    """
    key = keys.named(root, "init")
    policy = load_policy(where.policy, model, mesh) if where.policy else _fresh(model, mesh, key)
    reward = None if where.reward is None else load_reward(where.reward, model, mesh)

    def scorer(role: str, head: Params) -> Params:
        shardings = role_shardings(model, mesh, role)
        return _copy({"trunk": policy["trunk"], "score_head": head}, shardings)

    def make(role: str) -> Params | None:
        width = model.architecture.hidden_size
        match role:
            case "policy":
                return policy
            case "reference":
                return _copy(policy, role_shardings(model, mesh, role))
            case "reward" if role in algorithm.trains:
                return scorer(role, init_score_head(keys.named(root, "head"), width))
            case "reward":
                return reward
            case "value" if reward is not None:
                return _copy(reward, role_shardings(model, mesh, role))
            case "value":
                return scorer(role, zero_score_head(width))
        raise KeyError(role)

    trained = {role: make(role) for role in algorithm.trains}
    frozen = {role: weights for role in algorithm.reads if (weights := make(role)) is not None}
    return trained, frozen


def load_policy(path: Path, model: Model, mesh: Mesh) -> Params:
    """Returns the policy of a stage's newest checkpoint or of a Hugging Face directory, on the mesh."""
    shardings = role_shardings(model, mesh, "policy")
    if is_stage_dir(path):
        return load_params(path, "policy", _abstract(model.policy_shapes, shardings))
    return hf.load_policy(path, model.architecture, shardings)


def _fresh(model: Model, mesh: Mesh, key: Array) -> Params:
    return jax.jit(model.init_policy, out_shardings=role_shardings(model, mesh, "policy"))(key)


def load_reward(path: Path, model: Model, mesh: Mesh) -> Params:
    """Returns the reward model of a stage or Hugging Face directory, its normaliser folded into the head."""
    shardings = role_shardings(model, mesh, "reward")
    if not is_stage_dir(path):
        return load_scorer(path, read_scorer(path), shardings)
    weights, normalizer = load_trained_scorer(path, "reward", model, mesh)
    fold = jax.jit(partial(fold_normalizer, mean=normalizer.mean, std=normalizer.std))
    return weights | {"score_head": jax.device_put(fold(weights["score_head"]), shardings["score_head"])}


def load_trained_scorer(path: Path, role: Role, model: Model, mesh: Mesh) -> tuple[Params, Normalizer]:
    """Returns a stage's reward or value model as it was trained, on the mesh, and its scores' normaliser."""
    weights = load_params(path, role, _abstract(model.score_shapes, role_shardings(model, mesh, role)))
    if role == "value":
        return weights, RAW
    aux = load_aux(path)
    return weights, Normalizer(float(aux["normalizer_mean"]), float(aux["normalizer_std"]))


def _abstract(shapes: Params, shardings: Params) -> Params:
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


def _copy(params: Params, shardings: Params) -> Params:
    """Returns the parameters in buffers of their own, so that the trained role can be donated."""
    return jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings)(params)
