"""Configuration -> parts -> run: `python -m rlhf_jax.train --config FILE [--section.key value ...]`.

The same command resumes an interrupted run. Exit codes: 0 done; 2 the configuration, the data or a checkpoint
is wrong, or nothing can be written to the run directory, and each problem is named; 1 the run itself failed;
87 it hung; 130 or 143 it was stopped by SIGINT or SIGTERM: at once, or after a step where one is trained.
Several processes of a run end with the same code.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.command_line import ConfigError, dump_config, parse, read_command_line
from rlhf_jax.config import Config
from rlhf_jax.files import new_directory, replace_file, to_json
from rlhf_jax.host_memory import keep_freed_memory

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from rlhf_jax.data.tokenizer import Tokenizer
    from rlhf_jax.plan import Plan
    from rlhf_jax.stop_signals import StopSignals

OF_SEVERAL = ("RLHF_JAX_COORDINATOR", "RLHF_JAX_DISTRIBUTED", "TPU_WORKER_HOSTNAMES")
"""Variables that are set where a process may be one of several, which takes importing JAX to know."""
TPU_DEVICES = ("/dev/accel0", "/dev/vfio")
"""The same of files."""


def main(argv: list[str] | None = None) -> int:
    """Runs the stages of a configuration; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before anything was begun
        return _failed("interrupted", 130)


def _main(argv: list[str]) -> int:
    keep_freed_memory()
    try:
        config, wants_json = read_command_line(argv)
        shows_sharding = parse(argv).print_sharding
    except (ConfigError, OSError) as error:
        message = str(error) if isinstance(error, ConfigError) else f"rlhf_jax: {_reason(error, '--config')}"
        print(message, file=sys.stderr, flush=True)
        if any(name in os.environ for name in OF_SEVERAL) or any(map(os.path.exists, TPU_DEVICES)):
            from rlhf_jax import distributed

            distributed.fail(message, 2, is_told=True)
        return 2

    # Only now, so that a wrong configuration is told at once, and before any device is touched.
    import jax

    from rlhf_jax import distributed, watchdog
    from rlhf_jax.agreement import is_of_another
    from rlhf_jax.failures import is_of_runtime
    from rlhf_jax.rewards.functions import RewardError
    from rlhf_jax.sharding import axis_rules, stage_meshes
    from rlhf_jax.sharding_table import sharding_table
    from rlhf_jax.stop_signals import Stopped, StopSignals
    from rlhf_jax.trainer import NotFiniteError

    has_begun, results = False, {}

    def failed(message: object, code: int, error: BaseException) -> int:
        """Prints what went wrong; returns the exit code, or ends this process and all others."""
        if (lifeline := distributed.lifeline()) is not None:
            trace = "".join(traceback.format_exception(error)) if has_begun else ""
            is_told = is_of_another(error) or (isinstance(error, RewardError) and error.__cause__ is None)
            may_follow = is_told or is_of_runtime(error)
            lifeline.fail(f"{trace}rlhf_jax: {message}", code, may_follow=may_follow)
        return _failed(message, code)

    if config.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.run.compilation_cache)
    try:
        distributed.initialize(config.stages[0].distributed, watchdog.idle)
        with StopSignals() as signals, axis_rules(config.stages[0].mesh.axes):
            plans, mesh = prepare(config, writes=not shows_sharding)
            if shows_sharding:
                if distributed.is_first():
                    tables = [sharding_table(plan, stage_meshes(plan.stage, mesh)[0]) for plan in plans]
                    print("\n\n".join(tables))
            else:
                has_begun = True
                results = run(config, plans, mesh, signals)
        distributed.wait_for_all("done")
    except RewardError as error:
        return failed(f"{error}\nWhat was trained before is saved; the same command goes on.", 1, error)
    except NotFiniteError as error:
        return failed(
            f"{error}\nWhat was saved before stays, but the same command would come to the same end: change "
            "the configuration and give it another run.dir.",
            1,
            error,
        )
    except ValueError as error:
        return failed(error, 2, error)
    except OSError as error:
        return failed(_reason(error, config.run.dir), 1 if has_begun else 2, error)
    except KeyboardInterrupt as error:  # or SIGTERM
        message = f"stopped by {error if isinstance(error, Stopped) else 'SIGINT'}; {_saved(config)}"
        print(file=sys.stderr)
        if isinstance(error, Stopped) and error.by_all:
            return _failed(message, 128 + error.signum)
        has_begun = False  # where it was says nothing
        return failed(message, 128 + error.signum if isinstance(error, Stopped) else 130, error)
    if wants_json and not shows_sharding and distributed.is_first():
        print(to_json({"run": config.run.dir, "summary": results}))
    return 0


