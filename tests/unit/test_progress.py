"""Progress: the items are left alone, and nothing is shown of what is over soon."""

import io

import pytest

from rlhf_jax import progress
from rlhf_jax.progress import clock, watched


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, file, seconds_per_item, items=range(4), **options):
    """Goes through the items with a clock that only the loop's own work moves on; returns what came out."""
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    taken = []
    for item in watched(items, "reading a.jsonl", file=file, **options):
        taken.append(item)
        now += seconds_per_item
    return taken


@pytest.mark.parametrize("make_file", [io.StringIO, Terminal])
def test_nothing_is_shown_within_two_seconds(make_file, monkeypatch):
    file = make_file()
    assert run(monkeypatch, file, 0.49) == [0, 1, 2, 3]
    assert file.getvalue() == ""


def test_lines_without_a_terminal(monkeypatch):
    file = io.StringIO()
    assert run(monkeypatch, file, 1.0, items=range(1000, 1030)) == list(range(1000, 1030))
    assert file.getvalue().splitlines() == [
        "[reading a.jsonl] 2 of 30, 0:28 left",
        "[reading a.jsonl] 22 of 30, 0:08 left",
        "[reading a.jsonl] 30 of 30 in 0:30",
    ]


def test_last_item_is_told_once(monkeypatch):
    file = io.StringIO()
    run(monkeypatch, file, 20.0, items=range(2))
    assert file.getvalue().splitlines() == [
        "[reading a.jsonl] 1 of 2, 0:20 left",
        "[reading a.jsonl] 2 of 2 in 0:40",
    ]


def test_items_without_a_length_are_counted_and_a_given_total_is_used(monkeypatch):
    file = io.StringIO()
    run(monkeypatch, file, 1.0, items=iter("abc"))
    assert file.getvalue().splitlines() == ["[reading a.jsonl] 2 in 0:02", "[reading a.jsonl] 3 of 3 in 0:03"]
    file = io.StringIO()
    run(monkeypatch, file, 1.0, items=iter("abc"), total=2000)
    assert file.getvalue().splitlines()[0] == "[reading a.jsonl] 2 of 2,000, 33:18 left"


def test_batches_count_for_what_is_in_them(monkeypatch):
    file = io.StringIO()
    run(monkeypatch, file, 2.0, items=["abc", "d"], total=4, size=len)
    assert file.getvalue().splitlines() == [
        "[reading a.jsonl] 3 of 4, 0:01 left",
        "[reading a.jsonl] 4 of 4 in 0:04",
    ]


def test_bar_on_a_terminal_ends_full(monkeypatch):
    file = Terminal()
    assert run(monkeypatch, file, 1.0, items="abcd") == list("abcd")
    shown = file.getvalue()
    assert "reading a.jsonl" in shown
    assert "4/4" in shown[shown.rindex("reading") :]


def test_bar_is_taken_down_when_the_loop_is_left(monkeypatch):
    now = iter(range(0, 100, 3))
    monkeypatch.setattr(progress, "monotonic", lambda: next(now))
    file = Terminal()
    for item in watched("abcd", "reading", file=file):
        if item == "c":
            break
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_no_items(monkeypatch):
    assert run(monkeypatch, io.StringIO(), 1.0, items=[]) == []


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (151, "2:31"), (3751, "1:02:31")])
def test_clock(seconds, text):
    assert clock(seconds) == text
