"""Configuration -> parts -> run: `python -m rlhf_jax.train --config FILE [--section.key value ...]`.

The same command resumes an interrupted run. Exit codes: 0 done; 2 the configuration, the data or a checkpoint
is wrong, and each problem is named; 1 the run itself failed.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from rlhf_jax.command_line import ConfigError, dump_config, read_command_line
from rlhf_jax.config import Config
from rlhf_jax.files import replace_file


def main(argv: list[str] | None = None) -> int:
    """Runs the stages of a configuration; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        config, wants_json = read_command_line(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2

    # Only now, so that a wrong configuration is told at once, and before any device is touched.
    from rlhf_jax.rewards.functions import RewardError
    from rlhf_jax.trainer import NotFiniteError

    try:
        results = run(config)
    except (RewardError, NotFiniteError) as error:
        print(
            f"rlhf_jax: {error}\nWhat was trained before is saved; the same command goes on.", file=sys.stderr
        )
        return 1
    except ValueError as error:
        print(f"rlhf_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrlhf_jax: interrupted; the same command goes on from {config.run.dir}", file=sys.stderr)
        return 130
    if wants_json:
        print(json.dumps({"run": config.run.dir, "summary": results}))
    return 0


def run(config: Config) -> dict[str, dict]:
    """Returns the figures of every stage by name; trains those that are not yet done.

    Raises:
        ValueError: data, lengths, mesh or a checkpoint do not fit; all that the host can tell, at once.
        RewardError, NotFiniteError: the run failed; what was trained is saved.
    """
    from rlhf_jax.plan import TOKENIZER, plan_stages, prepare_tokenizer
    from rlhf_jax.sharding import check_batch, make_mesh
    from rlhf_jax.stage import export_policy, run_stage
    from rlhf_jax.summary import comparisons, render_table, write_summary

    tokenizer = prepare_tokenizer(config)
    plans = plan_stages(config, tokenizer)
    mesh = make_mesh(config.stages[0].mesh)
    for plan in plans:
        for name, size in plan.row_counts().items():
            check_batch(mesh, size, f"{plan.stage.algorithm}.{name}")

    run_dir = Path(config.run.dir)
    replace_file(run_dir / "config.yaml", dump_config(config))
    tokenizer.save_pretrained(str(run_dir / TOKENIZER))
    results = {}
    for plan in plans:
        results[plan.stage.name] = run_stage(plan, mesh)
        write_summary(run_dir, results)
    export_policy(plans, mesh, run_dir / "export")
    text = render_table(results, run_dir, comparisons(run_dir), terminal=sys.stderr.isatty())
    print(text, file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
