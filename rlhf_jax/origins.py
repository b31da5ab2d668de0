"""What the directories that a stage starts from hold: which models, of which architecture, adapters of what.

Only what the host can tell; roles.py loads the parameters.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.checkpoint import RESULT, load_info, read_result
from rlhf_jax.checkpoint import fingerprint as stage_fingerprint
from rlhf_jax.config import StageConfig
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import Ensemble
from rlhf_jax.models.lora import Lora, choose_targets
from rlhf_jax.models.peft import check_adapter
from rlhf_jax.models.scorers import check_scorer, read_scorer
from rlhf_jax.unread import fresh_adapter

logger = logging.getLogger(__name__)


class Origins(NamedTuple):
    """Directories that a stage starts from: a stage's, a Hugging Face checkpoint's, or none: from scratch."""

    policy: Path | None
    reward: Path | None
    adapter: Path | None = None
    """In PEFT's format: what adapters start as."""
    teacher: Path | None = None


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
    adapter = None if is_fresh else Path(stage.lora.path)
    return Origins(start, directory(stage.reward_from), adapter, directory(stage.teacher_from))


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
            fitting = [name for name, of in ALGORITHMS.items() if role in of.trains]
            such = " or ".join(fitting) if len(fitting) <= 2 else f"{', '.join(fitting[:2])} or the like"
            raise ValueError(
                f"{path} is the result of {info['algorithm']}, which trains no {role}; "
                f"name the directory of a stage that runs {such}"
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


def check_start(stage: StageConfig, where: Origins, lora: Lora, architecture: Architecture) -> None:
    """Raises ValueError where the adapter that a stage goes on with cannot be read, or is of another kind."""
    if where.adapter is None:
        return
    stored, has_head = check_adapter(where.adapter, architecture)
    if has_head and "reward" not in ALGORITHMS[stage.algorithm].trains:
        raise ValueError(
            f"lora.path: the adapter in {where.adapter} has a score head, which a stage that runs "
            f"{stage.algorithm} would drop: it is a reward model's; name an adapter of a language model"
        )
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


def stored_ensemble(info: dict[str, Any]) -> Ensemble:
    """Returns how many score heads a checkpoint's info says that its reward model has."""
    return Ensemble(info.get("num_heads", 1))


def fingerprint(path: Path) -> str:
    """Returns what changes when a model does: of a stage its files' sums, else sums of parts of its files."""
    if is_stage_dir(path):
        return stage_fingerprint(path)
    configs = (path / name for name in ("config.json", "adapter_config.json"))
    files = sorted((*(file for file in configs if file.is_file()), *path.glob("*.safetensors")))
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


def is_same_base(stored: dict[str, Any] | None, here: dict[str, Any] | None) -> bool:
    """Returns whether two of `adapter_info`'s bases are one model in one type, wherever it lies."""
    if stored is None or here is None:
        return stored is here
    return all(stored[key] == here[key] for key in ("fingerprint", "dtype"))


def base_dir(path: Path, info: dict[str, Any]) -> Path | None:
    """Returns the directory of the model that a stage's adapters belong to; None where it has no adapters."""
    base = info.get("base")
    if base is None:
        return None
    return path.parent / base["stage"] if "stage" in base else Path(base["path"])


def is_of_stage(info: dict[str, Any]) -> bool:
    """Returns whether a checkpoint's adapters belong to the model of a stage, be it there or not."""
    return info["base"]["fingerprint"].startswith("step ")  # see checkpoint.fingerprint


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
    if not where.policy.is_dir() or fingerprint(where.policy) != info["base"]["fingerprint"]:
        raise ValueError(
            f"{where.reward} holds adapters of {base_dir(where.reward, info)}, but the base of this stage is "
            f"{where.policy}, which is another model, or has changed since; train the reward model from the "
            "same, or with lora.rank 0: it then is a model of its own"
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


def checked_base(path: Path, info: dict[str, Any]) -> Path:
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
