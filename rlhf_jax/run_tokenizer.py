"""The tokenizer of a run: where it comes from, and whether the models that a run starts from share it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import get_args

from rlhf_jax.config import Config, TokenizerConfig
from rlhf_jax.data.examples import Split, load_records, training_texts
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer, settle_template, train_tokenizer
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.origins import checkpoint_architecture, is_stage_dir

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # RUN/tokenizer
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def prepare_tokenizer(config: Config) -> Tokenizer:
    """Returns the run's tokenizer: the one it already has, the one that is named, the model's, or a new one.

    A tokenizer is trained on the texts of the first stage when neither the configuration nor what the stages
    start from brings one.

    Raises:
        ValueError: no such tokenizer; it lacks EOS or pad; its training texts cannot be read.
    """
    first = config.stages[0]
    stored = Path(config.run.dir) / TOKENIZER
    if stored.is_dir():
        return load_tokenizer(dataclasses.replace(first.tokenizer, path=str(stored)))
    if first.tokenizer.path or first.model.path:
        return load_tokenizer(first.tokenizer, first.model.path)
    if source := first.start_from or first.teacher_from:
        start = Path(source)
        if not is_stage_dir(start):
            try:
                checkpoint_architecture(start, "policy")
            except ValueError as error:
                key = "from" if first.start_from else "teacher_from"
                raise ValueError(f"stages.{first.name}.{key}: {error}") from None
        beside = start.parent / TOKENIZER if is_stage_dir(start) else start
        return load_tokenizer(dataclasses.replace(first.tokenizer, path=str(beside)))
    try:
        texts = list(training_texts(first.data, first.settings.records, first.run.seed))
    except ValueError:
        raise ValueError("\n".join(_unreadable(config))) from None
    return settle_template(train_tokenizer(texts, first.tokenizer.vocab_size), first.tokenizer)


def tokenizer_dir(path: Path) -> Path:
    """Returns where the tokenizer of another run's stage, or of a checkpoint, lies; ValueError: nowhere."""
    if is_stage_dir(path):
        beside = path.parent / TOKENIZER
        if not beside.is_dir():
            raise ValueError(
                f"{path} is of a run without a tokenizer: there is no {beside}; copy the whole run"
            )
        return beside
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{path} holds a reward model without a tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy "
            "the one that it was trained with there"
        )
    return path


def check_vocabulary(
    start: Path | None, tokenizer: Tokenizer, cfg: TokenizerConfig, architecture: Architecture
) -> None:
    """Raises ValueError where a model was trained with other ids, or has fewer, than a tokenizer gives.

    Args:
        start: a stage of another run, or a checkpoint, with which the model came; None: neither.
        tokenizer: to be used.
        cfg: reads path: it says what a checkpoint does not, or says wrongly.
        architecture: of the model.
    """
    if start is not None and is_stage_dir(start):
        _check_ids(start, tokenizer_dir(start), tokenizer, cfg)
    elif start is not None and not cfg.path and any((start / name).is_file() for name in TOKENIZER_FILES):
        _check_ids(start, start, tokenizer, cfg)
    if len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary has "
            f"{architecture.vocab_size}; use the tokenizer that the model was trained with (tokenizer.path)"
        )


def check_teacher(
    path: Path | None, tokenizer: Tokenizer, cfg: TokenizerConfig, teacher: Architecture
) -> None:
    """Raises ValueError where a teacher's distributions are not of the tokens of the run's tokenizer.

    Its embeddings may be padded beyond these, to another number than the policy's.

    Args:
        path: of the teacher, a stage of another run or a checkpoint; None: it is of this run.
        tokenizer: of the run.
        cfg: of it.
        teacher: the architecture.
    """
    if path is not None and is_stage_dir(path):
        _check_ids(path, tokenizer_dir(path), tokenizer, cfg)
    elif path is not None and any((path / name).is_file() for name in TOKENIZER_FILES):
        _check_ids(path, path, tokenizer, cfg)
    elif path is not None:
        logger.warning("teacher_from: %s has no tokenizer; it is taken to be the run's", path)
    if len(tokenizer) > teacher.vocab_size:
        raise ValueError(
            f"teacher_from: the teacher's vocabulary has {teacher.vocab_size} tokens, the tokenizer "
            f"{len(tokenizer)}; take a teacher that was trained with the run's tokenizer, as distributions "
            "are compared token by token"
        )


def _check_ids(start: Path, beside: Path, tokenizer: Tokenizer, cfg: TokenizerConfig) -> None:
    """Raises ValueError where the tokenizer beside a model gives tokens other ids."""
    ours = tokenizer.get_vocab()
    theirs = load_tokenizer(dataclasses.replace(cfg, path=str(beside))).get_vocab()
    if ours != theirs:
        differing = sum(ours.get(token) != theirs.get(token) for token in ours | theirs)
        raise ValueError(
            f"{start} was trained with another tokenizer: {differing} tokens have other ids in {beside} than "
            "in this run's; use models that were trained with one tokenizer (tokenizer.path)"
        )


def _unreadable(config: Config) -> list[str]:
    """Returns a line for each split of a stage whose records cannot be read."""
    lines = []
    for stage in config.stages:
        for split in get_args(Split):
            try:
                load_records(stage.data, stage.settings.records, split, stage.run.seed)
            except ValueError as error:
                lines += [f"stage {stage.name}: {problem}" for problem in str(error).splitlines()]
    return lines
