"""Between a configuration file's tree and `Config`: types, the merging of stages, and the writer.

A tree is what the YAML holds: sections of options, and the list `stages`. A path is what a user types:
`ppo.clip_eps`, or `stages.NAME.ppo.clip_eps` where a stage sets it; it begins with `--` where a flag did.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rlhf_jax import strict_yaml
from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.config import PATH_OPTIONS, RUN_SECTIONS, SOURCES, STAGE_SECTIONS, Config, StageConfig
from rlhf_jax.options import OPTIONS, REQUIRED, SECTIONS, STAGE_FIELDS, did_you_mean, show
from rlhf_jax.unread import ARCHITECTURE, unread

STAGE_KEYS = ("name", "algorithm", *SOURCES)
EXAMPLE = "[{name: sft, algorithm: sft}, {name: ppo, algorithm: ppo, from: sft}]"
Where = tuple[str, str, str]
"""(stage name or '' for the top level, section, option)"""


PathOf = Callable[[str, str], str]
"""(section, option) -> the path at which a stage's option is set."""


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A tree's configuration as far as it can be told, and where each option was set."""

    config: Config
    complete: bool
    """Whether every stage of the tree is in `config`."""
    names: tuple[str, ...]
    """The names of the tree's stages, also of those with problems."""
    explicit: frozenset[Where]
    """The valid options that the tree sets."""
    flags: frozenset[str]
    """The paths, without `--`, that the command line set."""
    problems: tuple[str, ...]
    wrong: frozenset[str]
    """The options, as section.option, that `problems` speaks of."""

    def path(self, stage: str, section: str, option: str) -> str:
        """Returns the path at which a stage's option is set, or would be where nothing sets it."""
        return self.path_of((stage if (stage, section, option) in self.explicit else "", section, option))

    def path_of(self, where: Where) -> str:
        """Returns the path of a place."""
        stage, section, option = where
        plain = f"stages.{stage}.{section}.{option}" if stage else f"{section}.{option}"
        return f"--{plain}" if plain in self.flags else plain


def resolve(tree: Mapping[str, Any], flags: Collection[str] = ()) -> Resolved:
    """Returns the configuration of a tree: every stage with all its sections.

    A stage's own options go before the common ones; options that it does not read are left at their defaults.
    Wrong types, values out of range, unknown and missing names are in `problems`; whether the options fit
    each other is the question of `config_checks.py`.
    """
    reader = _Reader(frozenset(flags))
    common = {name: reader.section(name, name, tree[name]) for name in SECTIONS if name in tree}
    for key in tree:
        if key != "stages" and key not in SECTIONS:
            reader.unknown(key, "section", [*SECTIONS, "stages"])
    if "dir" not in common.get("run", {}) and "run.dir" not in reader.wrong:
        reader.problem("run.dir", "must be given: the directory that the run is written to", "run.dir")

    run_sections = {
        name: cls(**_with_required(name, common.get(name, {}))) for name, cls in RUN_SECTIONS.items()
    }
    entries = reader.stages(tree)
    stages: dict[str, StageConfig] = {}
    for entry, own in entries:
        name, algorithm = entry["name"], entry["algorithm"]
        merged = {key: common.get(key, {}) | own.get(key, {}) for key in (*STAGE_SECTIONS, algorithm)}
        stage = StageConfig(
            name=name,
            algorithm=algorithm,
            **{field: entry.get(key, "") for key, field in SOURCES.items()},
            settings=ALGORITHM_SECTIONS[algorithm](**merged[algorithm]),
            **{key: cls(**merged[key]) for key, cls in STAGE_SECTIONS.items()},
            **run_sections,
        )
        stages[name] = _settle(stage, stages)
    settled = tuple(_settle_common(stages).values())
    return Resolved(
        config=Config(run=settled[0].run if settled else run_sections["run"], stages=settled),
        complete=reader.complete,
        names=tuple(reader.names),
        explicit=frozenset(reader.explicit),
        flags=reader.flags,
        problems=(*reader.problems, *reader.unset_variables()),
        wrong=frozenset(reader.wrong),
    )


def ignored(resolved: Resolved) -> dict[Where, str]:
    """Returns the options that are set and that no stage reads from there, with the reason."""
    stages = {stage.name: stage for stage in resolved.config.stages}
    reasons = {name: unread(stage, stages) for name, stage in stages.items()}
    found = {}
    for where in sorted(resolved.explicit):
        owner, section, option = where
        why = {
            name: reasons[name].get(f"{section}.{option}") or reasons[name].get(section) for name in stages
        }
        if owner:
            if why.get(owner):
                found[where] = why[owner]
            continue
        readers = [name for name in stages if not why[name]]
        own = [(name, section, option) for name in readers if (name, section, option) in resolved.explicit]
        if not readers:
            specific = [name for name in stages if f"{section}.{option}" in reasons[name]]
            found[where] = "; ".join(dict.fromkeys(str(why[name]) for name in specific or stages))
        elif len(own) == len(readers):
            places = " and ".join(resolved.path_of(place) for place in own)
            flags = " ".join(f"--stages.{name}.{section}.{option}" for name in readers)
            found[where] = f"{places} wins; on the command line use {flags}"
    return found


