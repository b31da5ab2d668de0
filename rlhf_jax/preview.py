"""A few records as the model will see them: `python -m rlhf_jax.preview --config FILE [--stage NAME]`.

Which tokens are learned, where prompt, completion, padding and special tokens are, and how long all is.
On a terminal in colour; elsewhere ⟦ ⟧ enclose what is learned. Takes the options of rlhf_jax.train.
Exit codes: 0 shown; 2 the configuration, the data or a model is wrong, and each problem is named.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from rlhf_jax.command_line import ConfigError, read_config
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.records import completions
from rlhf_jax.data.tokenizer import GrowingText, Tokenizer, special_ids
from rlhf_jax.files import to_json
from rlhf_jax.models.hub import fetch_models, read_commits
from rlhf_jax.options import did_you_mean
from rlhf_jax.plan import Plan, plan_stages
from rlhf_jax.run_tokenizer import prepare_tokenizer

Part = Literal["prompt", "completion", "other turns"]
STYLES: Mapping[str, str] = {"prompt": "cyan", "completion": "bold green", "other turns": "yellow"}
SPECIAL = "reverse"
OPEN, CLOSE = "⟦", "⟧"


class Token(NamedTuple):
    """A token of a row."""

    id: int
    text: str
    part: Part
    is_special: bool


def main(argv: list[str] | None = None) -> int:
    """Prints the records of a configuration's stages; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_jax.preview", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", default="", help="the stage whose records to show; by default all")
    parser.add_argument(
        "--records", type=_count, default=2, help="of each stage, its sources in turn; by default 2"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON on stdout instead")
    args, others = parser.parse_known_args(argv)
    try:
        config = read_config(others, runs=False)
        config, _ = fetch_models(config, read_commits(Path(config.run.dir)))
        tokenizer = prepare_tokenizer(config)
        plans = {plan.stage.name: plan for plan in plan_stages(config, tokenizer)}
        if args.stage and args.stage not in plans:
            hint = did_you_mean(args.stage, plans) or f"; stages: {', '.join(plans)}"
            raise ValueError(f"--stage: there is no stage {args.stage!r}{hint}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"rlhf_jax: {error}", file=sys.stderr)
        return 2
    chosen = [plans[args.stage]] if args.stage else list(plans.values())
    if args.json:
        print(to_json({plan.stage.name: as_json(plan, args.records) for plan in chosen}))
        return 0
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for plan in chosen:
        for line in stage_lines(plan, args.records, in_colour=console.is_terminal and not console.no_color):
            console.print(line)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of records; allowed: 0, 1, 2, ...")
    return int(text)


def read_tokens(row: Row, tokenizer: Tokenizer, *, is_prompt_alone: bool) -> list[Token]:
    """Returns the tokens of a row with their texts, whose concatenation is the text of the row.

    A character of several tokens is the text of its last one.

    Args:
        row: of a record.
        tokenizer: that made it.
        is_prompt_alone: of a prompt to complete: nothing of it carries loss.
    """
    special = special_ids(tokenizer)
    text = GrowingText(tokenizer)
    tokens = []
    for end, id_ in enumerate(row.ids, start=1):
        is_other = any(start < end <= behind for start, behind in row.excluded)
        in_prompt = is_prompt_alone or end <= row.prompt_length
        part: Part = "prompt" if in_prompt else "other turns" if is_other else "completion"
        is_special = id_ in special
        read = (
            str(tokenizer.convert_ids_to_tokens(id_))
            if is_special
            else text.add(id_, is_last=end == len(row.ids))
        )
        tokens.append(Token(id_, read, part, is_special))
    return tokens


def stage_lines(plan: Plan, num_records: int, *, in_colour: bool) -> Iterator[Text]:
    """Yields what is printed of a stage: a legend, its first training records, statistics of lengths.

    Args:
        plan: of the stage.
        num_records: how many.
        in_colour: colours tell the parts; otherwise brackets tell what carries loss.
    """
    examples = plan.train
    yield Text(
        f"\n== stage {plan.stage.name}: {plan.stage.algorithm} on {plan.stage.data.train}", style="bold"
    )
    legend = Text("   ")
    for part, style in STYLES.items():
        legend.append(part, style=style).append("  ")
    yield (
        legend.append("special token", style=SPECIAL) if in_colour else Text(f"   {OPEN}completion{CLOSE}")
    )
    for title, row in _titled_rows(plan, num_records):
        tokens = read_tokens(row, plan.tokenizer, is_prompt_alone=examples.kind == "prompt_only")
        yield Text(f"\n-- {title}: {_describe(tokens, row, examples)}", style="dim" if in_colour else "")
        yield _painted(tokens, in_colour)
    yield Text("")
    for split, of in (("train", plan.train), ("eval", plan.held_out)):
        yield Text(f"data.{split}: {len(of)} records, {of.num_dropped} dropped, {of.num_cut} rows cut")
        for what, lengths in length_statistics(of).items():
            shown = ", ".join(f"{name} {value:g}" for name, value in lengths.items())
            yield Text(f"  {what + ' tokens':<18}{shown}")


def length_statistics(examples: Examples) -> dict[str, dict[str, float]]:
    """Returns minimum, median, 95th percentile and maximum of prompts, completions and rows, in tokens."""
    is_row = examples.rows.lengths > 0  # rankings are of different lengths
    prompts, rows = examples.rows.prompt_lengths[is_row], examples.rows.lengths[is_row]
    lengths = {"prompt": prompts}
    if examples.kind != "prompt_only":
        lengths |= {"completion": rows - prompts, "row": rows}
    return {
        what: {
            "min": int(of.min()),
            "median": float(np.median(of)),
            "p95": float(np.percentile(of, 95)),
            "max": int(of.max()),
        }
        for what, of in lengths.items()
    }


def as_json(plan: Plan, num_records: int) -> dict[str, Any]:
    """Returns what `stage_lines` shows, for programs: tokens with their ids, and whether they carry loss."""
    examples = plan.train
    records = []
    for title, row in _titled_rows(plan, num_records):
        tokens = read_tokens(row, plan.tokenizer, is_prompt_alone=examples.kind == "prompt_only")
        shown = {
            "row": title,
            "ids": [token.id for token in tokens],
            "tokens": [token.text for token in tokens],
            "parts": [token.part for token in tokens],
            "prompt_length": row.prompt_length,
        }
        records.append(shown | _padding(row, examples))
    counts = {"records": len(examples), "dropped": examples.num_dropped, "cut": examples.num_cut}
    return counts | {"lengths": length_statistics(examples), "rows": records}


def _titled_rows(plan: Plan, num_records: int) -> list[tuple[str, Row]]:
    """Returns the rows of the first records, of sources in turn, each with what it is of which record."""
    examples, sources = plan.train, list(plan.stage.data.sources)

    def names(number: int) -> tuple[str, ...]:
        match examples.kind:
            case "unpaired":
                return ("desirable" if examples.is_desirable[number] else "undesirable", "mismatched")
            case "preference" | "preference_with_margin":
                return ("chosen", "rejected")
            case "ranking" | "ranking_with_margin" | "ranking_with_best" | "ranking_with_ties":
                count = len(completions(examples.records[number]))
                return tuple(f"completion {place}" for place in range(1, count + 1))
            case _:
                return ("",)

    parts = [
        (f"{source}, " if len(sources) > 1 else "", examples.of_source(i)) for i, source in enumerate(sources)
    ]
    in_turn = (
        (of_source, place, part[place])
        for place in range(max(len(part) for _, part in parts))
        for of_source, part in parts
        if place < len(part)
    )
    return [
        (
            f"{of_source}record {place + 1}{name and ', '}{name}",
            examples.rows[examples.rows_per_record * number + k],
        )
        for of_source, place, number in itertools.islice(in_turn, num_records)
        for k, name in enumerate(names(number))
    ]


def _padding(row: Row, examples: Examples) -> dict[str, int]:
    """Returns how much padding a row has, where it has one to itself and batches are of one length."""
    return {} if examples.packings or examples.shorter else {"padding": examples.length - len(row.ids)}


def _describe(tokens: Sequence[Token], row: Row, examples: Examples) -> str:
    """Returns the counts of a row's parts."""
    counts = dict(Counter[str](token.part for token in tokens)) | _padding(row, examples)
    shown = ", ".join(f"{count} of {name}" for name, count in counts.items())
    return f"{len(tokens)} tokens: {shown}" + ("; CUT" if row.was_cut else "")


def _painted(tokens: Sequence[Token], in_colour: bool) -> Text:
    """Returns the text of a row, its parts in colours, or what carries loss in brackets."""
    text = Text()
    for part, of_part in itertools.groupby(tokens, key=lambda token: token.part):
        if not in_colour and part == "completion":
            text.append(OPEN)
        for token in of_part:
            style = f"{STYLES[part]} {SPECIAL}" if token.is_special else STYLES[part]
            text.append(token.text, style=style if in_colour else "")
        if not in_colour and part == "completion":
            text.append(CLOSE)
    return text


if __name__ == "__main__":
    sys.exit(main())
