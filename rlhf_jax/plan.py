"""What the host knows of a run before a device is touched: tokenizer, data, architectures, reward functions.

Whatever is wrong with them is found here, all of it at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.checkpoint import load_info
from rlhf_jax.config import PROMPTLESS_FORMATS, Config, StageConfig
from rlhf_jax.config_types import RANKINGS
from rlhf_jax.data.collate import LENGTH_MULTIPLE
from rlhf_jax.data.columns import Format, is_read
from rlhf_jax.data.examples import Examples, Split, load_examples
from rlhf_jax.data.packing import length_ladder
from rlhf_jax.data.tokenize import text_difference, text_settings
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.lora import Lora
from rlhf_jax.offline_config import RewardModelConfig, SFTConfig
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.origins import (
    Origins,
    adapters_of,
    check_base,
    check_start,
    is_stage_dir,
    origins,
    reward_adapter_info,
    stored_architecture,
    stored_ensemble,
)
from rlhf_jax.programs import rows_per_unit
from rlhf_jax.reward_origin import External, external_reward
from rlhf_jax.rewards.functions import RewardFunction, load_function
from rlhf_jax.role_parts import Parts, role_parts
from rlhf_jax.rollout.stops import read_stop_ids, read_stop_strings
from rlhf_jax.run_tokenizer import check_teacher, check_vocabulary
from rlhf_jax.unread import unread


class Plan(NamedTuple):
    """A stage with all that the host can know of it before a device is touched."""

    stage: StageConfig
    number: int
    """Place in the chain; part of the stage's root key."""
    algorithm: Algorithm
    architecture: Architecture
    origins: Origins
    tokenizer: Tokenizer
    text: dict[str, Any]
    """How the stage's records become tokens; its checkpoints tell it."""
    train: Examples
    held_out: Examples
    demonstrations: Examples | None
    """Where a stage normalises scores: the texts whose mean score becomes 0."""
    functions: dict[str, RewardFunction]
    """Of rewards.functions, by what that calls them."""
    gold: RewardFunction | None
    external: External | None = None
    """The reward model, where it has another architecture or tokenizer than the policy."""
    reward_is_whole: bool = True
    """The reward model that is read is one of its own, not an adapter of the stage's base."""
    ptx: Examples | None = None
    """The demonstrations that are learned beside what the policy samples."""
    teacher: Architecture | None = None
    """Of the frozen policy that is learned from, where there is one."""

    @property
    def directory(self) -> Path:
        """Returns RUN/STAGE."""
        return Path(self.stage.run.dir) / self.stage.name

    def parts(self) -> Parts:
        """Returns the parts of each role's parameters; no reward model where it is no role of the stage."""
        parts = role_parts(self.stage, self.algorithm, reward_is_whole=self.reward_is_whole)
        has_reward = "reward" in self.algorithm.trains or self.origins.reward is not None
        return {role: of for role, of in parts.items() if role != "reward" or has_reward}

    def row_counts(self) -> dict[str, int]:
        """Returns the numbers of rows that the mesh has to divide, by the option that decides them."""
        settings, per_unit = self.stage.settings, rows_per_unit(self.stage, self.algorithm)
        sequences_per_row = getattr(settings, "sequences_per_row", 1)
        minibatch = settings.rows_per_update // settings.num_minibatches // sequences_per_row
        of_minibatch = f"{settings.update_rows} / num_minibatches" + " / sequences_per_row" * (
            sequences_per_row > 1
        )
        counts = {
            "batch_size": per_unit * settings.batch_size,
            of_minibatch: per_unit * minibatch,
            "microbatch_size": per_unit * (settings.microbatch_size or minibatch),
        }
        if isinstance(settings, OnlineConfig) and sequences_per_row > 1:
            scored = "batch_size * group_size / sequences_per_row"  # more than are learned, maybe
            counts[scored] = settings.rows_per_rollout // sequences_per_row
        return counts


def plan_stages(config: Config, tokenizer: Tokenizer) -> list[Plan]:
    """Returns a plan per stage.

    Raises:
        ValueError: every problem at once: data, lengths, vocabulary, reward functions. A stage that starts
            from one with problems is not judged.
    """
    plans: dict[str, Plan] = {}
    failed: set[str] = set()
    problems: list[str] = []
    for number, stage in enumerate(config.stages):
        found: list[str] = []
        rests_on_failed = bool(failed & stage.rests_on)
        plan = None if rests_on_failed else _plan(stage, number, tokenizer, plans, found)
        problems += [f"stage {stage.name}: {problem}" for problem in dict.fromkeys(found)]
        if plan is None:
            failed.add(stage.name)
        else:
            plans[stage.name] = plan
    problems = problems or _idle_data(list(plans.values()))
    if problems:
        raise ValueError("\n".join(problems))
    return list(plans.values())


