"""Stages as their options describe them, planned without data, tokenizer or weights: for their programs.

Of a model only its config.json is read. Rows have the greatest lengths that the options allow, and rankings
RANKED completions: what records need that have no more is as much at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.config import Config, StageConfig
from rlhf_jax.config_types import RANKINGS, Kind
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.records import (
    AnyRecord,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Rated,
    Unpaired,
)
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from rlhf_jax.models import hub
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import SINGLE, Ensemble
from rlhf_jax.origins import Origins, checkpoint_architecture, is_stage_dir, origins, stored_architecture
from rlhf_jax.plan import Plan, check_length, ptx_examples, reward_is_whole, with_rows_of
from rlhf_jax.reward_origin import External
from rlhf_jax.rewards.external import RewardReader

RANKED = 4
"""Completions of a ranking, of which no option tells the number."""
_RECORDS: Mapping[Kind, AnyRecord] = {
    "prompt_completion": PromptCompletion("", ""),
    "preference": Preference("", "", ""),
    "preference_with_margin": Preference("", "", ""),
    **dict.fromkeys(RANKINGS, Ranking("", ("",) * RANKED, ((0, 1),), (1.0,) + (0.0,) * (RANKED - 1))),
    "rating": Rated("", "", 0.0),
    "prompt_only": PromptOnly(""),
    "unpaired": Unpaired("", "", is_desirable=True),
}


def shape_plans(config: Config) -> list[Plan]:
    """Returns a plan per stage, with blank records.

    Raises:
        ValueError: a config.json cannot be had or read, or rows do not fit a model's context; all problems.
    """
    config, _ = hub.fetch_models(config, {}, configs_only=True)
    plans: dict[str, Plan] = {}
    problems: list[str] = []
    for number, stage in enumerate(config.stages):
        if stage.rests_on & ({of.name for of in config.stages[:number]} - plans.keys()):
            continue  # rests on a stage with problems
        try:
            plans[stage.name] = _plan(stage, number, plans)
        except ValueError as error:
            problems += [f"stage {stage.name}: {problem}" for problem in str(error).splitlines()]
    if problems:
        raise ValueError("\n".join(problems))
    return list(plans.values())


def _plan(stage: StageConfig, number: int, earlier: dict[str, Plan]) -> Plan:
    algorithm, where = ALGORITHMS[stage.algorithm], origins(stage, set(earlier))
    teacher = _teacher(stage, where.teacher, earlier)
    architecture = _architecture(stage, where.policy, earlier, teacher)
    check_length(stage, algorithm, architecture)
    if teacher is not None:
        check_length(stage, algorithm, teacher, "teacher")
    external = _external(stage, where, architecture, earlier)
    examples = blank_examples(stage)
    return Plan(
        stage=stage,
        number=number,
        algorithm=with_rows_of(algorithm, examples),
        architecture=architecture,
        origins=where._replace(reward=None) if external else where,
        tokenizer=_any_tokenizer(),
        text={"stop": _any_tokenizer().eos_token_id},
        train=examples,
        held_out=examples,
        demonstrations=None,
        functions={},
        gold=None,
        external=external,
        reward_is_whole=reward_is_whole(stage, where, earlier),
        ptx=ptx_examples(stage, architecture, earlier),
        teacher=teacher,
    )


def _architecture(
    stage: StageConfig, start: Path | None, earlier: dict[str, Plan], teacher: Architecture | None
) -> Architecture:
    if stage.start_from in earlier:
        return earlier[stage.start_from].architecture
    if start is not None:
        return _stored(start, "policy")
    if teacher is not None:
        return Architecture.from_config(stage.model, vocab_size=teacher.vocab_size)
    if not stage.tokenizer.path:
        return Architecture.from_config(stage.model, vocab_size=stage.tokenizer.vocab_size)
    return Architecture.from_config(stage.model, vocab_size=len(load_tokenizer(stage.tokenizer)))


def _external(
    stage: StageConfig, where: Origins, architecture: Architecture, earlier: dict[str, Plan]
) -> External | None:
    """Returns the reward model where it is not like the policy; tokenizers are taken to be the same."""
    if where.reward is None:
        return None
    judge = earlier.get(stage.reward_from)
    of_reward = _stored(where.reward, "reward") if judge is None else judge.architecture
    rule = stage.rewards.ensemble
    num_heads = 1 if judge is None else getattr(judge.stage.settings, "num_heads", 1)
    ensemble = SINGLE if rule == "mean" else Ensemble(num_heads, rule, stage.rewards.ensemble_stds)
    if of_reward == architecture and ensemble == SINGLE:
        return None
    reader = RewardReader(None, False, None, None, of_reward.context_length)
    return External(where.reward, of_reward, reader, ensemble)


def _teacher(stage: StageConfig, path: Path | None, earlier: dict[str, Plan]) -> Architecture | None:
    if path is None:
        return None
    return (
        earlier[stage.teacher_from].architecture if stage.teacher_from in earlier else _stored(path, "policy")
    )


def _stored(path: Path, role: str) -> Architecture:
    """Returns the architecture of a stage of another run, or that in a directory's config.json."""
    return stored_architecture(path, role) if is_stage_dir(path) else checkpoint_architecture(path, role)


def blank_examples(stage: StageConfig) -> Examples:
    """Returns as many records as a batch has, of the greatest length, and with a prompt of one token."""
    kind, data = stage.settings.records, stage.data
    length = data.max_prompt_length if kind == "prompt_only" else data.max_length
    row = Row([0] * length, length if kind == "prompt_only" else 1)
    count = stage.settings.batch_size
    in_pairs = kind in ("preference", "preference_with_margin", "unpaired")
    rows_per_record = RANKED if kind in RANKINGS else 2 if in_pairs else 1
    examples = Examples(
        kind=kind,
        formats=(),
        records=[_RECORDS[kind]] * count,
        rows=token_rows([row] * (count * rows_per_record)),
        length=length,
        pad_id=0,
        num_dropped=0,
        num_cut=0,
        longest_row=length,
        longest_prompt=1,
    )
    return examples.packed(examples.rows_together * length) if data.packing else examples


@cache
def _any_tokenizer() -> Tokenizer:
    """Returns a tokenizer with the special tokens that programs know by their ids."""
    return train_tokenizer([], 260)