def dump_config(cfg: Config) -> str:
    """Returns the YAML text of a configuration; reading it gives an equal `Config`."""
    stages = {stage.name: stage for stage in cfg.stages}
    reasons = {name: unread(stage, stages) for name, stage in stages.items()}

    def written(section: str, value: Any, names: Collection[str]) -> dict[str, Any]:
        return {
            key: _escaped(option)
            for key, option in dataclasses.asdict(value).items()
            if not all({section, f"{section}.{key}"} & reasons[name].keys() for name in names)
        }

    tree: dict[str, Any] = {
        key: written(key, getattr(cfg.stages[0], key), stages.keys()) for key in RUN_SECTIONS
    }
    tree["stages"] = []
    for name, stage in stages.items():
        entry: dict[str, Any] = {"name": name, "algorithm": stage.algorithm}
        entry |= {key: _escaped(source) for key, source in stage.sources.items() if source}
        values = {key: getattr(stage, key) for key in STAGE_SECTIONS} | {stage.algorithm: stage.settings}
        sections = {key: written(key, value, [name]) for key, value in values.items()}
        tree["stages"].append(entry | {key: section for key, section in sections.items() if section})
    return strict_yaml.dump(tree)


def _settle(stage: StageConfig, earlier: Mapping[str, StageConfig]) -> StageConfig:
    """Returns the stage with unread options at their defaults, its architecture that of where it starts."""
    reasons = unread(stage, earlier)
    settled = {key: _without(key, getattr(stage, key), reasons) for key in STAGE_SECTIONS} | {
        "settings": _without(stage.algorithm, stage.settings, reasons)
    }
    if stage.start_from in earlier:
        source = earlier[stage.start_from].model
        settled["model"] = dataclasses.replace(
            settled["model"], **{key: getattr(source, key) for key in ARCHITECTURE}
        )
    return dataclasses.replace(stage, **settled)