def _idle_data(plans: Sequence[Plan]) -> list[str]:
    """Returns a line for each option of the data sections that no stage reads, now that formats are known.

    What is told without the files is told earlier, by `config_checks.check_ignored`. Stages may share a data
    section: an option counts as read where one of those that have its value reads it.
    """
    stages = {plan.stage.name: plan.stage for plan in plans}
    idle: dict[tuple[str, str], dict[str, str]] = {}  # (option, value) -> {stage: why}
    for plan in plans:
        data = plan.stage.data
        formats: set[Format] = {*plan.train.formats, *plan.held_out.formats}
        if not formats:
            continue
        reasons = [
            unread(dataclasses.replace(plan.stage, data=dataclasses.replace(data, format=format)), stages)
            for format in formats
        ]
        for option in ("prompts", "detokenize", "prompt_tokens", "prompt_template"):
            if value := getattr(data, option):
                why = [of_format.get(f"data.{option}", "") for of_format in reasons]
                idle.setdefault((option, str(value)), {})[plan.stage.name] = why[0] if all(why) else ""
        for usual, name in data.columns.items():
            kind = plan.stage.settings.records
            reads = any(is_read(usual, format, kind) for format in formats)
            of = f"records of data.format {' and '.join(sorted(formats))}"
            why = "" if reads else f"a stage that reads {kind} takes no {usual!r} from {of}"
            idle.setdefault((f"columns.{usual}", name), {})[plan.stage.name] = why
    return [
        f"stage {name}: data.{option}: {value} would be ignored: {why}; leave it out"
        for (option, value), of_stages in idle.items()
        if all(of_stages.values())
        for name, why in list(of_stages.items())[:1]
    ]


def _plan(
    stage: StageConfig, number: int, tokenizer: Tokenizer, earlier: dict[str, Plan], problems: list[str]
) -> Plan | None:
    """Returns the stage's plan, or None where it has problems, which are added to the list."""
    algorithm = ALGORITHMS[stage.algorithm]
    where = origins(stage, set(earlier))
    loss_on = stage.settings.loss_on if isinstance(stage.settings, SFTConfig) else "completion"

    tried = partial(attempt, problems)

    def examples(split: Split) -> Examples | None:
        records, seed = stage.settings.records, stage.run.seed
        return tried(load_examples, stage.data, records, split, tokenizer, seed, loss_on=loss_on)

    def judge(spec: str, *judged: Examples | None) -> RewardFunction | None:
        function = tried(load_function, spec) if spec else None
        for of in judged:
            if function and of:  # the judges of preferences are given prompts and completions alone
                tried(function.check_columns, getattr(of.records[0], "columns", {}))
        return function

    lora = ptx = None
    teacher = tried(_teacher, stage, where, earlier)
    architecture = tried(_architecture, stage, where, tokenizer, earlier, teacher)
    if architecture is not None:
        tried(check_length, stage, algorithm, architecture)
        ptx = tried(ptx_examples, stage, architecture, earlier)
        lora = tried(adapters_of, stage, architecture)
        if lora is not None:
            tried(check_start, stage, where, lora, architecture)
    if architecture is not None and teacher is not None:
        tried(check_length, stage, algorithm, teacher, "teacher")
        of_other = None if stage.teacher_from in earlier else where.teacher
        tried(check_teacher, of_other, tokenizer, stage.tokenizer, teacher)
    train, held_out = examples("train"), examples("eval")
    external = None
    if architecture is not None and train is not None:
        external = tried(
            external_reward,
            stage,
            where.reward,
            architecture,
            tokenizer,
            {name: plan.architecture for name, plan in earlier.items()},
            has_conversations=train.has_conversations,
            num_heads=tried(_num_reward_heads, stage, where, earlier) or 1,
        )
        tried(_check_ensemble, stage, where, earlier)
        if lora is not None and external is None:
            tried(_check_base, stage, where, lora, earlier)
    tried(read_stop_ids, stage.rollout, tokenizer)
    tried(read_stop_strings, stage.rollout, tokenizer)
    functions = {spec: judge(spec, train, held_out) for spec in stage.rewards.functions}
    gold = judge(stage.rewards.gold, held_out)
    if problems or architecture is None or train is None or held_out is None:
        return None
    if train.has_conversations != held_out.has_conversations:
        names = ("data.train", "data.eval") if train.has_conversations else ("data.eval", "data.train")
        problems.append(f"{names[0]} holds conversations and {names[1]} plain text; let both be alike")
        return None
    length = max(train.length, held_out.length)  # one shape, so that programs compile once
    shorter = ()
    if stage.data.length_buckets > 1:
        ladder = length_ladder(train.lengths.max(axis=1), stage.data.length_buckets, LENGTH_MULTIPLE)
        shorter = tuple(step for step in ladder if step < length)
    train, held_out = (dataclasses.replace(of, length=length, shorter=shorter) for of in (train, held_out))
    algorithm = with_rows_of(algorithm, train)
    demonstrations = None
    if algorithm.normalizes_scores:
        assert isinstance(stage.settings, RewardModelConfig)
        if stage.settings.normalizer != "none":
            wants = stage.settings.normalize_on == "demonstrations"
            demonstrations = earlier[stage.start_from].train if wants else train
    plan = Plan(
        stage=stage,
        number=number,
        algorithm=algorithm,
        architecture=architecture,
        origins=where._replace(reward=None) if external else where,
        tokenizer=tokenizer,
        text=_text(stage, algorithm, tokenizer, train),
        train=train,
        held_out=held_out,
        demonstrations=demonstrations,
        functions={spec: function for spec, function in functions.items() if function},
        gold=gold,
        external=external,
        reward_is_whole=reward_is_whole(stage, where, earlier),
        ptx=ptx,
        teacher=teacher,
    )
    tried(_check_text, plan, earlier)
    return None if problems else plan