def prepare(config: Config, *, writes: bool = True) -> tuple[list[Plan], Mesh]:
    """Returns the plans and the mesh of a run, its configuration and tokenizer written to its directory.

    Without `writes` nothing is written there.

    Models of the hub are downloaded first; the run goes on with the commits that it began with.

    Raises:
        ValueError: data, lengths, models or mesh do not fit; all that the host can tell, at once.
        OSError: the run directory cannot be written.
    """
    from rlhf_jax.agreement import check_alike, on_first, together
    from rlhf_jax.distributed import is_first, process_id
    from rlhf_jax.machine import code_sums, machine_lines, module_sums, versions
    from rlhf_jax.mesh_checks import check_mesh
    from rlhf_jax.models import hub
    from rlhf_jax.plan import plan_stages
    from rlhf_jax.plan_notes import notes
    from rlhf_jax.run_tokenizer import TOKENIZER, prepare_tokenizer
    from rlhf_jax.sharding import make_mesh, stage_meshes
    from rlhf_jax.sharding_table import sharding_line

    run_dir = Path(config.run.dir)
    check_alike("the files of rlhf_jax", code_sums)
    check_alike("the versions", versions, "install the same Python and packages on all hosts")
    check_alike("the configurations", lambda: (dump_config(config), writes))
    known = on_first(lambda: hub.read_commits(run_dir))
    found = on_first(lambda: hub.fetch_models(config, known))  # the others fetch the commits that it found
    fetched, commits = together(lambda: found if is_first() else hub.fetch_models(config, found[1]))
    for name in commits.keys() - known.keys() if is_first() else ():
        print(hub.said_of(name, commits[name]), file=sys.stderr)

    def planned() -> tuple[Tokenizer, list[Plan], Mesh]:
        tokenizer = prepare_tokenizer(fetched)
        plans = plan_stages(fetched, tokenizer)
        mesh = make_mesh(config.stages[0].mesh)
        check_mesh(plans, mesh)
        return tokenizer, plans, mesh

    tokenizer, plans, mesh = together(planned)  # nothing is written before all have planned
    functions = [of for plan in plans for of in (*plan.functions.values(), plan.gold) if of]
    modules = {of.name.partition(":")[0] for of in functions}
    check_alike("the files of reward functions", lambda: module_sums(modules))
    machine = machine_lines(mesh)

    def tell_and_write() -> None:
        print("\n".join(machine), file=sys.stderr)
        for plan in plans:
            for line in (*notes(plan), sharding_line(plan, stage_meshes(plan.stage, mesh)[0])):
                print(line, file=sys.stderr)
        if not writes:
            return
        replace_file(run_dir / "config.yaml", dump_config(config))
        hub.write_commits(run_dir, commits)
        if not (run_dir / TOKENIZER).exists():
            with new_directory(run_dir / TOKENIZER) as unfinished:
                tokenizer.save_pretrained(str(unfinished))

    def check_shared() -> None:
        deadline = time.monotonic() + 10  # a network's file system may lag
        while not (run_dir / TOKENIZER).exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"run.dir: {str(run_dir)!r} is not on storage that all processes share: process "
                    f"{process_id()} does not find there what process 0 wrote"
                )
            time.sleep(0.1)

    on_first(tell_and_write)
    if writes:
        together(check_shared)
    return plans, mesh


def run(config: Config, plans: Sequence[Plan], mesh: Mesh, signals: StopSignals) -> dict[str, dict]:
    """Returns the figures of every stage by name; trains those that are not yet done, and exports the policy.

    Args:
        config: of the run.
        plans: of its stages.
        mesh: where everything lies.
        signals: that stop it.
    Raises:
        ValueError: a checkpoint does not fit.
        RewardError: a reward function failed; what was trained is saved.
        NotFiniteError: updates had to be skipped again and again.
        Stopped: SIGINT or SIGTERM came; what was trained is saved.
    """
    from rlhf_jax.agreement import on_first
    from rlhf_jax.export import export_stage, last_policy
    from rlhf_jax.stage import run_stage
    from rlhf_jax.summary import comparisons, render_table, write_summary

    results, run_dir = {}, Path(config.run.dir)
    for plan in plans:
        results[plan.stage.name] = run_stage(plan, mesh, signals)
        on_first(partial(write_summary, run_dir, results))
        signals.check()
    if (policy := last_policy(config)) and not on_first((run_dir / "export").exists):
        export_stage(run_dir, config, policy, run_dir / "export", mesh)

    def tell() -> None:
        text = render_table(results, run_dir, comparisons(run_dir), terminal=sys.stderr.isatty())
        print(text, file=sys.stderr)

    on_first(tell)
    return results


def _saved(config: Config) -> str:
    """Returns how far the stages have come that the same command need not repeat."""
    from rlhf_jax.checkpoint import read_result, saved_step

    told = []
    for stage in config.stages:
        directory = Path(config.run.dir) / stage.name
        with suppress(OSError, ValueError):
            if read_result(directory) is not None:
                told.append(f"stage {stage.name} is done")
            elif (step := saved_step(directory)) is not None:
                told.append(f"stage {stage.name} is saved until step {step}")
    return f"{', '.join(told) or 'nothing was trained yet'}; the same command goes on from there"


def _failed(message: object, code: int) -> int:
    """Prints what went wrong; returns the exit code."""
    print(f"rlhf_jax: {message}", file=sys.stderr)
    return code


def _reason(error: OSError, otherwise: str) -> str:
    """Returns `PATH: REASON` of a file that could not be read or written."""
    return f"{error.filename or otherwise}: {error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
