"""What a run achieved: summary.json, and the table at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text

from rlhf_jax.files import replace_file, to_json
from rlhf_jax.metrics import format_number
from rlhf_jax.progress import clock

Result = Mapping[str, float | str | None]  # measure -> value, as in a stage's result.json

BEFORE, AFTER = "_before", "_after"


class Sample(NamedTuple):
    """One prompt, completed by the model a stage started from and by the one it made."""

    prompt: str
    before: str
    after: str
    score_before: float | None
    """Of the completion; None where nothing judged."""
    score_after: float | None


class Row(NamedTuple):
    """One line of the table; a measure without a pair has its value under `after`."""

    stage: str
    measure: str
    before: str
    after: str


def write_summary(run_dir: Path | str, results: Mapping[str, Result]) -> Path:
    """Returns RUN/summary.json, written atomically: one object per stage name."""
    path = Path(run_dir) / "summary.json"
    replace_file(path, to_json(dict(results), indent=2) + "\n")
    return path


def comparisons(run_dir: Path | str, count: int = 2) -> list[Sample]:
    """Returns prompts completed at the first and the last evaluation of the last stage that wrote samples."""
    files = sorted((Path(run_dir) / "samples").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return []
    own = sorted(path for path in files if _stage_of(path) == _stage_of(files[-1]))
    first, last = (_read_samples(path) for path in (own[0], own[-1]))
    return [
        Sample(_as_text(a["prompt"]), a["completion"], b["completion"], a.get("score"), b.get("score"))
        for a, b in zip(first[:count], last, strict=False)
    ]


def _as_text(prompt: str | list[dict]) -> str:
    """Returns a prompt as text, of a conversation the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _stage_of(samples: Path) -> str:
    """Returns the stage of samples/STAGE-STEP.jsonl."""
    return samples.stem.rpartition("-")[0]


def _read_samples(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:  # not splitlines: texts hold line separators of other kinds
        return [json.loads(line) for line in file]


def table_rows(results: Mapping[str, Result]) -> list[Row]:
    """Returns the table's rows: what a stage measured, in its order; `x_before` and `x_after` share a row."""
    return [row for stage, result in results.items() for row in _stage_rows(stage, result)]


def _stage_rows(stage: str, result: Result) -> list[Row]:
    rows = []
    for name, value in result.items():
        if isinstance(value, Mapping | list | tuple):
            continue  # details for those who read summary.json
        base = name.removesuffix(AFTER)
        if name.endswith(AFTER) and base + BEFORE in result:
            continue  # is in the row of its pair
        base = name.removesuffix(BEFORE)
        if name.endswith(BEFORE) and base + AFTER in result:
            rows.append(Row(stage, _words(base), _show(base, value), _show(base, result[base + AFTER])))
        else:
            rows.append(Row(stage, _words(name), "", _show(name, value)))
    return rows


def render_table(
    results: Mapping[str, Result],
    run_dir: Path | str,
    samples: Sequence[Sample] = (),
    terminal: bool = False,
    width: int = 100,
) -> str:
    """Returns the end of a run as text: the table, a few completions before and after, the run directory.

    Args:
        results: one object of measures per stage.
        run_dir: named in the last line.
        samples: completions to show under the table.
        terminal: with lines and colours; without, plain text.
        width: columns of the terminal.
    """
    console = rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False
    )
    console.print(_table(results, terminal))
    for sample in samples:
        console.print(_sample_text(sample, width), soft_wrap=True)
    console.print(f"run directory: {run_dir}", soft_wrap=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _table(results: Mapping[str, Result], terminal: bool) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD if terminal else None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("measure", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    previous = ""
    for row in table_rows(results):
        cells = (row.stage if row.stage != previous else "", *row[1:])
        table.add_row(*(rich.text.Text(cell) for cell in cells))
        previous = row.stage
    return table


def _sample_text(sample: Sample, width: int) -> rich.text.Text:
    text = rich.text.Text("\nprompt  ", style="dim")
    text.append(_one_line(sample.prompt, width - 8), style="not dim")
    for label, completion, score in (
        ("before", sample.before, sample.score_before),
        ("after", sample.after, sample.score_after),
    ):
        head = f"{label:6}  " + ("" if score is None else f"({format_number(score)}) ")
        text.append("\n" + head).append(_one_line(completion, width - len(head)), style="not dim")
    return text.append("\n")


def _one_line(text: str, width: int) -> str:
    """Returns the text's beginning, with line breaks and control characters as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", " ")


def _show(name: str, value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | int) and name == "seconds" and value >= 60:
        return clock(round(value))
    return format_number(value)