def ptx_examples(stage: StageConfig, architecture: Architecture, earlier: dict[str, Plan]) -> Examples | None:
    """Returns the demonstrations that a policy learns beside its samples, in batches of one length.

    Their text may be another than that of the prompts, as it is where they are what the model was first
    trained on.
    """
    name = getattr(stage.settings, "ptx_from", "")
    if not name:
        return None
    found = dataclasses.replace(earlier[name].train, shorter=())
    if found.length > architecture.context_length:
        raise ValueError(
            f"{stage.algorithm}.ptx_from: rows of {found.length} tokens of stage {name} do not fit the "
            f"model's context of {architecture.context_length}; lower data.max_length there"
        )
    return found


def with_rows_of(algorithm: Algorithm, examples: Examples) -> Algorithm:
    """Returns the algorithm for records of as many rows as these have, where it takes any number."""
    if examples.kind not in ("rating", *RANKINGS):
        return algorithm
    return algorithm._replace(rows_per_record=examples.rows_per_record)


def _check_base(stage: StageConfig, where: Origins, lora: Lora, earlier: dict[str, Plan]) -> None:
    """Raises ValueError where a reward model's adapters belong to another base than the stage's."""
    judge = earlier.get(stage.reward_from)
    if judge is None:
        check_base(stage, where, lora)
    elif judge.stage.lora.rank and judge.origins.policy != where.policy:
        raise ValueError(
            f"{stage.reward_from} holds adapters of {judge.origins.policy}, but the base of this stage is "
            f"{where.policy}; let both start from the same, or train that with lora: {{rank: 0}}"
        )
    elif judge.stage.lora.rank and (theirs := adapters_of(judge.stage, judge.architecture)) != lora:
        assert theirs is not None
        raise ValueError(
            f"{stage.reward_from} has adapters of {', '.join(theirs.targets)}, this stage of "
            f"{', '.join(lora.targets)}; give both the same lora.targets"
        )


def reward_is_whole(stage: StageConfig, where: Origins, earlier: dict[str, Plan]) -> bool:
    if stage.reward_from in earlier:
        return earlier[stage.reward_from].stage.lora.rank == 0
    return reward_adapter_info(where.reward) is None


def _num_reward_heads(stage: StageConfig, where: Origins, earlier: dict[str, Plan]) -> int:
    if stage.reward_from in earlier:
        return getattr(earlier[stage.reward_from].stage.settings, "num_heads", 1)
    if where.reward is None or not is_stage_dir(where.reward):
        return 1
    return stored_ensemble(load_info(where.reward)).num_heads


def _check_ensemble(stage: StageConfig, where: Origins, earlier: dict[str, Plan]) -> None:
    """Raises ValueError where one head is to be combined with others."""
    rule = stage.rewards.ensemble
    if stage.is_online and rule != "mean" and _num_reward_heads(stage, where, earlier) == 1:
        raise ValueError(f"rewards.ensemble: {rule} would be ignored: {stage.reward_from} has one score head")


