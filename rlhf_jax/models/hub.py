"""Models of the hub: `hub:OWNER/NAME[@REVISION]` becomes a directory on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.config import SOURCES, Config
from rlhf_jax.data.third_party import reason, told_as
from rlhf_jax.files import replace_file, to_json

PREFIX = "hub:"
NOTATION = "hub:OWNER/NAME[@REVISION]"
COMMITS = "hub.json"
"""RUN/hub.json: {name: commit} of the models of the hub that a run began with, and goes on with."""
QUIET_SECONDS = 2.0
# What is downloaded. No pickles, which run code when they are opened; no Python; nothing below a directory.
_TOKENIZER = ("*.json", "*.jinja", "*.txt", "*.model")
_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "adapter_model.safetensors")


def is_hub(name: str) -> bool:
    """Returns whether a name is one of the hub, and not of a directory."""
    return name.startswith(PREFIX)


def split_name(name: str) -> tuple[str, str]:
    """Returns (OWNER/NAME, REVISION or "") of a name of the hub; ValueError where it has another form."""
    match = re.fullmatch(rf"{PREFIX}((?:[\w.-]+/)?[\w.-]+)(?:@([^\s@:]+))?", name)
    if not match:
        raise ValueError(f"{name!r} must read {NOTATION}, such as hub:EleutherAI/pythia-1b")
    return match[1], match[2] or ""


def local_directory(name: str, *, weights: bool = True, commit: str = "") -> Path:
    """Returns the directory of a model: the one that is named, or a downloaded copy of one of the hub.

    A copy is kept in the cache of huggingface_hub and has the commit as its name. With HF_HUB_OFFLINE=1, or
    when the hub cannot be reached, the cache alone is looked into.

    Args:
        name: a directory, or NOTATION.
        weights: whether weights are wanted too, as safetensors; otherwise the small files, such as those of
            the tokenizer.
        commit: taken instead of the revision that `name` says.

    Raises:
        ValueError: of one line: another notation, no such model or revision, no access to it, no connection
            and no copy, no safetensors.
    """
    if not is_hub(name):
        return Path(name)
    repository, revision = split_name(name)
    directory = _download(name, repository, commit or revision, _TOKENIZER + (_WEIGHTS if weights else ()))
    if weights and not any(any(directory.glob(pattern)) for pattern in _WEIGHTS):
        raise ValueError(
            f"{name} has no weights as safetensors; pickles such as pytorch_model.bin can run code and are "
            "never downloaded: convert it (https://huggingface.co/spaces/safetensors/convert), and name the "
            "revision or directory that has them"
        )
    return directory


def config_directory(name: str, commit: str = "") -> Path:
    """Returns a directory with what tells a model's architecture; of the hub a copy of that alone.

    See `local_directory`.
    """
    if not is_hub(name):
        return Path(name)
    repository, revision = split_name(name)
    return _download(name, repository, commit or revision, _CONFIGS)


def fetch_models(
    config: Config, commits: Mapping[str, str], *, configs_only: bool = False
) -> tuple[Config, dict[str, str]]:
    """Returns the configuration with directories instead of names of the hub, and {name: commit} of these.

    Args:
        config: `model.path`, `lora.path`, `tokenizer.path` and SOURCES may be names of the hub.
        commits: of names that were fetched before: a run goes on with what it began with.
        configs_only: of models that are started from their architectures alone; tokenizers stay as they are.

    Raises:
        ValueError: a line for each model that cannot be had; see `local_directory`.
    """
    wanted: dict[str, tuple[str, bool]] = {}  # {name: (where it stands, whether weights are wanted)}
    for stage in config.stages:
        wanted.setdefault(stage.model.path, ("model.path", True))
        wanted.setdefault(stage.lora.path, ("lora.path", True))
        for key, source in stage.sources.items():
            wanted.setdefault(source, (f"stages.{stage.name}.{key}", True))
    if not configs_only or not config.stages[0].model.path:
        wanted.setdefault(config.stages[0].tokenizer.path, ("tokenizer.path", False))

    directories: dict[str, Path] = {}
    problems: list[str] = []
    for name, (place, weights) in wanted.items():
        if not is_hub(name):
            continue
        try:
            commit = commits.get(name, "")
            if configs_only and weights:
                directories[name] = config_directory(name, commit)
            else:
                directories[name] = local_directory(name, weights=weights, commit=commit)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ValueError("\n".join(problems))

    def local(name: str) -> str:
        return str(directories.get(name, name))

    stages = tuple(
        dataclasses.replace(
            stage,
            **{field: local(stage.sources[key]) for key, field in SOURCES.items()},
            model=dataclasses.replace(stage.model, path=local(stage.model.path)),
            lora=dataclasses.replace(stage.lora, path=local(stage.lora.path)),
            tokenizer=dataclasses.replace(stage.tokenizer, path=local(stage.tokenizer.path)),
        )
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=stages), {name: at.name for name, at in directories.items()}


def said_of(name: str, commit: str) -> str:
    """Returns a line that tells the commit of a model of the hub, and how to pin one that may move."""
    repository, revision = split_name(name)
    pin = "" if revision == commit else f", where a branch may move: pin it as {PREFIX}{repository}@{commit}"
    return f"{name} is commit {commit}{pin}"


def read_commits(run_dir: Path) -> dict[str, str]:
    """Returns {name: commit} of a run; empty where it has none yet."""
    file = run_dir / COMMITS
    if not file.is_file():
        return {}
    with told_as(f"{file} cannot be read", "remove it to take the newest commits"):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def write_commits(run_dir: Path, commits: Mapping[str, str]) -> None:
    """Writes what `read_commits` reads; no file where there is nothing to tell."""
    if commits:
        replace_file(run_dir / COMMITS, to_json(commits, indent=2) + "\n")


def _download(name: str, repository: str, revision: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    cannot = f"{name} cannot be downloaded"
    with told_as(cannot), _told_when_slow(f"downloading {name} to {constants.HF_HUB_CACHE}"):
        try:
            copy = snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                tqdm_class=_late_bar(),
            )
        except errors.GatedRepoError:
            raise ValueError(
                f"it is gated: ask for access at {constants.ENDPOINT}/{repository}, then set HF_TOKEN in the "
                "environment to a token of yours"
            ) from None
        except errors.RepositoryNotFoundError:
            raise ValueError(
                f"there is no model {repository} at {constants.ENDPOINT}, or it is private: then set "
                "HF_TOKEN in the environment to a token that may read it"
            ) from None
        except errors.RevisionNotFoundError:
            raise ValueError(f"{repository} has no branch, tag or commit {revision!r}") from None
        except errors.LocalEntryNotFoundError as error:
            silent = f"{constants.ENDPOINT} does not answer ({reason(error.__cause__ or error)})"
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else silent
            raise ValueError(
                f"{why}, and the cache {constants.HF_HUB_CACHE} does not have all of it"
            ) from None
    return Path(copy)


@contextlib.contextmanager
def _told_when_slow(text: str) -> Iterator[None]:
    """Prints the text if the block takes more than QUIET_SECONDS."""
    timer = threading.Timer(QUIET_SECONDS, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _late_bar() -> type:
    """Returns the class of bars that a terminal shows of a download after QUIET_SECONDS."""
    from huggingface_hub.utils.tqdm import tqdm

    class LateBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.setdefault("disable", None)  # None: no bar where there is no terminal
            super().__init__(*args, **options, delay=QUIET_SECONDS)

        def display(self, *args: Any, **options: Any) -> Any:
            return time.time() >= self.start_t + self.delay and super().display(*args, **options)

    return LateBar
