"""The command line: one configuration file, dotted flags over it, help; every problem at once, before JAX."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rlhf_jax import config_checks, strict_yaml
from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.config import STAGE_SECTIONS, Config, StageConfig
from rlhf_jax.config_file import EXAMPLE, STAGE_KEYS, dump_config, ignored, resolve
from rlhf_jax.config_types import LARGEST_INT
from rlhf_jax.options import AXES, OPTIONS, REQUIRED, SECTIONS, STAGE_FIELDS, Option, did_you_mean, show

PLAIN_FLAGS = ("--config", "--help", "--json", "--print_config", "--print_sharding")


class ConfigError(ValueError):
    """Every problem of a configuration, one line each."""

    def __init__(self, problems: Iterable[str], source: str) -> None:
        self.problems = list(dict.fromkeys(problems))
        self.source = source
        super().__init__(self.problems)

    def __str__(self) -> str:
        """Returns the message for the user: a headline, then a line for each problem."""
        count = len(self.problems)
        headline = f"rlhf_jax: {count} problem{'s' if count > 1 else ''} in {self.source}:"
        return "\n".join([headline, *(f"  {problem}" for problem in self.problems)])


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the flags say."""

    config: str
    """The configuration file."""
    overrides: dict[str, str]
    """{path: the text given for it}, such as {'ppo.clip_eps': '0.1'}."""
    json: bool
    """Print one machine-readable line on stdout at the end."""
    print_config: bool
    """Print the resolved configuration and stop."""
    print_sharding: bool
    """Print where every parameter lies and stop."""
    help: bool
    """Print all options and stop."""
    problems: tuple[str, ...]
    """What is wrong with the flags themselves."""


def read_command_line(argv: list[str]) -> tuple[Config, bool]:
    """Returns the configuration, and whether --json was given; see `read_config` for what it raises."""
    return read_config(argv), parse(argv).json


def read_config(argv: list[str], *, runs: bool = True) -> Config:
    """Returns the configuration of `--config FILE [--a.b value ...]`, every stage with all its sections.

    With `runs` it is going to be run, so that its directory has to be its own.

    Raises:
        ConfigError: with every problem of the file and the flags.
        SystemExit: 0, after --help or --print_config has printed what it is for.
    """
    line = parse(argv)
    if line.help:
        print(help_text())
        raise SystemExit(0)
    try:
        tree = read_tree(line.config)
    except ValueError as error:
        raise ConfigError([*line.problems, str(error)], line.config or "the command line") from None
    overridden, misplaced = apply(tree, line.overrides)
    resolved = resolve(overridden, line.overrides)
    found = config_checks.problems(
        resolved, resolve(tree), runs=runs and not (line.print_config or line.print_sharding)
    )
    problems = [*line.problems, *misplaced, *found]
    if problems:
        raise ConfigError(problems, line.config)
    if line.print_config:
        print(dump_config(resolved.config), end="")
        raise SystemExit(0)
    return resolved.config


def read_stage(
    tree: dict[str, Any], argv: list[str], *, sections: Collection[str], unread: Collection[str]
) -> StageConfig:
    """Returns the only stage of a tree with flags over it, for entries that train nothing.

    Args:
        tree: what the entry decides, and defaults of its own.
        argv: flags.
        sections: that the entry reads.
        unread: options of them that it does not.

    Raises:
        ValueError: flags that are unknown or wrong; all of them.
    """
    line = parse(argv)
    foreign = [
        path
        for path in line.overrides
        if path.split(".")[0] not in sections or ".".join(path.split(".")[:2]) in unread
    ]
    problems = [f"--{path}: is not read here; other options of {', '.join(sections)} are" for path in foreign]
    overridden, misplaced = apply(tree, line.overrides)
    resolved = resolve(overridden, line.overrides)
    problems += [*line.problems, *misplaced, *resolved.problems]
    problems += [
        f"{resolved.path_of(where)}: would be ignored: {why}"
        for where, why in ignored(resolved).items()
        if resolved.path_of(where).startswith("--")
    ]
    stage = resolved.config.stages[0]
    problems += config_checks.check_formats(stage, lambda section, name: f"--{section}.{name}")
    problems += config_checks.check_mesh(resolved)
    if problems:
        raise ValueError("\n".join(problems))
    return stage


def parse(argv: list[str]) -> CommandLine:
    """Returns what the flags say: `--flag`, `--a.b value` or `--a.b=value`.

    Problems are an unknown flag, one without a value or given twice, and whatever is no flag.
    """
    problems: list[str] = []
    values: dict[str, str] = {}
    words = list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag == "-h":
            flag = "--help"
        if not flag.startswith("--"):
            problems.append(f"{flag}: expected a flag, such as --ppo.clip_eps 0.1")
            continue
        if "." not in flag and flag not in PLAIN_FLAGS:
            problems.append(_unknown_flag(flag))
            if not equals and words and not words[0].startswith("--"):
                words.pop(0)
            continue
        if flag in values:
            problems.append(f"{flag}: is given twice")
        if flag in PLAIN_FLAGS and flag != "--config":
            if equals:
                problems.append(f"{flag}: takes no value, got {value!r}")
        elif not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"{flag}: needs a value: {flag} VALUE or {flag}=VALUE")
                continue
            value = words.pop(0)
        values.setdefault(flag, value)
    return CommandLine(
        config=values.get("--config", ""),
        overrides={flag.removeprefix("--"): value for flag, value in values.items() if "." in flag},
        json="--json" in values,
        print_config="--print_config" in values,
        print_sharding="--print_sharding" in values,
        help="--help" in values,
        problems=tuple(problems),
    )