def _text(stage: StageConfig, algorithm: Algorithm, tokenizer: Tokenizer, train: Examples) -> dict[str, Any]:
    """Returns the text_settings of a stage, None for what it does not read."""
    text = text_settings(tokenizer, stage.data, has_conversations=train.has_conversations)
    if stage.is_online:
        text["truncation"] = None
    if train.formats and set(train.formats) <= set(PROMPTLESS_FORMATS):
        text["prompt_template"] = None
    return text


TEXT_OF_MODEL = ("tokenizer", "bos", "stop", "pad", "conversations", "chat_template", "template_date")
"""What text_settings have to agree on between a model and the stage that goes on from it."""
TEXT_OF_DATA = ("prompt_template", "prompt_truncation", "truncation")
"""The same, of stages that both read the option; None where one does not."""


def _check_text(plan: Plan, earlier: dict[str, Plan]) -> None:
    """Raises ValueError where a stage reads text otherwise than those whose models it goes on from did.

    An sft stage may: it teaches a model another form of text. A reward model that reads in its own way is
    given the text in its own form. Checkpoints that no stage wrote tell nothing.
    """
    stage, ours = plan.stage, plan.text
    starts = () if stage.algorithm == "sft" else ((stage.start_from, plan.origins.policy),)
    starts = (*starts, (stage.teacher_from, plan.origins.teacher))
    if plan.external is None:
        starts = (*starts, (stage.reward_from, plan.origins.reward))
    elif plan.external.reader.tokenizer is None:
        starts = (*starts, (stage.reward_from, plan.external.path))
    for name, path in starts:
        if name in earlier:
            theirs = earlier[name].text
        elif path is not None and is_stage_dir(path):
            theirs = load_info(path).get("text")
            if theirs is None:
                raise ValueError(
                    f"the checkpoints in {path} do not tell how text was treated; train it again"
                )
        else:
            continue
        shared = [key for key in TEXT_OF_DATA if None not in (theirs[key], ours[key])]
        if differing := text_difference(theirs, ours, [*TEXT_OF_MODEL, *shared]):
            raise ValueError(
                f"{name} was trained on text that is treated otherwise: {differing}; use the same tokenizer "
                "and chat template (tokenizer), conversations or plain text in both, and the same options of "
                "data"
            )


def check_length(
    stage: StageConfig, algorithm: Algorithm, architecture: Architecture, of: str = "model"
) -> None:
    longest, options = stage.data.max_length, "data.max_length"
    if stage.is_online:
        longest = stage.data.max_prompt_length + stage.rollout.max_new_tokens
        options = "data.max_prompt_length or rollout.max_new_tokens"
    if longest > architecture.context_length:
        raise ValueError(
            f"rows of up to {longest} tokens do not fit the {of}'s context of "
            f"{architecture.context_length}; lower {options}"
        )


def _architecture(
    stage: StageConfig,
    where: Origins,
    tokenizer: Tokenizer,
    earlier: dict[str, Plan],
    teacher: Architecture | None,
) -> Architecture:
    """Returns what the stage's models look like; ValueError where what it starts from does not fit.

    A fresh one has the vocabulary of its teacher, which may have more tokens than the tokenizer.
    """
    if stage.start_from in earlier:
        architecture = earlier[stage.start_from].architecture
    elif where.policy is not None:
        architecture = stored_architecture(where.policy, "policy")
    else:
        vocab_size = len(tokenizer) if teacher is None else teacher.vocab_size
        architecture = Architecture.from_config(stage.model, vocab_size=vocab_size)
    check_vocabulary(
        None if stage.start_from in earlier else where.policy, tokenizer, stage.tokenizer, architecture
    )
    return architecture


def _teacher(stage: StageConfig, where: Origins, earlier: dict[str, Plan]) -> Architecture | None:
    """Returns what the teacher looks like; None where there is none."""
    if where.teacher is None:
        return None
    if stage.teacher_from in earlier:
        return earlier[stage.teacher_from].architecture
    return stored_architecture(where.teacher, "policy")


def attempt[T](problems: list[str], make: Callable[..., T], *args: Any, **options: Any) -> T | None:
    """Returns what a function makes, or None where it raises ValueError, whose message joins the problems."""
    try:
        return make(*args, **options)
    except ValueError as error:
        problems += str(error).splitlines()
        return None
