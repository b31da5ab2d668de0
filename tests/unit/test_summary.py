"""The end of a run: summary.json and the table."""

import json

from rlhf_jax.metrics import write_samples
from rlhf_jax.summary import Row, Sample, comparisons, render_table, table_rows, write_summary

RESULTS = {
    "sft": {"eval_perplexity_before": 498.7, "eval_perplexity_after": 6.432, "seconds": 12.3},
    "reward": {"eval_accuracy": 0.871, "accuracy_ceiling": 0.93, "note": None, "seconds": 9.0},
    "ppo": {"gold_before": -0.52, "gold_after": 1.75, "kl": 8.25, "curve": [1, 2], "seconds": 151.0},
}
ROWS = [
    Row("sft", "eval perplexity", "499", "6.43"),
    Row("sft", "seconds", "", "12.3"),
    Row("reward", "eval accuracy", "", "0.871"),
    Row("reward", "accuracy ceiling", "", "0.93"),
    Row("reward", "note", "", "-"),
    Row("reward", "seconds", "", "9"),
    Row("ppo", "gold", "-0.52", "1.75"),
    Row("ppo", "kl", "", "8.25"),
    Row("ppo", "seconds", "", "2:31"),
]


def test_summary_has_one_object_per_stage(tmp_path):
    path = write_summary(tmp_path, RESULTS | {"ppo": {"kl": float("nan")}})
    assert path == tmp_path / "summary.json"
    assert json.loads(path.read_text()) == RESULTS | {"ppo": {"kl": None}}


def test_before_and_after_share_a_row():
    assert table_rows(RESULTS) == ROWS


def test_a_measure_with_half_a_pair_is_shown_as_it_is():
    assert table_rows({"ppo": {"score_after": 1.0, "score_before": 0.5, "kl_after": 2.0}}) == [
        Row("ppo", "score", "0.5", "1"),
        Row("ppo", "kl after", "", "2"),
    ]


def test_plain_table_has_every_row_and_ends_with_the_run_directory(tmp_path):
    text = render_table(RESULTS, tmp_path / "run")
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "measure", "before", "after"]
    assert [line.split()[-1] for line in lines[1:10]] == [row.after for row in ROWS]
    assert [line.split()[0] for line in lines[1:10] if not line.startswith(" ")] == ["sft", "reward", "ppo"]
    assert lines[-1] == f"run directory: {tmp_path / 'run'}"


def test_a_terminal_gets_styles():
    assert "\x1b" in render_table(RESULTS, "run", terminal=True)


def test_samples_are_shown_as_text_whatever_is_in_them():
    sample = Sample("Say [bold]hi[/bold] :smile:\n", "no\x1b[2J" + "x" * 200, "yes", -1.25, 2.0)
    lines = render_table({}, "run", samples=[sample], width=60).splitlines()
    assert "prompt  Say [bold]hi[/bold] :smile:\\n" in lines
    (before,) = (line for line in lines if line.startswith("before"))
    assert before.startswith("before  (-1.25) no\\x1b[2Jxxx") and before.endswith("...") and len(before) == 60
    assert "after   (2) yes" in lines


def test_samples_before_and_after_are_of_one_stage_whatever_is_in_them(tmp_path):
    """Names of stages may begin alike, and texts hold what other programs take for a line's end."""

    def write(stage, step, completion):
        row = {"prompt": "a\u2028b", "completion": completion, "score": float(step)}
        return write_samples(tmp_path, stage, step, [row])

    write("ppo", 0, "before\x85")
    write("ppo-warm", 0, "no")
    write("ppo-warm", 9, "no")
    write("ppo", 20, "after\u2029")
    assert comparisons(tmp_path) == [Sample("a\u2028b", "before\x85", "after\u2029", 0.0, 20.0)]
    assert comparisons(tmp_path / "none") == []
