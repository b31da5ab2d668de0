"""Whether a directory is a run's of this configuration, which then goes on there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax import strict_yaml
from rlhf_jax.config import Config
from rlhf_jax.config_file import dump_config, resolve
from rlhf_jax.options import show

MAY_DIFFER = re.compile(
    r"run\.(dir|log_every|tensorboard|num_samples|max_skipped_updates|compilation_cache|profile_\w+)$|"
    r"mesh\.|distributed\.|"
    r"stages\.[^.]+\.(checkpoint\.|data\.cache_dir$|"
    r"model\.(frozen_memory|remat|unroll|attention|logprob_chunk)$|"
    r"rollout\.(slots|refill_size|steps_per_call)$|"
    r"(?!data\.)\w+\.(microbatch_size|sequences_per_row|length_buckets)$)",
)
"""Options that may change between a run's start and its resumption: what is computed stays the same.

data.length_buckets is none of them: batches are of records of like lengths, which reorders them."""


def check_run_directory(cfg: Config) -> Iterator[str]:
    """Yields that the directory is no run's, or of another configuration, with the options that differ."""
    directory = cfg.run.dir
    if Path(directory).exists() and not Path(directory).is_dir():
        yield f"run.dir: {directory!r} is not a directory"
        return
    saved = Path(directory) / "config.yaml"
    if not saved.is_file():
        return
    try:
        tree = strict_yaml.load(saved.read_text(encoding="utf-8"), str(saved))
    except UnicodeDecodeError:
        tree = None
    except ValueError as error:
        yield f"run.dir: {error}; choose another run.dir"
        return
    if not isinstance(tree, dict) or not {"run", "stages"} <= tree.keys():
        yield f"run.dir: {str(saved)!r} is no run's configuration; choose another run.dir"
        return
    stored = resolve(tree)  # an option that is newer than the run had its default there
    there = _flat(tree if stored.problems else strict_yaml.load(dump_config(stored.config), str(saved)))
    here = _flat(strict_yaml.load(dump_config(cfg), "this configuration"))
    differing = [
        key
        for key in [*here, *(there.keys() - here.keys())]
        if here.get(key) != there.get(key) and not MAY_DIFFER.match(key)
    ]
    if differing:
        shown = [
            f"{key} was {show(there.get(key))}, is {show(here.get(key))}" for key in sorted(differing)[:8]
        ]
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        yield (
            f"run.dir: {directory!r} belongs to a run of another configuration: {'; '.join(shown)}{more}; "
            "choose another run.dir, or the configuration that it was started with to resume it"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {path: value} of a tree; stages go by their names, and lora.targets have one order."""
    if isinstance(tree, list) and prefix == "stages.":
        tree = {str(entry.get("name")): entry for entry in tree if isinstance(entry, dict)}
    if isinstance(tree, list) and prefix.endswith(".lora.targets."):
        tree = sorted(map(str, tree))
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {
        path: value for key, item in tree.items() for path, value in _flat(item, f"{prefix}{key}.").items()
    }
