"""When a step counts as hung."""

import os
import sys
import threading
import time

import pytest

from rlhf_jax import watchdog
from tests.unit import test_failures

TIMEOUT = 0.3
# Of the watchdog's thread, which a test ends so in place of the process.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def ended(monkeypatch):
    """Returns the exit codes with which the watchdog would have ended the process."""
    codes = []

    def exit_(code):
        codes.append(code)
        raise SystemExit  # of the watchdog's thread alone

    monkeypatch.setattr(watchdog.os, "_exit", exit_)
    return codes


def test_a_hung_step_ends_with_the_stacks_of_all_threads(ended, capfd):
    release = threading.Event()

    def another():
        release.wait()

    thread = threading.Thread(target=another)
    thread.start()
    with watchdog.watching(TIMEOUT):
        time.sleep(4 * TIMEOUT)
    release.set()
    thread.join()
    said = capfd.readouterr().err
    assert ended == [87]
    assert "no step made progress in 0.3 s (distributed.step_timeout)" in said
    assert "in test_a_hung_step_ends_with_the_stacks_of_all_threads" in said and "in another" in said


def test_progress_is_no_hang(ended):
    with watchdog.watching(TIMEOUT):
        for _ in range(8):
            time.sleep(TIMEOUT / 2)
            watchdog.beat()
    assert ended == []


def test_saving_may_take_long_and_the_clock_starts_anew_after_it(ended):
    with watchdog.watching(TIMEOUT):
        with watchdog.paused():
            time.sleep(3 * TIMEOUT)
        time.sleep(TIMEOUT / 2)
    assert ended == []


@pytest.mark.parametrize("file", watchdog.COMPILERS)
def test_compiling_may_take_long(ended, file):
    """Imitated by code that says it is of that file of JAX."""
    assert os.path.exists(file)
    with watchdog.watching(TIMEOUT):
        exec(compile(f"sleep({3 * TIMEOUT})", file, "exec"), {"sleep": time.sleep})
        time.sleep(TIMEOUT / 2)
    assert ended == []


def test_waiting_for_the_others_counts_while_it_saves(ended, capfd):
    with watchdog.watching(TIMEOUT), watchdog.paused():
        time.sleep(2 * TIMEOUT)
        assert ended == []
        with watchdog.waiting():
            time.sleep(TIMEOUT / 2)
        assert watchdog.idle() < TIMEOUT / 2
        with watchdog.waiting():
            time.sleep(2 * TIMEOUT)
    assert ended == [87]


@pytest.mark.parametrize("other, hangs", [(50.0, True), (0.0, False)], ids=["idle", "saves"])
def test_a_process_outside_is_expected_and_counts_unless_it_saves_or_compiles(
    ended, other, hangs, monkeypatch
):
    """Process 0 is in a step and waits, process 1 is not; what 1 says of itself is all that 0 knows."""
    first, second = test_failures.pair(test_failures.Store())
    monkeypatch.setattr(first, "fail", lambda text, code: ended.append(code) or sys.exit())
    monkeypatch.setattr(watchdog.distributed, "lifeline", lambda: first)
    monkeypatch.setattr(watchdog, "COURTESY", 0.01)
    first.idle, second.idle = watchdog.idle, lambda: other
    second._give_sign()
    with watchdog.watching(TIMEOUT):
        time.sleep(4 * TIMEOUT)
    assert ended == ([87] if hangs else [])


def test_a_process_says_how_long_it_made_no_progress_outside_of_the_steps_too():
    watchdog.beat()
    time.sleep(0.1)
    assert watchdog.idle() >= 0.1
    with watchdog.paused():
        assert watchdog.idle() < 0.1
        time.sleep(0.1)
    assert watchdog.idle() < 0.1


def test_a_hung_run_ends_where_nobody_reads_what_it_says(ended, monkeypatch):
    monkeypatch.setattr(sys, "stderr", test_failures.closed())
    with watchdog.watching(TIMEOUT):
        time.sleep(3 * TIMEOUT)
    assert ended == [87]


def test_zero_never_ends_a_run(ended):
    with watchdog.watching(0):
        time.sleep(0.1)
    assert ended == []
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
