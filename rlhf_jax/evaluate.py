"""Held-out figures of any model: `python -m rlhf_jax.evaluate --model RUN_OR_HF_DIRECTORY --data FILE`.

A policy is measured by its perplexity on texts or demonstrations, a reward model by its accuracy on pairs or
rankings, or by its squared error on ratings. Exit codes: 0 measured; 2 model, data or a flag is wrong, and
the reason is named.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from rlhf_jax import command_line, distributed
from rlhf_jax.agreement import check_alike, ended_with
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.checkpoint import load_info
from rlhf_jax.config import DataConfig, StageConfig
from rlhf_jax.config_types import LARGEST_INT, Kind
from rlhf_jax.data.columns import Format, record_format
from rlhf_jax.data.examples import Examples, load_examples
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.sources import open_source
from rlhf_jax.data.tokenize import text_difference, text_settings
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.evaluation import evaluate_records
from rlhf_jax.export import read_run_config
from rlhf_jax.files import to_json
from rlhf_jax.metrics import format_number
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.hub import local_directory
from rlhf_jax.models.scorers import is_scorer
from rlhf_jax.origins import fingerprint, is_stage_dir, stored_architecture
from rlhf_jax.plan import TEXT_OF_MODEL, check_length, with_rows_of
from rlhf_jax.programs import TokenIds, build_programs, rows_per_unit
from rlhf_jax.roles import load_policy, load_reward
from rlhf_jax.run_tokenizer import TOKENIZER, check_vocabulary
from rlhf_jax.sharding import axis_rules, check_batch, make_mesh
from rlhf_jax.stage import stage_model

logger = logging.getLogger(__name__)

Role = Literal["policy", "reward"]
ALGORITHM_OF: dict[Role, str] = {"policy": "sft", "reward": "reward_model"}
"""The algorithm whose held-out figures are those of a role."""
SECTIONS = ("data", "model", "tokenizer", "mesh", "distributed")
"""Sections of the configuration that a measurement reads."""
UNREAD = (
    "distributed.step_timeout",
    "distributed.save_timeout",
    "data.length_buckets",
    "data.train",
    "data.eval",
    "model.remat",
    "model.param_dtype",
)
"""Options of these sections that it does not read."""
CHUNK = 4096  # tokens whose logits exist at once, unless a flag says otherwise


class Subject(NamedTuple):
    """A model to measure."""

    path: Path
    """RUN/STAGE or a Hugging Face directory."""
    role: Role
    tokenizer: Path


def main(argv: list[str] | None = None) -> int:
    """Measures what the flags name and prints it; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_jax.evaluate",
        description=__doc__,
        epilog="Options of data, model, tokenizer, mesh and distributed are given as for rlhf_jax.train,\n"
        "such as --data.format preference, --data.columns.prompt question, --data.max_length 512.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="a run, RUN/STAGE, a Hugging Face directory, or hub:OWNER/NAME"
    )
    parser.add_argument("--data", required=True, help="records, in the notation of data.train")
    parser.add_argument("--batch_size", type=int, default=16, help="records at once, over all devices")
    parser.add_argument("--json", action="store_true", help="print one line of JSON on stdout")
    args, others = parser.parse_known_args(argv)
    try:
        found = measure(args.model, args.data, args.batch_size, others)
    except (ValueError, OSError) as error:
        return ended_with(error)
    distributed.wait_for_all("done")
    if not distributed.is_first():
        return 0
    for name, value in found.items():
        print(f"{name:<12}{format_number(value) if isinstance(value, float) else value}", file=sys.stderr)
    if args.json:
        print(to_json(found))
    return 0


def measure(model: str, data: str, batch_size: int, flags: list[str]) -> dict[str, Any]:
    """Returns the figures of a model on data.

    Args:
        model: a run, RUN/STAGE, a Hugging Face directory, or hub:OWNER/NAME[@REVISION].
        data: in the notation of data.train.
        batch_size: records at once, over all devices.
        flags: further options, as `--section.option value`.

    Returns:
        Of a policy `perplexity` and `nll`, nats per token that carries loss; of a reward model `score`, the
        mean over completions, and on comparisons `accuracy`, `margin` and the `loss` of Bradley and Terry,
        means over pairs; on ratings `squared_error`, which is the `loss`. The `records`, those `left_out`
        while reading or `dropped` as too long, the rows that were `cut`, and the `tokens` that carry loss (of
        a reward model: of all completions). `model`, its `role`, `data`.

    Raises:
        ValueError: flags, model or data that are wrong.
    """
    model = str(local_directory(model))
    first = read_stage("reward", model, data, batch_size, flags)
    distributed.initialize(first.distributed)
    subject = find_subject(Path(model), data, first.data)
    architecture = stored_architecture(subject.path, subject.role)
    text = load_info(subject.path)["text"] if is_stage_dir(subject.path) else {}
    template = text.get("prompt_template") or ""
    has_ratings = subject.role == "reward" and _format(data, first.data, "rating") == "rating"
    stage = read_stage(
        subject.role,
        model,
        data,
        batch_size,
        flags,
        architecture.context_length,
        prompt_template=template,
        has_ratings=has_ratings,
    )
    tokenizer = load_tokenizer(stage.tokenizer, str(subject.tokenizer))
    check_vocabulary(subject.path, tokenizer, stage.tokenizer, architecture)
    check_length(stage, ALGORITHMS[stage.algorithm], architecture)
    examples = load_examples(stage.data, stage.settings.records, "eval", tokenizer, stage.run.seed)
    ours = text_settings(tokenizer, stage.data, has_conversations=examples.has_conversations)
    if distributed.is_first() and text and (differing := text_difference(text, ours, TEXT_OF_MODEL)):
        logger.warning("%s was trained on text that is treated otherwise: %s", subject.path, differing)
    check_alike(
        "models, records, their tokens or the flags",
        lambda: (fingerprint(subject.path), examples.fingerprint, ours, repr(stage)),
    )
    counts = {
        "records": len(examples),
        "left_out": sum(examples.left_out.values()),
        "dropped": examples.num_dropped,
        "cut": examples.num_cut,
        "tokens": int(examples.rows.num_loss_tokens.sum()),
    }
    with axis_rules(stage.mesh.axes):
        metrics = _metrics(subject, stage, architecture, tokenizer, examples)
    return metrics | counts | {"model": str(subject.path), "role": subject.role, "data": data}