def _settle_common(stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    """Returns the stages with what none of them reads of the run's sections at its default."""
    reasons = [unread(stage, stages) for stage in stages.values()]
    by_none = (
        {key: reasons[0][key] for key in reasons[0] if all(key in r for r in reasons)} if reasons else {}
    )
    return {
        name: dataclasses.replace(
            stage, **{key: _without(key, getattr(stage, key), by_none) for key in RUN_SECTIONS}
        )
        for name, stage in stages.items()
    }


def _without(section: str, value: Any, reasons: Collection[str]) -> Any:
    """Returns a section whose unread options are at their defaults."""
    defaults = {
        key: option.default
        for key, option in OPTIONS[section].items()
        if section in reasons or f"{section}.{key}" in reasons
    }
    return dataclasses.replace(value, **defaults)


def _with_required(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values, with '' for a required option that is missing; its absence is a problem already."""
    return {key: "" for key, option in OPTIONS[section].items() if option.default is REQUIRED} | values


class _Reader:
    """Reads sections and stages, and keeps a list of what is wrong with them."""

    def __init__(self, flags: frozenset[str]) -> None:
        self.flags = flags
        self.problems: list[str] = []
        self.wrong: set[str] = set()
        self.explicit: set[Where] = set()
        self.names: list[str] = []
        self.complete = True
        self.unset: dict[str, list[str]] = {}

    def problem(self, path: str, text: str, *names: str) -> None:
        dashes = "--" if path in self.flags else ""
        self.problems.append(f"{dashes}{path}: {text}")
        self.wrong.update(names)

    def unset_variables(self) -> list[str]:
        """Returns a line for each environment variable that is used and not set."""
        lines = []
        for name, paths in self.unset.items():
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            lines.append(f"${{{name}}}: the environment variable {name} is not set; it stands in {shown}")
        return lines

    def unknown(self, path: str, what: str, known: Collection[str]) -> None:
        """Reports an unknown name: an option of another section is the best guess, then the nearest name."""
        section, _, name = path.rpartition(".")
        homes = [f"{home}.{name}" for home in RUN_SECTIONS | STAGE_SECTIONS if name in OPTIONS[home]]
        guess = did_you_mean(name, known)
        if homes:
            self.problem(path, f"no such {what}; did you mean {homes[0]!r}?", homes[0])
        else:
            meant = guess.split("'")[1] if guess else name
            self.problem(path, f"no such {what}{guess}", f"{section.rpartition('.')[2]}.{meant}")

    def section(self, path: str, section: str, values: Any, stage: str = "") -> dict[str, Any]:
        """Returns the valid options of a section of the top level or of a stage."""
        if not isinstance(values, dict):
            self.problem(
                path,
                f"expected options and their values, got {show(values)}",
                *(f"{section}.{o}" for o in OPTIONS[section]),
            )
            return {}
        valid = {}
        for key, value in values.items():
            if key not in OPTIONS[section]:
                self.unknown(f"{path}.{key}", "option", OPTIONS[section])
                continue
            try:
                option = OPTIONS[section][key].read(_expanded(value))
                is_path = f"{section}.{key}" in PATH_OPTIONS
                valid[key] = _at_home(option) if is_path else option
                self.explicit.add((stage, section, key))
            except _UnsetVariable as error:
                self.unset.setdefault(error.name, []).append(f"{path}.{key}")
                self.wrong.add(f"{section}.{key}")
            except ValueError as error:
                self.problem(f"{path}.{key}", str(error), f"{section}.{key}")
        return valid

    def stages(self, tree: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, dict]]]:
        """Returns (name, algorithm and sources; valid options by section) of each stage that can be run."""
        entries = tree.get("stages")
        if not isinstance(entries, list) or not entries:
            got = f", got {show(entries)}" if "stages" in tree else ""
            self.problem("stages", f"must be given: a list of stages such as {EXAMPLE}{got}")
            self.complete = False
            return []
        read = [self._stage(index, entry) for index, entry in enumerate(entries)]
        self.complete = None not in read
        return [stage for stage in read if stage is not None]

    def _stage(self, index: int, entry: Any) -> tuple[dict[str, Any], dict[str, dict]] | None:
        if not isinstance(entry, dict):
            self.problem(
                f"stages[{index}]",
                f"expected a stage such as {{name: sft, algorithm: sft}}, got {show(entry)}",
            )
            return None
        name = self._stage_value(f"stages[{index}].name", entry, "name", "name")
        path = f"stages.{name}" if name else f"stages[{index}]"
        repeated = name in self.names
        if repeated:
            self.problem(f"stages[{index}].name", f"another stage is called {name!r}; names must differ")
        if name:
            self.names.append(name)
        algorithm = self._stage_value(f"{path}.algorithm", entry, "algorithm", "algorithm")
        sources = {
            key: self._stage_value(f"{path}.{key}", entry, key, field)
            for key, field in SOURCES.items()
            if key in entry
        }
        allowed = [*STAGE_SECTIONS, *([algorithm] if algorithm else ALGORITHM_SECTIONS)]
        own = {}
        for key, values in entry.items():
            if key in allowed:
                own[key] = self.section(f"{path}.{key}", key, values, stage=name or f"[{index}]")
            elif key in RUN_SECTIONS:
                self.problem(f"{path}.{key}", "is common to all stages; set it outside of the list of stages")
            elif key in ALGORITHM_SECTIONS:
                self.problem(f"{path}.{key}", f"would be ignored: this stage runs {algorithm}")
            elif key not in STAGE_KEYS:
                self.unknown(f"{path}.{key}", "key of a stage", [*STAGE_KEYS, *allowed])
        if not name or repeated or not algorithm or None in sources.values():
            return None
        return {"name": name, "algorithm": algorithm, **sources}, own

    def _stage_value(self, path: str, entry: dict[str, Any], key: str, field: str) -> str | None:
        """Returns one of the strings of a stage, or None where it is wrong or missing."""
        if key not in entry:
            self.problem(path, f"must be given: {STAGE_FIELDS[field].kind}")
            return None
        try:
            value = STAGE_FIELDS[field].read(_expanded(entry[key]))
            return os.path.expanduser(value) if key in SOURCES else value
        except _UnsetVariable as error:
            self.unset.setdefault(error.name, []).append(path)
            return None
        except ValueError as error:
            self.problem(path, str(error))
            return None


def _at_home(option: Any) -> Any:
    """Returns a path, or a mapping of paths, with ~ replaced by the home directory."""
    if isinstance(option, dict):
        return {os.path.expanduser(path): item for path, item in option.items()}
    return os.path.expanduser(option)


class _UnsetVariable(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


_VARIABLE = re.compile(r"\$(\$?)\{(\w+)\}")


def _expanded(value: Any) -> Any:
    """Returns a value with ${NAME} in strings replaced by the environment's; $${NAME} means ${NAME} itself.

    Raises:
        _UnsetVariable: the environment has no such variable.
        ValueError: two keys of a mapping become the same.
    """
    if isinstance(value, dict):
        keys = [_expanded(key) for key in value]
        if twice := [key for key in value if keys.count(_expanded(key)) > 1]:
            raise ValueError(f"{' and '.join(map(repr, twice))} are the same")
        return {key: _expanded(item) for key, item in zip(keys, value.values(), strict=True)}
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        if escaped:
            return match.group()[1:]
        if name not in os.environ:
            raise _UnsetVariable(name)
        return os.environ[name]

    return _VARIABLE.sub(replacement, value)


def _escaped(value: Any) -> Any:
    """Returns a value that `_expanded` makes the given one of."""
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_escaped(item) for item in value]
    return _VARIABLE.sub(lambda match: f"${match.group()}", value) if isinstance(value, str) else value
