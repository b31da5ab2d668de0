"""When a step counts as hung."""

import os
import threading
import time

import pytest

from rlhf_jax import watchdog

TIMEOUT = 0.3


@pytest.fixture
def ended(monkeypatch):
    """Returns the exit codes with which the watchdog would have ended the process."""
    codes = []

    def exit_(code):
        codes.append(code)
        raise SystemExit  # of the watchdog's thread alone

    monkeypatch.setattr(watchdog.os, "_exit", exit_)
    return codes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
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


def test_zero_never_ends_a_run(ended):
    with watchdog.watching(0):
        time.sleep(0.1)
    assert ended == []
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
