"""Saves, checks and restores the train state of a stage; the only importer of Orbax.

A checkpoint is the directory `STAGE/checkpoints/STEP`: Orbax's `state/`, which holds the arrays under flat
names such as `params/policy/trunk/embed/embedding`, and our `manifest.json`, written last. The manifest makes
the checkpoint count: it has the caller's `info`, the shape and type of every leaf, and the size and CRC-32 of
every file, so that a checkpoint which is unfinished, truncated or has flipped bits is passed over rather than
loaded. (Orbax keeps no checksum of array data, and a read of a truncated file is not a clean error.)

A stage that is done writes `STAGE/result.json`: its figures, and the step of its last checkpoint.

In a run of several processes the directory is on a disk that they share. All of them call a Checkpointer and
load parameters at the same time: each writes and reads its part of the arrays, the first does the rest and
decides which checkpoint is good, which takes reading all of it.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.multihost import multihost as orbax_multihost
from orbax.checkpoint.experimental.v1._src.synchronization import multihost as orbax_multihost_v1

from rlhf_jax import watchdog
from rlhf_jax.agreement import on_first, together
from rlhf_jax.batch import Params
from rlhf_jax.config import DistributedConfig
from rlhf_jax.distributed import num_processes, process_id
from rlhf_jax.files import replace_file, to_json
from rlhf_jax.manifest import (
    FORMAT,
    MANIFEST,
    check_match,
    files_of,
    leaf_kind,
    problem_of,
    read_manifest,
    shape_and_dtype,
)

logger = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs with a traceback what it raises as well

RESULT = "result.json"
PATIENCE = 20.0
"""Seconds that one of several processes, when it fails, waits for its save before it tells the others."""


class CheckpointReader:
    """The checkpoints of a stage, to read."""

    def __init__(self, directory: Path | str) -> None:
        """Names the directory that holds the checkpoints; it need not exist yet."""
        self.directory = Path(directory).absolute()

    def latest(self) -> int | None:
        """Returns the newest step whose checkpoint is complete and undamaged; None where there is none.

        Reads every byte of that checkpoint once, to check it. Logs a warning for each newer one passed over.
        """
        for step in reversed(self._steps()):
            wrong = problem_of(self._path(step))
            if wrong is None:
                return step
            logger.warning(
                "CHECKPOINT NOT USABLE: %s: %s; falling back to an older one", self._path(step), wrong
            )
        return None

    def info(self, step: int) -> dict[str, Any]:
        """Returns what was given to `save` as info. Raises ValueError where there is no such checkpoint."""
        return self._manifest(step)["info"]

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Returns the state that was saved at a step, laid out as this run wants it.

        Args:
            step: usually what `latest` returned.
            abstract_state: the state's structure; leaves are jax.ShapeDtypeStruct with a sharding, or
                jax.Array. The mesh need not be the one that saved.

        Raises:
            ValueError: the leaves' names, shapes or types are not those of the checkpoint (a table tells
                which), or there is no such checkpoint.
        """
        return self.restore_subtree(step, "", abstract_state)

    def restore_subtree(self, step: int, prefix: str, abstract: Any, *, rounds: bool = False) -> Any:
        """Returns the part of a state below a prefix such as `params/policy`; reads nothing else.

        Args:
            step: see `restore`.
            prefix: names of fields and keys, joined with `/`; empty for the whole state.
            abstract: as in `restore`, the structure of the part.
            rounds: types may differ from what was stored; numbers are rounded to them while they are read.

        Raises:
            ValueError: see `restore`.
        """
        wanted = _named_leaves(abstract, prefix)
        stored = {
            name: kind
            for name, kind in self._manifest(step)["leaves"].items()
            if not prefix or name == prefix or name.startswith(prefix + "/")
        }
        kinds = {name: leaf_kind(leaf) for name, leaf in wanted.items()}
        if rounds:
            kinds |= {name: [stored[name][0], kinds[name][1]] for name in kinds.keys() & stored.keys()}
        check_match(self._path(step), stored, kinds)
        target = {name: abstract_leaf(leaf) for name, leaf in wanted.items()}
        with watchdog.paused(), _partial_load():
            loaded = ocp.load(str(self._path(step)), target)
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])

    def leaves(self, step: int, prefix: str) -> dict[str, np.ndarray]:
        """Returns the leaves below a prefix as host arrays, by their names below it; for a few small ones."""
        stored = self._manifest(step)["leaves"]
        names = [name for name in stored if name.startswith(prefix + "/")]
        target = {name: np.empty(*shape_and_dtype(stored[name])) for name in names}
        with _partial_load():
            loaded = ocp.load(str(self._path(step)), target) if target else {}
        return {name.removeprefix(prefix + "/"): np.asarray(loaded[name]) for name in names}

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(
            int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir()
        )

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            return read_manifest(self._path(step))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no usable checkpoint of step {step} in {self.directory}: {error}; "
                f"there are steps {self._steps()}"
            ) from error


