"""A failure of one process ends all of them, and is the last thing in every log.

JAX alone does not do this: where one process raises, the others wait in a collective operation for minutes,
and where one hangs, for ever. Here a thread of each process gives a sign of life about once a second and
looks for the note that a failing process leaves, both in the key-value store of JAX's coordination service,
which process 0 holds. Whoever finds the note prints it and ends with the same exit code.
"""

from __future__ import annotations

import atexit
import dataclasses
import faulthandler
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from jax.errors import JaxRuntimeError

HUNG = 87
"""Exit code of a run that made no progress."""
PERIOD = 1.0
SILENCE = 5.0
"""Seconds without a sign of life after which a process is suspected where something has failed already."""
GRACE = 8.0
"""Seconds in which a failure that may be the consequence of another one waits for that one's note."""
LINGER = 10.0
"""Seconds that process 0, and one that fails, stays for the others to read the note."""
MOST_CHARACTERS = 100_000
WATCHERS = ("lifeline", "watchdog", "signals")
"""Threads without which a process would not hear of the others' failures, or of signals."""
KILLED = "it was killed, or its host or network is gone"

_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")

NOTE, SIGNS, STATES = "rlhf_jax/failure/", "rlhf_jax/signs/", "rlhf_jax/states/"


def is_of_runtime(error: BaseException | None) -> bool:
    """Returns whether an error, or one it came from, is of JAX's runtime: that of a peer that is gone, maybe.

    JAX raises some of them as ValueError.
    """
    return error is not None and (
        isinstance(error, JaxRuntimeError)
        or _STATUS.match(str(error)) is not None
        or is_of_runtime(error.__cause__ or error.__context__)
    )


def stacks() -> str:
    """Returns where every thread of this process is."""
    try:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f"(cannot be written to a temporary file: {error})\n"


def tell(text: str, seconds: float = 5.0) -> None:
    """Writes to stderr, as far as that is possible within some seconds.

    It is not where a pipe is full that nobody reads any more, or closed; what ends a process goes on then.
    """

    def write() -> None:
        with suppress(OSError, ValueError):
            print(text.rstrip(), file=sys.stderr, flush=True)
            sys.stdout.flush()

    writer = threading.Thread(target=write, name="last words", daemon=True)
    writer.start()
    writer.join(seconds)


class Store(Protocol):
    """What is needed of JAX's DistributedRuntimeClient; JaxRuntimeError is raised where process 0 is gone."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Sets a value; raises where there is one already and it may not be overwritten."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns the keys that begin with `key`, and their values."""
        ...


@dataclasses.dataclass(frozen=True)
class Note:
    """What a process says of its failure."""

    rank: int
    host: str
    text: str
    code: int

    def told(self) -> str:
        """Returns what the other processes print."""
        return f"rlhf_jax: process {self.rank} ({self.host}) {self.text.rstrip()}"


@dataclasses.dataclass(frozen=True)
class Sign:
    """A sign of life of a process."""

    host: str
    number: int
    idle: float
    """Seconds since it last made progress, see watchdog.py; 0 where it need not make any."""


