"""What is wrong with a run's options of profiling and of the cache of compiled programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from rlhf_jax.config import StageConfig
from rlhf_jax.config_file import PathOf
from rlhf_jax.options import did_you_mean


def check_profile(stage: StageConfig, names: Sequence[str], path: PathOf) -> Iterator[str]:
    """Yields steps that cannot be traced, and stages that do not exist.

    Args:
        stage: that may be traced.
        names: of all stages.
        path: of an option, for messages.
    """
    run, where = stage.run, path("run", "profile_steps")
    if not run.profile_steps:
        for option in ("profile_stage", "profile_hosts"):
            if (value := getattr(run, option)) not in ("", "first"):
                yield f"{path('run', option)}: {value!r} would be ignored: run.profile_steps names no steps"
        return
    first, last = run.profile_range
    if first > last:
        yield f"{where}: must be FIRST-LAST, the first step not behind the last, got {run.profile_steps!r}"
    if run.profile_stage and run.profile_stage not in names:
        hint = did_you_mean(run.profile_stage, names) or f"; stages: {', '.join(names)}"
        yield f"{path('run', 'profile_stage')}: there is no stage {run.profile_stage!r}{hint}"
    elif run.profile_stage in ("", stage.name) and last > stage.settings.num_updates:
        other = "" if run.profile_stage or len(names) == 1 else ", or name one stage in run.profile_stage"
        yield (
            f"{where}: stage {stage.name} has {stage.settings.num_updates} steps, got "
            f"{run.profile_steps!r}; name steps that it has{other}"
        )


def check_cache(stage: StageConfig, path: PathOf) -> Iterator[str]:
    """Yields an address of the cache of compiled programs that JAX cannot read and write here."""
    cache, where = stage.run.compilation_cache, path("run", "compilation_cache")
    scheme, found, _ = cache.partition("://")
    if found and scheme != "gs":
        yield f"{where}: {cache!r}: must be a directory or an address gs://BUCKET/PATH"
    elif found and find_spec("gcsfs") is None:
        yield f"{where}: {cache!r} needs gcsfs; pip install gcsfs, or mount the bucket and give its path"