class Checkpointer(CheckpointReader):
    """The checkpoints of a stage, to read and write; the stage that trains owns one.

    `save` returns as soon as the arrays are copied to the host, and the rest happens in the background; an
    error there is raised by the next `save`, `latest`, `wait` or `close`, on all processes if on one. Use it
    as a context manager.
    """

    def __init__(
        self, directory: Path | str, keep: int, timeout: int = DistributedConfig.save_timeout
    ) -> None:
        """Makes nothing yet.

        Args:
            directory: of the checkpoints.
            keep: how many of the newest ones stay.
            timeout: seconds after which a save that is not done has failed.
        """
        super().__init__(directory)
        assert keep >= 1, keep
        self.keep, self._timeout = keep, timeout
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[int] | None = None
        self._newest: int | None = None  # once known to be good

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts saving a state; the caller may donate the state's buffers as soon as this returns.

        Args:
            step: names the checkpoint; one that was saved and is undamaged is never overwritten.
            state: any pytree of jax.Array.
            info: JSON values that a reader wants to know before it restores, such as the configuration.

        Raises:
            ValueError: the step is already saved.
        """
        with watchdog.paused():
            self._save(step, state, info)

    def _save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        self.wait()
        path = self._path(step)
        on_first(partial(self._clear, path))
        leaves = _named_leaves(state)
        manifest = {
            "format": FORMAT,
            "step": step,
            "info": json.loads(json.dumps(info)),  # a copy, and an error here rather than in the background
            "leaves": {name: leaf_kind(leaf) for name, leaf in leaves.items()},
        }
        with _patient(self._timeout):
            written = ocp.save_async(str(path), leaves)
        self._pending = self._thread.submit(self._finish, written, path, manifest)

    def latest(self) -> int | None:
        """Returns the newest usable step, the save in progress included; only the first call reads a file."""
        self.wait()
        if self._newest is None:
            self._newest = on_first(super().latest)
        return self._newest

    def wait(self) -> None:
        """Returns when the save in progress is finished; raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with watchdog.paused():
                self._newest = together(pending.result)

    def close(self) -> None:
        """Waits for the save in progress and gives up the background thread."""
        self.__exit__(None, None, None)

    def _clear(self, path: Path) -> None:
        """Makes room for a checkpoint: what killed runs left goes, what is good is never overwritten."""
        if path.exists():
            if problem_of(path) is None:
                raise ValueError(f"step {path.name} is already saved in {path}; resume from it or remove it")
            shutil.rmtree(path)
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.orbax-checkpoint-tmp"):  # of a save that was killed
            shutil.rmtree(leftover)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if error is None:
                self.wait()
            elif self._pending is not None:  # other processes may not have met the error, and not come here
                # The error that brought us here is to be told, and no other.
                with watchdog.paused(), suppress(OSError, JaxRuntimeError):
                    self._pending.result(None if num_processes() == 1 else PATIENCE)
        finally:
            self._thread.shutdown(wait=error is None or num_processes() == 1)

    def _finish(self, written: Any, path: Path, manifest: dict[str, Any]) -> int:
        """Returns the step, once this process knows it to be saved."""
        try:
            written.result()
        except ValueError as error:  # TensorStore raises nothing else where a file cannot be written
            raise OSError(errno.EIO, f"cannot be saved: {error}", str(path)) from error
        except (TimeoutError, JaxRuntimeError) as error:
            if not isinstance(error, TimeoutError) and "DEADLINE_EXCEEDED" not in str(error):
                raise
            why = f"is not saved after {self._timeout} s (distributed.save_timeout): {error}"
            raise TimeoutError(errno.ETIMEDOUT, why, str(path)) from error
        if process_id() == 0:  # Orbax is done when all processes have written
            replace_file(path / MANIFEST, to_json(manifest | {"files": files_of(path)}, indent=1))
            older = [step for step in self._steps() if step < manifest["step"]]
            for step in older[: max(0, len(older) - (self.keep - 1))]:  # only now that the new one counts
                shutil.rmtree(self._path(step))
        return manifest["step"]


