"""Where each role's parameters come from: a stage of this or another run, a checkpoint, or a fresh start."""

from __future__ import annotations

import logging
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import keys
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import Params
from rlhf_jax.checkpoint import RESULT, load_aux, load_info, load_params, read_result
from rlhf_jax.checkpoint import fingerprint as stage_fingerprint
from rlhf_jax.config import StageConfig
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import fold_normalizer, init_score_head, zero_score_head
from rlhf_jax.models.lora import Lora, choose_targets, merge
from rlhf_jax.models.peft import check_adapter, read_adapter
from rlhf_jax.models.scorers import RAW, Normalizer, Role, check_scorer, load_scorer, read_scorer
from rlhf_jax.models.transformer import POLICY, Model, make_model
from rlhf_jax.programs import part_shardings, role_parts, role_shardings
from rlhf_jax.unread import fresh_adapter

logger = logging.getLogger(__name__)


class Origins(NamedTuple):
    """Directories that a stage starts from: a stage's, a Hugging Face checkpoint's, or none: from scratch."""

    policy: Path | None
    reward: Path | None
    adapter: Path | None = None
    """In PEFT's format: what adapters start as."""


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
    is_fresh = not stage.lora.path or fresh_adapter(stage, stage_names)
    return Origins(start, directory(stage.reward_from), None if is_fresh else Path(stage.lora.path))


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


def adapters_of(stage: StageConfig, architecture: Architecture) -> Lora | None:
    """Returns what the adapters of a stage are like; None where it has none.

    Raises:
        ValueError: targets that the model does not have.
    """
    cfg = stage.lora
    if cfg.rank == 0:
        return None
    return Lora(cfg.rank, cfg.alpha, choose_targets(architecture, cfg.targets), cfg.rslora)


def check_start(where: Origins, lora: Lora, architecture: Architecture) -> None:
    """Raises ValueError where the adapter that a stage goes on with cannot be read, or is of another kind."""
    if where.adapter is None:
        return
    stored = check_adapter(where.adapter, architecture)
    if stored != lora:
        raise ValueError(
            f"lora.path: the adapter in {where.adapter} has rank: {stored.rank}, alpha: {stored.alpha}, "
            f"targets: [{', '.join(stored.targets)}], rslora: {str(stored.rslora).lower()}; give the section "
            "lora the same"
        )


def adapter_info(stage: StageConfig, where: Origins, lora: Lora | None) -> dict[str, Any]:
    """Returns what a checkpoint of adapters tells: what they are like, and of which model.

    A stage of the same run is told by its name, so that the run may be moved.
    """
    if lora is None:
        return {}
    assert where.policy is not None
    is_of_run = where.policy == Path(stage.run.dir) / stage.start_from
    place = {"stage": stage.start_from} if is_of_run else {"path": str(where.policy.resolve())}
    base = place | {"fingerprint": fingerprint(where.policy), "dtype": stage.model.base_dtype}
    return {"lora": lora._asdict(), "base": base}


def stored_adapters(info: dict[str, Any]) -> Lora | None:
    """Returns what a checkpoint's info says that its adapters are like; None where it has none."""
    stored = info.get("lora")
    return None if stored is None else Lora(**stored | {"targets": tuple(stored["targets"])})


def fingerprint(path: Path) -> str:
    """Returns what changes when a model does: of a stage its files' sums, else sums of parts of its files."""
    if is_stage_dir(path):
        return stage_fingerprint(path)
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    sums = {file.name: _sum_of_parts(file) for file in files}
    return f"{sum(size for size, _ in sums.values())} bytes, {zlib.crc32(repr(sums).encode()):08x}"


def _sum_of_parts(file: Path, num_parts: int = 256, part: int = 2**16) -> tuple[int, int]:
    """Returns the size of a file, and a CRC-32 of equidistant parts of it; of all of a small one."""
    size, crc = file.stat().st_size, 0
    with open(file, "rb") as stream:
        for start in range(0, size, max(part, size // num_parts)):
            stream.seek(start)
            crc = zlib.crc32(stream.read(part), crc)
    return size, crc


def base_dir(path: Path, info: dict[str, Any]) -> Path | None:
    """Returns the directory of the model that a stage's adapters belong to; None where it has no adapters."""
    base = info.get("base")
    if base is None:
        return None
    return path.parent / base["stage"] if "stage" in base else Path(base["path"])


def reward_adapter_info(path: Path | None) -> dict[str, Any] | None:
    """Returns the info of a reward stage's checkpoint; None where it is no stage, or a model of its own."""
    if path is None or not is_stage_dir(path):
        return None
    info = load_info(path)
    return info if "lora" in info else None


def check_base(stage: StageConfig, where: Origins, lora: Lora) -> None:
    """Raises ValueError where a reward model's adapters are of another base or kind than a stage's."""
    info = reward_adapter_info(where.reward)
    if info is None:
        return
    assert where.policy is not None and where.reward is not None
    of_reward = base_dir(where.reward, info)
    assert of_reward is not None
    if of_reward.resolve() != where.policy.resolve():
        raise ValueError(
            f"{where.reward} holds adapters of {of_reward}, but the base of this stage is {where.policy}; "
            "train the reward model from the same, or with lora.rank 0: it then is a model of its own"
        )
    ours = {"lora": lora._asdict(), "dtype": stage.model.base_dtype}
    stored = stored_adapters(info)
    assert stored is not None
    theirs = {"lora": stored._asdict(), "dtype": info["base"]["dtype"]}
    if ours != theirs:
        raise ValueError(
            f"{where.reward} holds adapters of another kind, {theirs}; here they are {ours}: give the stage "
            "the same options of lora and the same model.frozen_dtype"
        )


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
    _checked_base(path, load_info(path))
    parts = ("adapter",) if role == "policy" else ("adapter", "score_head")
    abstract = _abstract(model.shapes_of(parts), part_shardings(model, mesh, parts))
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
    own = load_params(path, role, _abstract(model.shapes_of(parts), part_shardings(model, mesh, parts)))
    if "trunk" in own:
        return own
    if lora is None:  # a head on the policy
        return {"trunk": load_policy(path, model, mesh)["trunk"]} | own
    base = load_policy(_checked_base(path, info), model, mesh)
    base = _copy(base, part_shardings(model, mesh, base), info["base"]["dtype"])

    def merged(base: Params, own: Params) -> Params:
        whole = base | own | {"trunk": merge(base["trunk"], own["adapter"], lora)}
        return {part: jax.tree.map(jnp.float32, whole[part]) for part in shardings}

    return jax.jit(merged, out_shardings=shardings)(base, own)


def _checked_base(path: Path, info: dict[str, Any]) -> Path:
    """Returns the directory of the model that adapters belong to. Raises ValueError where it has changed."""
    base = base_dir(path, info)
    assert base is not None
    if not base.is_dir():
        raise ValueError(f"{path} holds adapters of {base}, which is not there; put that model back")
    if fingerprint(base) != info["base"]["fingerprint"]:
        raise ValueError(
            f"{path} holds adapters of {base}, which is not the model any more that it was; put that back, "
            "or train the adapters again"
        )
    return base


def _abstract(shapes: Params, shardings: Params) -> Params:
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


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