class Lifeline:
    """Ties the processes of a run together: each is told of the others' failures, and tells of its own."""

    def __init__(self, store: Store, rank: int, num_processes: int, heartbeat_timeout: float) -> None:
        """Makes the lifeline of a process; `start` begins to watch.

        Args:
            store: of JAX's coordination service.
            rank: of this process.
            num_processes: of the run.
            heartbeat_timeout: seconds without a sign of life after which a process counts as gone.
        """
        self.rank, self.num_processes = rank, num_processes
        self.host = socket.gethostname()
        self.idle: Callable[[], float] = lambda: 0.0
        """Seconds since the last progress."""
        self.errand: Callable[[], None] = lambda: None
        """Called about once a second, as long as this process lives."""
        self.store = store
        self._timeout = heartbeat_timeout
        self._seen: dict[int, tuple[Sign, float]] = {}  # rank -> its newest sign, and when it came
        self._number = 0
        self._is_over = threading.Event()
        self._ending = threading.Lock()  # taken by the thread that ends the process, for good
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def start(self) -> None:
        """Watches until `stop`; from now on an exception that nothing handles ends every process.

        Also one in the threads that watch: without them, the others would wait for ever, or be told a wrong
        reason.
        """
        sys.excepthook = self._unhandled
        threading.excepthook = self._unhandled_in_thread
        atexit.register(self.stop)  # before JAX's own hook, which was registered earlier, ends the service
        self._thread.start()

    def stop(self) -> None:
        """Watches no longer."""
        self._is_over.set()
        self._thread.join(2 * PERIOD)

    def idle_of_all(self) -> float:
        """Returns the seconds since any process made progress, as far as this one knows."""
        others = [sign.idle for rank, (sign, _) in self._newest_signs().items() if rank != self.rank]
        return min([self.idle(), *others])

    def fail(self, text: str, code: int, *, may_follow: bool = False, is_told: bool = False) -> NoReturn:
        """Prints the text, leaves it to the other processes, and ends this one, whatever happens meanwhile.

        Args:
            text: traceback or message.
            code: exit code of all processes.
            may_follow: the failure may be the consequence of another process's: that one is waited for, and
                told instead.
            is_told: the text has been printed already.
        """
        self._ending.acquire()
        first = own = Note(self.rank, self.host, f"failed:\n{text}", code)
        try:
            if not is_told:
                tell(text)
            first = self._left((may_follow and self._cause(GRACE)) or own)
        finally:
            self._end(first, is_told=first.text == own.text)

    def _watch(self) -> None:
        unreachable_since, next_look = None, 0.0
        while not self._is_over.wait(PERIOD):
            try:
                self._give_sign()
                self.errand()
                note = self._note()
                if note is None and time.monotonic() > next_look:  # each process reads the signs of all
                    note = self._of_silent(self._timeout)
                    next_look = time.monotonic() + self._timeout / 6
                unreachable_since = None
            except JaxRuntimeError:
                unreachable_since = unreachable_since or time.monotonic()
                if time.monotonic() - unreachable_since < SILENCE:
                    continue
                note = self._of_unreachable()
            if note is not None and not self._is_over.is_set() and self._ending.acquire(blocking=False):
                try:
                    note = self._left(note)
                    if note.code == HUNG:
                        tell(stacks())
                finally:
                    self._end(note)

    def _end(self, note: Note, *, is_told: bool = False) -> NoReturn:
        """Prints the note unless this process has said the same, and ends the process."""
        try:
            if not is_told:
                tell(note.told())
            with suppress(JaxRuntimeError):  # process 0 is gone: nobody is left to be told
                self._mark("read")
                if self.rank == 0:  # with it goes the store, and JAX aborts whoever is left
                    self._await("left")
                    time.sleep(PERIOD / 2)
                elif self.rank == note.rank:  # with it goes what the others wait for, which makes noise
                    self._await("read")
                self._mark("left")
        finally:
            os._exit(note.code)

    def _mark(self, state: str) -> None:
        self.store.key_value_set(f"{STATES}{self.rank}", state, allow_overwrite=True)

    def _await(self, state: str) -> None:
        """Returns when the other processes are in this state or beyond, or are gone, or it takes too long."""
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline:
            done = {
                _rank(key) for key, found in self.store.key_value_dir_get(STATES) if found in (state, "left")
            }
            if len(done | {self.rank} | self._silent(SILENCE).keys()) >= self.num_processes:
                return
            time.sleep(0.1)

    def _left(self, note: Note) -> Note:
        """Returns the note that the processes read: this one, or the one that was there before it."""
        cut = dataclasses.replace(note, text=note.text[-MOST_CHARACTERS:])
        try:
            self.store.key_value_set(f"{NOTE}note", json.dumps(dataclasses.asdict(cut)))
        except JaxRuntimeError:  # there is one already, or process 0 is gone
            with suppress(JaxRuntimeError):
                return self._note() or note
        return note

    def _note(self) -> Note | None:
        found = self.store.key_value_dir_get(NOTE)
        return Note(**json.loads(found[0][1])) if found else None

    def _cause(self, seconds: float) -> Note | None:
        """Returns the failure that this process's follows, as far as it can be found within some seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self._give_sign()
                if note := self._note() or self._of_silent(SILENCE):
                    return note
            except JaxRuntimeError:
                return self._of_unreachable()
            time.sleep(PERIOD / 2)
        return None

    def _give_sign(self) -> None:
        self._number += 1
        sign = Sign(self.host, self._number, self.idle())
        self.store.key_value_set(
            f"{SIGNS}{self.rank}", json.dumps(dataclasses.asdict(sign)), allow_overwrite=True
        )

    def _newest_signs(self) -> Mapping[int, tuple[Sign, float]]:
        """Returns each process's newest sign, and when this process saw it first."""
        now = time.monotonic()
        for key, value in self.store.key_value_dir_get(SIGNS):
            rank, sign = _rank(key), Sign(**json.loads(value))
            if rank not in self._seen or self._seen[rank][0].number != sign.number:
                self._seen[rank] = (sign, now)
        return self._seen

    def _silent(self, seconds: float) -> dict[int, tuple[Sign, float]]:
        """Returns the other processes that have given no sign for so long."""
        now = time.monotonic()
        return {
            rank: (sign, now - since)
            for rank, (sign, since) in self._newest_signs().items()
            if rank != self.rank and now - since > seconds
        }

    def _of_silent(self, seconds: float) -> Note | None:
        silent = self._silent(seconds)
        if not silent:
            return None
        rank, (sign, since) = min(silent.items())
        return Note(rank, sign.host, f"has given no sign of life for {since:.0f} s: {KILLED}", 1)

    def _of_unreachable(self) -> Note:
        host = self._seen[0][0].host if 0 in self._seen else "the coordinator"
        return Note(0, host, f"cannot be reached: {KILLED}", 1)

    def _unhandled(self, kind: type[BaseException], error: BaseException, tb: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, tb))
        self.fail(text, 1, may_follow=is_of_runtime(error))

    def _unhandled_in_thread(self, args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread is not None else ""
        if name not in WATCHERS or args.exc_value is None:
            threading.__excepthook__(args)
            return
        text = "".join(traceback.format_exception(args.exc_value))
        self.fail(f"{text}rlhf_jax: the thread {name!r} failed, so the run is ended", 1)


def _rank(key: str) -> int:
    return int(key.rpartition("/")[2])