def load_params(stage_dir: Path | str, role: str, abstract: Params) -> Params:
    """Returns one role's parameters of a stage's newest checkpoint; reads nothing else.

    Args:
        stage_dir: RUN/STAGE.
        role: policy, value, reward.
        abstract: the parameters' structure, with shardings; see CheckpointReader.restore. Its types are those
            of the result, whatever the stage stored.

    Raises:
        ValueError: the stage has no usable checkpoint, or no such role, or other shapes.
    """
    reader, step = _agreed(stage_dir)
    stored = reader._manifest(step)["leaves"]
    roles = sorted({name.split("/")[1] for name in stored if name.startswith("params/")})
    if role not in roles:
        raise ValueError(
            f"{reader.directory} has no parameters of role {role!r}; it has {', '.join(roles) or 'none'}"
        )
    return reader.restore_subtree(step, f"params/{role}", abstract, rounds=True)


def load_aux(stage_dir: Path | str) -> dict[str, np.ndarray]:
    """Returns the algorithm's named arrays of a stage's newest checkpoint, such as the reward normaliser."""
    reader, step = _agreed(stage_dir)
    return reader.leaves(step, "aux")


def load_info(stage_dir: Path | str) -> dict[str, Any]:
    """Returns the info of a stage's newest checkpoint."""
    reader, step = _newest(stage_dir)
    return reader.info(step)


def fingerprint(stage_dir: Path | str) -> str:
    """Returns what changes when a stage's newest checkpoint does: its step and its files' sizes and sums."""
    reader, step = _newest(stage_dir)
    files = sorted(reader._manifest(step)["files"].items())
    return f"step {step}, {zlib.crc32(to_json(files).encode()):08x}"


def saved_step(stage_dir: Path | str) -> int | None:
    """Returns the newest step of a stage that has been saved, by its manifest's name; None: there is none."""
    reader = CheckpointReader(Path(stage_dir) / "checkpoints")
    return max((step for step in reader._steps() if (reader._path(step) / MANIFEST).is_file()), default=None)


def write_result(stage_dir: Path | str, step: int, figures: dict[str, Any]) -> None:
    """Marks a stage as done: writes its result.json atomically.

    Args:
        stage_dir: RUN/STAGE.
        step: of its last checkpoint, which is the stage's result.
        figures: what summary.json says of the stage.
    """
    text = to_json({"step": step, "figures": figures}, indent=1) + "\n"
    on_first(lambda: replace_file(Path(stage_dir) / RESULT, text))


def read_result(stage_dir: Path | str) -> tuple[int, dict[str, Any]] | None:
    """Returns (step, figures) of a stage that is done; None of one that is not."""
    path = Path(stage_dir) / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return int(result["step"]), dict(result["figures"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no stage's result ({error!r}); remove it to finish the stage again"
        ) from error


def _agreed(stage_dir: Path | str) -> tuple[CheckpointReader, int]:
    """Returns _newest, on all processes what the first one finds."""
    return on_first(partial(_newest, stage_dir))


def _newest(stage_dir: Path | str) -> tuple[CheckpointReader, int]:
    reader = CheckpointReader(Path(stage_dir) / "checkpoints")
    step, result = reader.latest(), read_result(stage_dir)
    if step is None:
        raise ValueError(f"no usable checkpoint in {reader.directory}; run that stage first")
    if result is not None and step != result[0]:
        raise ValueError(
            f"the last checkpoint of {stage_dir}, step {result[0]}, is not usable, and that of step {step} "
            f"is not the stage's result; remove {Path(stage_dir) / RESULT} and repeat the command of that "
            "run: it then trains the steps after it again"
        )
    return reader, step


def _patient(timeout: int) -> ocp.Context:
    """Returns Orbax's settings for a save that may take so many seconds."""
    # How long processes wait for each other in it is no setting of Orbax's, but a constant of two modules.
    for module in (orbax_multihost, orbax_multihost_v1):
        vars(module)["_DEFAULT_BARRIER_TIMEOUT"] = timeout
    context = ocp.Context()
    context.async_options.timeout_secs = timeout
    return context


def _partial_load() -> ocp.Context:
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    return context


def _named_leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves in tree order, named by fields, keys and indices."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    named = {
        "/".join(filter(None, (prefix, name))): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }
    assert len(named) == len(leaves), "two leaves of the state have the same name"
    return named


def abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns what is told of an array by its shape, type and sharding."""
    assert leaf.sharding is not None, "every leaf of the abstract state needs a sharding"
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