def read_tree(path: str) -> dict[str, Any]:
    """Returns the tree of a configuration file.

    Raises:
        ValueError: the file is missing, is not UTF-8 or not YAML, gives a key twice, or holds no mapping.
    """
    if not path:
        raise ValueError("--config: must be given: a YAML file, such as configs/quickstart.yaml")
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a directory; name a file in it" if file.is_dir() else "there is no such file"
        raise ValueError(f"--config {path}: {what}")
    try:
        tree = strict_yaml.load(file.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as `run:` and `stages:`, got {show(tree)}")
    return tree


def apply(tree: dict[str, Any], overrides: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the tree with the overrides in their places, and what is wrong with them."""
    tree, problems = copy.deepcopy(tree), []
    for path, text in overrides.items():
        try:
            _set(tree, path, text)
        except ValueError as error:
            problems.append(f"--{path}: {error}")
    return tree, problems


def _set(tree: dict[str, Any], path: str, text: str) -> None:
    target, keys = tree, path.split(".")
    if keys[0] == "stages":
        if len(keys) < 3:
            raise ValueError("name the stage and its option: --stages.NAME.SECTION.OPTION VALUE")
        entries = tree.get("stages")
        if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
            return  # no stage can be found in it: `resolve` says what is wrong with the list
        named = {str(entry.get("name")): entry for entry in entries if isinstance(entry, dict)}
        if keys[1] not in named:
            near = did_you_mean(keys[1], named) or f"; stages: {', '.join(named)}"
            raise ValueError(f"there is no stage {keys[1]!r}{near}")
        if keys[2] == "name":
            raise ValueError("a stage's name can only be changed in the file")
        target, keys = named[keys[1]], keys[2:]
    *sections, last = keys
    if not sections and last in SECTIONS:
        raise ValueError("name an option of this section: --SECTION.OPTION VALUE")
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ValueError(f"cannot be set, as {section} is {show(target)} in the file")
    option = OPTIONS.get(keys[0], {}).get(keys[1]) if len(keys) > 1 else None
    is_list = option is not None and option.base == AXES and text.lstrip().startswith("[")
    is_text = (
        keys[0] in STAGE_KEYS
        or (len(keys) > 2 and not is_list)
        or (option is not None and option.is_text(text))
    )
    target[last] = text if is_text else strict_yaml.load(text, "the value")


def _unknown_flag(flag: str) -> str:
    name = flag.removeprefix("--")
    homes = [section for section, options in OPTIONS.items() if name in options]
    if name in SECTIONS or name == "stages":
        return f"{flag}: name an option: --SECTION.OPTION VALUE or --stages.NAME.SECTION.OPTION VALUE"
    if len(homes) > 2:
        return f"{flag}: no such flag; did you mean --SECTION.{name}, of {', '.join(homes)}?"
    if homes:
        return f"{flag}: no such flag; did you mean {' or '.join(f'--{home}.{name}' for home in homes)}?"
    return f"{flag}: no such flag{did_you_mean(flag, PLAIN_FLAGS)}"


def help_text() -> str:
    """Returns the usage and every section and option with type, range, default and text."""
    lines = [
        "usage: python -m rlhf_jax.train --config FILE [--SECTION.OPTION VALUE ...]",
        "                                [--stages.NAME.SECTION.OPTION VALUE ...]",
        "                                [--print_config] [--print_sharding] [--json]",
        "",
        *_paragraph(
            "Runs the stages that FILE lists, or goes on where an interrupted run of the same configuration "
            "stopped. The file is YAML: the sections below, and `stages`, such as"
        ),
        f"  stages: {EXAMPLE}",
        *_paragraph(
            f"Beside its keys a stage may hold the sections {', '.join(STAGE_SECTIONS)} and that of its "
            "algorithm: what they set goes before the common sections. In strings ${NAME} is the environment "
            f"variable NAME. Integers are at most {LARGEST_INT} where nothing else is said."
        ),
        "",
        "  --config FILE    the configuration file",
        "  --print_config   print the resolved configuration, which is a valid FILE itself, and stop",
        "  --print_sharding print where the mesh puts every parameter, with the bytes of a device, and stop",
        "  --json           print one line of JSON on stdout at the end; progress goes to stderr",
        "  --help           this text",
        "",
        "stages: a list, run in order",
        *_entry("name", f"{STAGE_FIELDS['name'].kind}; its directory is named so, and later stages name it"),
        *_entry("algorithm", STAGE_FIELDS["algorithm"].kind),
        *_entry("from", STAGE_FIELDS["start_from"].text),
        *_entry("reward_from", STAGE_FIELDS["reward_from"].text),
        *_entry("teacher_from", STAGE_FIELDS["teacher_from"].text),
    ]
    for name, section in SECTIONS.items():
        kind = " Only the stages of this algorithm read it." if name in ALGORITHM_SECTIONS else ""
        lines += ["", *_paragraph(f"{name}: {' '.join((section.__doc__ or '').split())}{kind}")]
        like = next((other for of in section.__mro__[1:] for other in SECTIONS if SECTIONS[other] is of), "")
        if like:
            lines += _paragraph(f"It has the options of {like}; others, or with other defaults, are:", "  ")
        for option in OPTIONS[name].values():
            known = OPTIONS[like].get(option.name) if like else None
            if option != known:
                lines += _paragraph(f"--{name}.{option.name}  {_signature(option)}", "  ")
            if known is None or option.text != known.text:
                lines += _paragraph(option.text, "      ")
    return "\n".join(lines)


def _signature(option: Option) -> str:
    allowed = f"{option.kind} {option.range}".rstrip()
    return f"{allowed}; " + ("required" if option.default is REQUIRED else f"default {show(option.default)}")


def _entry(key: str, text: str) -> list[str]:
    return textwrap.wrap(f"{key:<11} {text}", 110, initial_indent="  ", subsequent_indent=" " * 14)


def _paragraph(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
