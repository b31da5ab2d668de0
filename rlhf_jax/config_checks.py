"""Whether the options of a configuration fit each other, and the files they name.

Each check yields lines `path: what is wrong, with the value, what is allowed and the fix`. A line names all
options that it rests on, those of other sections as section.option, so that what only follows from an option
that is reported already is left out.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from rlhf_jax.algo_checks import check_algorithm, check_ptx
from rlhf_jax.axes import axis_problems, axis_table
from rlhf_jax.config import PATH_OPTIONS, RESERVED_NAMES, DataConfig, LoraConfig, StageConfig
from rlhf_jax.config_file import PathOf, Resolved, Where, ignored
from rlhf_jax.config_types import LARGEST_INT, RANKINGS, Kind
from rlhf_jax.data.columns import SERVES
from rlhf_jax.data.records import PROMPT
from rlhf_jax.data.sources import local_path
from rlhf_jax.models.hub import PREFIX, is_hub, split_name
from rlhf_jax.online_config import DistillConfig, OnlineConfig, PPOConfig, TRPOConfig
from rlhf_jax.options import did_you_mean
from rlhf_jax.reward_checks import check_normalizer, check_reward_model
from rlhf_jax.rewards.functions import load_function
from rlhf_jax.run_checks import check_cache, check_profile
from rlhf_jax.run_directory import check_run_directory


def problems(resolved: Resolved, file_alone: Resolved, *, runs: bool = True) -> list[str]:
    """Returns every problem of a configuration, those of its reading first.

    Args:
        resolved: the file's tree with the command line's overrides.
        file_alone: the file's tree by itself: an option of the file that a flag makes idle is no problem.
        runs: the configuration is going to be run, so that its directory has to be its own.
    """
    found = []
    stages = resolved.config.stages
    unreadable = set(resolved.names) - {stage.name for stage in stages}
    for index, stage in enumerate(stages):

        def path(section: str, option: str, name: str = stage.name) -> str:
            return resolved.path(name, section, option)

        earlier = {s.name: s for s in stages[:index]}
        others = [s.name for s in stages[index:]]
        if not unreadable & stage.rests_on:
            sources = list(check_sources(stage, earlier, others))
            found += sources or check_normalizer(stage, earlier, path)
            found += check_ptx(stage, earlier, path)
        found += check_name(stage)
        found += check_local(stage, path)
        found += check_hub(stage, path)
        found += check_batches(stage, path)
        found += check_architecture(stage, earlier, path)
        found += check_algorithm(stage, path)
        found += check_reward_model(stage, path)
        found += check_lora(stage, earlier, path)
        found += check_formats(stage, path)
        found += check_paths(stage, path)
        found += check_functions(stage, path)
        found += check_cache(stage, path)
        found += check_profile(stage, resolved.names, path)
    found += check_mesh(resolved)
    if resolved.complete:
        found += check_ignored(resolved, file_alone)
    found = [line for line in found if not any(_speaks_of(line, option) for option in resolved.wrong)]
    if runs and not (found or resolved.problems):
        found += check_run_directory(resolved.config)
    return list(dict.fromkeys([*resolved.problems, *found]))


def check_sources(stage: StageConfig, earlier: dict[str, StageConfig], others: list[str]) -> Iterator[str]:
    """Yields what is wrong with what a stage starts from or reads: a fitting earlier stage, or a directory.

    Args:
        stage: whose sources are checked.
        earlier: the stages before it by name.
        others: the names of the stages after it, its own among them.
    """

    def missing(key: str, name: str) -> str:
        if name in others:
            place = "is this stage itself" if name == stage.name else "comes later in the list"
            return f"stages.{stage.name}.{key}: {name!r} {place}; name an earlier stage or a directory"
        near = did_you_mean(name, earlier) or _hub_hint(name)
        near = near or ("; earlier stages: " + ", ".join(earlier) if earlier else "")
        return f"stages.{stage.name}.{key}: {name!r} is neither an earlier stage nor a directory{near}"

    source, judge = stage.start_from, stage.reward_from
    if source in earlier:
        if earlier[source].algorithm == "reward_model":
            yield (
                f"stages.{stage.name}.from: {source!r} is a reward model; {stage.algorithm} starts from a "
                "policy, the result of a stage that trains one, such as sft"
            )
    elif source and (source in others or not _is_directory(source)):
        yield missing("from", source)

    if judge and not stage.is_online:
        yield (
            f"stages.{stage.name}.reward_from: would be ignored: only an online stage, such as ppo, trains "
            "on scores"
        )
    elif judge in earlier:
        if earlier[judge].algorithm != "reward_model":
            yield (
                f"stages.{stage.name}.reward_from: {judge!r} runs {earlier[judge].algorithm}; "
                "name a reward_model stage"
            )
    elif judge and (judge in others or not _is_directory(judge)):
        yield missing("reward_from", judge)

    teacher = stage.teacher_from
    if not isinstance(stage.settings, DistillConfig):
        if teacher:
            yield f"stages.{stage.name}.teacher_from: would be ignored: only a distill stage has a teacher"
    elif not teacher:
        yield (
            f"stages.{stage.name}.teacher_from: must be given in a stage that runs {stage.algorithm}: an "
            "earlier stage or a directory whose policy is the teacher"
        )
    elif teacher in earlier and earlier[teacher].algorithm == "reward_model":
        yield (
            f"stages.{stage.name}.teacher_from: {teacher!r} is a reward model; name the result of a "
            "stage that trains a policy, such as sft"
        )
    elif teacher not in earlier and (teacher in others or not _is_directory(teacher)):
        yield missing("teacher_from", teacher)
    elif teacher == (stage.start_from or stage.model.path):  # adapters begin as nothing
        yield (
            f"stages.{stage.name}.teacher_from: {teacher!r} is the model that the stage starts from, which "
            "has nothing to learn from itself; name another one"
        )


def check_name(stage: StageConfig) -> Iterator[str]:
    """Yields a name whose directory the run needs for something else."""
    if stage.name in RESERVED_NAMES:
        yield (
            f"stages.{stage.name}.name: {stage.name!r} is a directory of the run itself, as are "
            f"{', '.join(RESERVED_NAMES)}; choose another name"
        )


def check_local(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields addresses such as gs://bucket/file where a path stands: they are neither read nor written."""
    options = [option.split(".") for option in PATH_OPTIONS if option != "run.compilation_cache"]
    places = {path(*option): option for option in options}
    values = {place: getattr(getattr(stage, section), key) for place, (section, key) in places.items()}
    values |= {f"stages.{stage.name}.{key}": source for key, source in stage.sources.items()}
    for place, value in values.items():
        for item in [value] if isinstance(value, str) else value:
            if _is_remote(item):
                yield (
                    f"{place}: {item!r} is not on this machine; only local files and directories are read "
                    "and written: copy it, or mount it and give its path"
                )