def find_subject(model: Path, data: str, cfg: DataConfig) -> Subject:
    """Returns the model to measure: of a run the last stage whose model the data's columns can measure.

    Raises:
        ValueError: the run has no such stage, or the data cannot be read.
    """
    if is_stage_dir(model):
        role: Role = "policy" if _trains(model, "policy") else "reward"
        return Subject(model, role, model.parent / TOKENIZER)
    if not (model / "config.yaml").is_file():
        return Subject(model, "reward" if is_scorer(hf.read_config(model)) else "policy", model)
    is_judged = _format(data, cfg, "preference") or _format(data, cfg, "rating")
    role = "reward" if is_judged else "policy"
    stages = [s.name for s in read_run_config(model).stages if role in ALGORITHMS[s.algorithm].trains]
    if not stages:
        raise ValueError(f"{model} has no stage that trains a {role}, which {data} could measure")
    return Subject(model / stages[-1], role, model / TOKENIZER)


def read_stage(
    role: Role,
    model: str,
    data: str,
    batch_size: int,
    flags: list[str],
    context_length: int = LARGEST_INT,
    *,
    prompt_template: str = "",
    has_ratings: bool = False,
) -> StageConfig:
    """Returns the stage whose evaluation the measurement is: defaults, and what the flags say.

    Raises:
        ValueError: flags that are unknown or wrong; all of them.
    """
    name = ALGORITHM_OF[role]
    tree: dict[str, Any] = {
        "run": {"dir": "."},
        "stages": [{"name": "evaluate", "algorithm": name, "from": model}],
        "data": {
            "train": data,
            "eval": data,
            "max_length": context_length,
            "max_prompt_length": context_length,
            "max_eval_records": LARGEST_INT,
            "prompt_template": prompt_template,
        },
        "model": {"logprob_chunk": CHUNK},
        name: {"batch_size": batch_size},
    }
    if has_ratings:
        tree[name] |= {"loss": "regression", "normalizer": "none"}
    return command_line.read_stage(tree, flags, sections=SECTIONS, unread=UNREAD)


def _metrics(
    subject: Subject, stage: StageConfig, architecture: Architecture, tokenizer: Tokenizer, examples: Examples
) -> dict[str, float]:
    """Returns the means over all records, by their names without `eval/`."""
    algorithm = with_rows_of(ALGORITHMS[stage.algorithm], examples)
    mesh, batch_size = make_mesh(stage.mesh), stage.settings.batch_size
    check_batch(mesh, rows_per_unit(stage, algorithm) * batch_size, "--batch_size")
    model = stage_model(stage, architecture)
    load = load_policy if subject.role == "policy" else load_reward
    longest = examples.most_loss_tokens
    ids = TokenIds(eos=cast(int, tokenizer.eos_token_id), pad=cast(int, tokenizer.pad_token_id))
    programs = build_programs(stage, algorithm, model, mesh, longest, ids)
    loader = Loader(examples, batch_size, stage.run.seed, mesh)
    evaluated = evaluate_records(programs, loader, mesh)({subject.role: load(subject.path, model, mesh)}, {})
    return {name.removeprefix("eval/"): x for name, x in evaluated.metrics.items()}


def _trains(stage_dir: Path, role: Role) -> bool:
    """Returns whether a stage of a run trains a role; one that this version cannot read is told of later."""
    algorithm = ALGORITHMS.get(str(load_info(stage_dir).get("algorithm")))
    return algorithm is not None and role in algorithm.trains


def _format(data: str, cfg: DataConfig, kind: Kind) -> Format | None:
    """Returns the format of records that can be read as this kind; None where they cannot."""
    try:
        return record_format(open_source(data, where="--data"), kind, cfg, f"--data: {data}")
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
