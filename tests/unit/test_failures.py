"""What a process says when it fails, and how it hears that another one has."""

import io
import os
import sys
import threading
import time

import pytest
from jax.errors import JaxRuntimeError

from rlhf_jax import failures
from rlhf_jax.failures import Lifeline, is_of_runtime


class Exit(BaseException):
    """Stands in for the end of the process."""


class Store(dict):
    """A key-value store as that of JAX's coordination service; processes of a test share it."""

    is_gone = False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.is_gone or (key in self and not allow_overwrite):
            raise JaxRuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_dir_get(self, key):
        if self.is_gone:
            raise JaxRuntimeError("UNAVAILABLE")
        return [(name, self[name]) for name in sorted(self) if name.startswith(key)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    def exit_(code):
        raise Exit(code)

    monkeypatch.setattr(failures.os, "_exit", exit_)
    monkeypatch.setattr(failures, "PERIOD", 0.02)
    monkeypatch.setattr(failures, "SILENCE", 0.2)
    monkeypatch.setattr(failures, "GRACE", 0.6)
    monkeypatch.setattr(failures, "LINGER", 0.1)


def pair(store):
    return [Lifeline(store, rank, 2, heartbeat_timeout=0.3) for rank in (0, 1)]


def end(function, *args, **kwargs):
    """Returns the code that the process ended with."""
    with pytest.raises(Exit) as ended:
        function(*args, **kwargs)
    return ended.value.args[0]


def test_the_others_tell_of_the_first_failure_and_end_with_its_code(capsys):
    first, second = pair(Store())
    assert end(second.fail, "Traceback ...\nKeyError: 3\n", 7) == 7
    assert capsys.readouterr().err == "Traceback ...\nKeyError: 3\n"
    assert end(first._watch) == 7
    said = capsys.readouterr().err
    assert said == f"rlhf_jax: process 1 ({second.host}) failed:\nTraceback ...\nKeyError: 3\n"


def test_a_failure_after_another_one_is_told_before_it(capsys):
    first, second = pair(Store())
    end(first.fail, "the first", 2)
    capsys.readouterr()
    assert end(second.fail, "the second", 1) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["the second", f"rlhf_jax: process 0 ({first.host}) failed:", "the first"]


def test_what_all_processes_say_each_says_once(capsys):
    first, second = pair(Store())
    assert end(first.fail, "the same", 2) == end(second.fail, "the same", 2) == 2
    assert capsys.readouterr().err == "the same\nthe same\n"


def test_a_consequence_waits_for_its_cause(capsys, monkeypatch):
    (first, second), sleep = pair(Store()), time.sleep

    def second_fails(seconds):
        monkeypatch.setattr(failures.time, "sleep", sleep)
        end(second.fail, "the cause", 3)

    monkeypatch.setattr(failures.time, "sleep", second_fails)
    assert end(first.fail, "Connection closed by peer", 1, may_follow=True) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "the cause"


@pytest.mark.parametrize("was_seen", [True, False])
def test_a_process_that_was_killed_is_named(capsys, was_seen):
    first, second = pair(Store())
    second._give_sign()
    if was_seen:
        first._newest_signs()
    assert end(first.fail, "Connection closed by peer", 1, may_follow=True) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Connection closed by peer"
    assert said[-1].startswith(
        f"rlhf_jax: process 1 ({second.host}) has given no sign of life for 0 s: it was"
    )


def test_a_failure_without_a_cause_elsewhere_is_this_process_s_own(capsys):
    store = Store()
    first, _ = pair(store)
    assert end(first.fail, "RESOURCE_EXHAUSTED", 1, may_follow=True) == 1
    assert capsys.readouterr().err == "RESOURCE_EXHAUSTED\n"
    assert first._note() == failures.Note(0, first.host, "failed:\nRESOURCE_EXHAUSTED", 1)


def test_silence_ends_a_process_that_only_waits(capsys):
    first, second = pair(Store())
    second._give_sign()
    begun = time.monotonic()
    assert end(first._watch) == 1
    assert 0.3 < time.monotonic() - begun < 5
    assert "process 1" in capsys.readouterr().err


def test_process_0_is_missed_where_its_store_is_gone(capsys):
    store = Store()
    first, second = pair(store)
    first._give_sign()
    second._newest_signs()
    store.is_gone = True
    assert end(second._watch) == 1
    assert f"rlhf_jax: process 0 ({first.host}) cannot be reached: it was killed" in capsys.readouterr().err


def test_a_run_hangs_only_when_no_process_makes_progress():
    first, second = pair(Store())
    first.idle, second.idle = (lambda: 50.0), (lambda: 3.0)
    second._give_sign()
    assert first.idle_of_all() == 3
    second.idle = lambda: 60.0
    second._give_sign()
    assert first.idle_of_all() == 50


def test_a_hung_run_shows_the_stacks_of_all(capsys):
    first, second = pair(Store())
    end(second.fail, "stacks of process 1", failures.HUNG)
    assert end(first._watch) == failures.HUNG
    said = capsys.readouterr().err
    assert "test_a_hung_run_shows_the_stacks_of_all" in said
    assert said.endswith("failed:\nstacks of process 1\n")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.fixture
def full_pipe():
    """Returns stderr as a pipe that nobody reads, without room for another byte."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write, bytes(1000))
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write, b"0")
    os.set_blocking(write, True)
    yield open(write, "w")  # noqa: SIM115
    os.set_blocking(write, False)
    os.close(read)  # the thread that writes gets an error


@pytest.mark.parametrize("is_full", [False, True], ids=["closed", "full"])
def test_a_process_ends_and_tells_the_others_where_its_stderr_takes_nothing(is_full, request, monkeypatch):
    stream = request.getfixturevalue("full_pipe") if is_full else closed()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(failures.tell, "__defaults__", (0.2,))
    store = Store()
    first, second = pair(store)
    assert end(second.fail, "the cause", 3) == 3
    assert first._note().text == "failed:\nthe cause"
    assert end(first._watch) == 3


def test_a_process_ends_where_its_last_words_fail_in_an_unforeseen_way(monkeypatch):
    first, _ = pair(Store())
    monkeypatch.setattr(first, "_left", lambda note: {}["unforeseen"])
    assert end(first.fail, "the cause", 3) == 3


def test_stacks_are_asked_for_where_no_file_can_be_written(monkeypatch):
    def refuse(mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failures.tempfile, "TemporaryFile", refuse)
    assert "No space left on device" in failures.stacks()


@pytest.mark.parametrize("name", failures.WATCHERS)
def test_an_error_in_a_thread_that_watches_ends_the_run(name, capsys, monkeypatch):
    """pytest has a hook of its own, so the thread is imitated."""
    lifeline, codes = pair(Store())[0], []
    monkeypatch.setattr(failures.os, "_exit", codes.append)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    lifeline.start()
    lifeline.stop()
    thread = threading.Thread(name=name)
    error = KeyError("unforeseen")
    threading.excepthook(threading.ExceptHookArgs((KeyError, error, None, thread)))
    assert codes[:1] == [1]
    said = capsys.readouterr().err
    assert "KeyError: 'unforeseen'" in said and f"the thread {name!r} failed, so the run is ended" in said
    assert "unforeseen" in lifeline._note().text


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, expected",
    [
        (JaxRuntimeError("anything"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (chained(ValueError("it failed"), JaxRuntimeError("INTERNAL: x")), True),
        (ValueError("data.train: unknown"), False),
        (RuntimeError("UNKNOWN"), False),
    ],
)
def test_errors_that_a_lost_process_may_have_caused(error, expected):
    assert is_of_runtime(error) is expected