def check_hub(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields names of the hub that have another form than hub:OWNER/NAME[@REVISION]."""
    values = {path("model", "path"): stage.model.path, "tokenizer.path": stage.tokenizer.path}
    values |= {path("lora", "path"): stage.lora.path}
    values |= {f"stages.{stage.name}.{key}": source for key, source in stage.sources.items()}
    for place, value in values.items():
        try:
            if is_hub(value):
                split_name(value)
        except ValueError as error:
            yield f"{place}: {error}"


def check_batches(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields the batch sizes of a stage that do not divide, by each other or over the mesh."""
    settings, section = stage.settings, stage.algorithm
    parts, batch, micro = settings.num_minibatches, settings.rows_per_update, settings.microbatch_size
    option, size, text = "batch_size", batch, f"{batch}"
    whole = settings.update_rows
    if batch % parts:
        yield (
            f"{path(section, 'num_minibatches')}: must divide {whole}, got {parts} for {batch}; "
            f"{_divisors(batch)} do"
        )
    else:
        shared = settings.sequences_per_row if isinstance(settings, OnlineConfig) else 1
        name = f"{whole} / num_minibatches" if parts > 1 else whole
        size = batch // parts
        if size % shared:
            yield (
                f"{path(section, 'sequences_per_row')}: must divide {name}, got {shared} for {size}; "
                f"{_divisors(size)} do"
            )
        elif isinstance(settings, OnlineConfig) and settings.rows_per_rollout % shared:
            yield (
                f"{path(section, 'sequences_per_row')}: must divide batch_size * group_size, got {shared} "
                f"for {settings.rows_per_rollout}; {_divisors(settings.rows_per_rollout)} do"
            )
        elif shared > 1:
            name, size = f"{name} / sequences_per_row", size // shared
        text = f"{name.replace(whole, str(batch))} = {size}" if size != batch else text
        if micro and size % micro:
            yield (
                f"{path(section, 'microbatch_size')}: must divide {name}, got {micro} for {size}; "
                f"{_divisors(size)} do"
            )
        elif micro:
            option, size, text = "microbatch_size", micro, f"{micro}"
    # What -1 becomes is not known yet; it divides the rows further.
    sizes, axes = stage.mesh.sizes, axis_table(stage.mesh.axes)["batch"]
    over = {axis: sizes[axis] for axis in axes if sizes.get(axis, 1) > 1}
    # A pair is two rows. What divides the smallest of batch, minibatch and microbatch divides the others.
    devices = math.prod(over.values())
    pairs: dict[Kind, int] = {"preference": 2, "preference_with_margin": 2}
    per_record = devices if settings.records in RANKINGS else pairs.get(settings.records, 1)
    unit = devices // math.gcd(devices, per_record)  # how many rows a ranking is the data tell
    if size % unit == 0:  # of groups the prompts are dealt as well
        option, size, text = "batch_size", settings.batch_size, f"{settings.batch_size}"
    if size % unit == 0 and isinstance(settings, OnlineConfig) and settings.sequences_per_row > 1:
        size = settings.rows_per_rollout // settings.sequences_per_row  # more than are learned are scored
        text = f"batch_size * group_size / sequences_per_row = {size}"
    if size % unit:
        shown = " * ".join(f"mesh.{axis} {parts}" for axis, parts in over.items())
        yield f"{path(section, option)}: must fill the mesh with a multiple of {unit} ({shown}), got {text}"
    steps = settings.num_optimizer_steps
    if steps > LARGEST_INT:
        yield (
            f"{path(section, 'num_iterations')}: num_iterations * num_epochs * num_minibatches must be at "
            f"most {LARGEST_INT}, got {steps}"
        )
    elif settings.num_updates * batch > LARGEST_INT:
        yield (
            f"{path(section, 'batch_size')}: {batch} records in each of {settings.num_updates} updates "
            f"must be at most {LARGEST_INT} in all, got {settings.num_updates * batch}"
        )
    waits = settings.value_warmup if isinstance(settings, PPOConfig) else 0
    if waits >= settings.num_updates:
        yield (
            f"{path(section, 'value_warmup')}: must be less than num_iterations = {settings.num_updates}, "
            f"got {waits}"
        )
        return
    steps -= waits * settings.num_epochs * settings.num_minibatches
    if stage.optimizer.warmup_steps > steps:
        names, behind = (f"{section}.num_steps",), f" behind {section}.value_warmup" if waits else ""
        if isinstance(settings, OnlineConfig):
            names = tuple(f"{section}.{of}" for of in ("num_iterations", "num_epochs", "num_minibatches"))
        yield (
            f"{path('optimizer', 'warmup_steps')}: must be at most the optimiser steps of the stage, "
            f"{' * '.join(names)}{behind} = {steps}, got {stage.optimizer.warmup_steps}"
        )


def check_architecture(stage: StageConfig, earlier: dict[str, StageConfig], path: PathOf) -> Iterator[str]:
    """Yields what cannot be built or is too short, of a model that is trained from scratch."""
    root = stage
    while root.start_from in earlier:
        root = earlier[root.start_from]
    model = stage.model
    if root.start_from or model.path:
        return
    if stage is root:
        if model.num_heads % model.num_kv_heads:
            yield (
                f"{path('model', 'num_kv_heads')}: must divide num_heads, got {model.num_kv_heads} "
                f"for {model.num_heads}; {_divisors(model.num_heads)} do"
            )
        if model.hidden_size % model.num_heads:
            yield (
                f"{path('model', 'num_heads')}: must divide hidden_size, got {model.num_heads} "
                f"for {model.hidden_size}"
            )
        elif model.hidden_size // model.num_heads % 2:
            yield (
                f"{path('model', 'num_heads')}: hidden_size / num_heads must be even, as rotary positions "
                f"turn pairs, got {model.hidden_size} / {model.num_heads}"
            )
        tensor, table = stage.mesh.tensor, axis_table(stage.mesh.axes)
        dimensions = {"heads": "num_heads", "kv_heads": "num_kv_heads", "mlp": "mlp_size"}
        divided = [key for name, key in dimensions.items() if "tensor" in table[name]]
        if tensor > 1 and (odd := [key for key in divided if getattr(model, key) % tensor]):
            sizes = " and ".join(f"model.{key} = {getattr(model, key)}" for key in odd)
            is_few = odd == ["num_kv_heads"]
            whole = "; with mesh.axes.kv_heads: none each device has all keys and values" if is_few else ""
            yield f"{path('mesh', 'tensor')}: must divide {sizes}, got {tensor}{whole}"
    if stage.is_online:
        longest = stage.data.max_prompt_length + stage.rollout.max_new_tokens
        if longest > model.context_length:
            yield (
                f"{path('rollout', 'max_new_tokens')}: data.max_prompt_length + max_new_tokens must be at "
                f"most model.context_length = {model.context_length}, got {stage.data.max_prompt_length} + "
                f"{stage.rollout.max_new_tokens} = {longest}"
            )
    elif stage.data.max_length > model.context_length:
        yield (
            f"{path('data', 'max_length')}: must be at most model.context_length = {model.context_length}, "
            f"got {stage.data.max_length}"
        )


def check_lora(stage: StageConfig, earlier: dict[str, StageConfig], path: PathOf) -> Iterator[str]:
    """Yields adapters without the sharing that trains them, or without a model that they would adapt."""
    rank, sharing = stage.lora.rank, stage.model.sharing
    if stage.is_online and sharing == "trunk" and not isinstance(stage.settings, PPOConfig | TRPOConfig):
        yield (
            f"{path('model', 'sharing')}: must be separate or hydra where a stage runs {stage.algorithm}, "
            "which has no value model that could share the policy's trunk, got 'trunk'"
        )
    if stage.is_online and sharing == "hydra" and rank == 0:
        yield f"{path('lora', 'rank')}: must be >= 1 where model.sharing is 'hydra', got 0"
    if stage.is_online and sharing != "hydra" and rank:
        yield (
            f"{path('lora', 'rank')}: would be ignored, got {rank}: adapters of {stage.algorithm} need "
            f"model.sharing: hydra; set that, or lora: {{rank: 0}} in the stage {stage.name}"
        )
    elif rank and not stage.start_from and not stage.model.path:
        yield (
            f"{path('lora', 'rank')}: must be 0 where a model is trained from scratch, got {rank} for the "
            f"stage {stage.name}; give it from or model.path, or lora: {{rank: 0}}"
        )
    judge = earlier.get(stage.reward_from)
    is_adapter = judge is not None and judge.algorithm == "reward_model" and judge.lora.rank
    if judge is None or not is_adapter or sharing != "hydra" or not rank:
        return
    if stage.rewards.ensemble != "mean":
        return  # the heads then have a program of their own, and the adapters a base of their own
    if _root(judge, earlier) != _root(stage, earlier):
        return  # perhaps a model of another kind, which is none of the stage's roles: the plan knows
    base, of_judge = (s.start_from or s.model.path for s in (stage, judge))
    if base != of_judge:
        yield (
            f"stages.{stage.name}.reward_from: {judge.name!r} holds adapters of {of_judge!r}, but this "
            f"stage's base is {base!r}; let both start from the same, or train {judge.name} with lora: "
            "{rank: 0}: it then is a model of its own"
        )
    if judge.model.base_dtype != stage.model.base_dtype:
        yield (
            f"{path('model', 'frozen_dtype')}: the adapters of {judge.name!r} belong to a base in "
            f"{judge.model.base_dtype}, this stage's is in {stage.model.base_dtype}; give both the same"
        )
    if _are_other(judge.lora, stage.lora):
        yield (
            f"stages.{stage.name}.reward_from: {judge.name!r} has other adapters, {_told(judge.lora)} where "
            f"this stage has {_told(stage.lora)}; give both the same lora"
        )


def _root(stage: StageConfig, earlier: dict[str, StageConfig]) -> str:
    """Returns where a stage's architecture is from: the first stage of its line, or the model it is given."""
    while stage.start_from in earlier:
        stage = earlier[stage.start_from]
    return stage.start_from or stage.model.path or stage.name


def _are_other(one: LoraConfig, other: LoraConfig) -> bool:
    """Returns whether two sections make adapters that differ, whatever the model is.

    Where one of them names no targets, these depend on the model, and the plan compares them.
    """
    targets = set(one.targets) != set(other.targets) if one.targets and other.targets else False
    return targets or replace(one, path="", targets=()) != replace(other, path="", targets=())


def _told(lora: LoraConfig) -> str:
    facts = asdict(lora).items()
    return f"lora {{{', '.join(f'{key}: {value}' for key, value in facts if key != 'path')}}}"


def check_formats(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields record formats that a stage cannot learn from, and prompts whose length is not given."""
    data, allowed = stage.data, SERVES[stage.settings.records]
    if data.format != "auto" and data.format not in allowed:
        yield (
            f"{path('data', 'format')}: a stage that runs {stage.algorithm} reads {', '.join(allowed)} (or "
            f"auto), got {data.format!r}"
        )
    elif data.prompt_tokens == 0 and stage.is_online and data.format == "text":
        yield (
            f"{path('data', 'prompt_tokens')}: must be >= 1 where data.format is 'text' and a stage needs "
            "prompts, got 0"
        )
    elif data.prompt_tokens == 0 and data.prompts:
        yield f"{path('data', 'prompt_tokens')}: must be >= 1 where data.prompts is set, got 0"
    if data.prompt_template and data.prompt_template.count(PROMPT) != 1:
        yield (
            f"{path('data', 'prompt_template')}: must have {PROMPT} once, such as "
            f"'Question: {PROMPT}\\nAnswer:', got {data.prompt_template!r}"
        )


def check_paths(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields the files and directories of a stage that do not exist, and the lack of held-out records."""
    data, model = stage.data, stage.model
    named = [*(("train", spec) for spec in data.sources), ("eval", data.eval), ("prompts", data.prompts)]
    for option, spec in named:
        file = local_path(spec)
        is_named = spec in ("", "synthetic") or _is_remote(spec)
        if file and not is_named and not file.exists():
            yield f"{path('data', option)}: there is no file or directory {str(file)!r}{_similar_file(file)}"
    yield from check_mixture(data, path)
    if not data.train:
        yield f"{path('data', 'train')}: must not be empty; 'synthetic' is the embedded task"
    elif data.train != "synthetic" and not data.eval:
        example = next(iter(data.sources))
        yield f"{path('data', 'eval')}: must be given: held-out records, such as a slice of {example!r}"
    if model.path and not _is_directory(model.path):
        yield f"{path('model', 'path')}: there is no directory {model.path!r}{_hub_hint(model.path)}"
    elif model.path and Path(model.path).is_dir() and not (Path(model.path) / "config.json").is_file():
        yield f"{path('model', 'path')}: no Hugging Face checkpoint: {model.path!r} has no config.json"
    if stage.lora.path and not _is_directory(stage.lora.path):
        yield (
            f"{path('lora', 'path')}: there is no directory {stage.lora.path!r}{_hub_hint(stage.lora.path)}"
        )
    tokenizer = stage.tokenizer.path
    if tokenizer and not _is_directory(tokenizer):
        yield f"tokenizer.path: there is no directory {tokenizer!r}{_hub_hint(tokenizer)}"


def check_mixture(data: DataConfig, path: PathOf) -> Iterator[str]:
    """Yields sources of a mixture that are the same file, and the one that cannot be mixed."""
    names: dict[str, str] = {}
    for spec in data.sources if isinstance(data.train, dict) else ():
        if spec in ("", "synthetic"):
            yield f"{path('data', 'train')}: {spec!r} cannot be mixed with others"
        same = names.setdefault(os.path.normpath(spec), spec)
        if same != spec:
            yield f"{path('data', 'train')}: {same!r} and {spec!r} are the same; add their weights"


def check_functions(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields the Python functions that cannot be imported or called."""
    rewards = stage.rewards
    for option, spec in [*(("function", spec) for spec in rewards.functions), ("gold", rewards.gold)]:
        try:
            if spec:
                load_function(spec)
        except ValueError as error:
            yield f"{path('rewards', option)}: {error}"


def check_mesh(resolved: Resolved) -> Iterator[str]:
    """Yields axis sizes that no number of devices can have, and names in the table of axes that are none."""
    if not resolved.config.stages:
        return
    sizes = resolved.config.stages[0].mesh.sizes
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            yield f"{resolved.path('', 'mesh', axis)}: must be >= 1, or -1 for what is left, got {size}"
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        yield f"mesh.{open_axes[1]}: only one axis may be -1, got -1 for {' and '.join(open_axes)}"
    for name, problem in axis_problems(resolved.config.stages[0].mesh.axes):
        path = f"mesh.axes.{name}"
        yield f"{'--' if {path, 'mesh.axes'} & resolved.flags else ''}{path}: {problem}"


def check_ignored(resolved: Resolved, file_alone: Resolved) -> Iterator[str]:
    """Yields the options that nothing reads; a section of the file that nothing reads is one line."""
    found, in_file = ignored(resolved), ignored(file_alone) if file_alone.complete else {}
    idle = {where: why for where, why in found.items() if resolved.path_of(where) not in resolved.flags}

    def by_flag(where: Where) -> bool:
        return resolved.path_of(where).startswith("--")

    for where, why in found.items():
        if not by_flag(where) and file_alone.complete and where not in in_file:
            continue
        stage, section, _ = where
        alike = [w for w in resolved.explicit if w[:2] == (stage, section)]
        whole = len(alike) > 1 and all(idle.get(w) == why and not by_flag(w) for w in alike)
        path = (f"stages.{stage}.{section}" if stage else section) if whole else resolved.path_of(where)
        yield f"{path}: would be ignored: {why}"


def _speaks_of(line: str, option: str) -> bool:
    """Returns whether a line rests on section.option: it says so, or is of that section and has the name."""
    section, name = option.split(".")
    of_section = re.match(rf"(--)?(stages\.[^.]+\.)?{section}\.", line)
    return bool(re.search(rf"\b{re.escape(option) if not of_section else name}\b", line))


def _divisors(size: int) -> str:
    """Returns the divisors of a size in words, the largest eight where there are more."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return ", ".join(map(str, sorted({*small, *(size // d for d in small)})[-8:]))


def _is_remote(path: str) -> bool:
    return "://" in path


def _is_directory(path: str) -> bool:
    """Returns whether a path is a directory, or will be one, or is told to be neither elsewhere."""
    return _is_remote(path) or is_hub(path) or Path(path).is_dir()


def _hub_hint(name: str) -> str:
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return f"; a model of the hub is named {PREFIX}{name}" if is_name else ""


def _similar_file(file: Path) -> str:
    return (
        did_you_mean(file.name, sorted(p.name for p in file.parent.iterdir())) if file.parent.is_dir() else ""
    )
