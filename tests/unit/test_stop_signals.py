"""When a signal ends a run, and where several processes stop; in the training loop, see test_trainer.py."""

import os
import signal
import time

import pytest

from rlhf_jax import stop_signals
from rlhf_jax.failures import Lifeline
from rlhf_jax.stop_signals import Agreement, Stopped, StopSignals
from tests.unit.test_failures import Store


def send(*signums):
    for signum in signums:
        os.kill(os.getpid(), signum)


@pytest.fixture
def ended(monkeypatch):
    """Returns the signals for which a thread would have ended the process."""
    found = []
    monkeypatch.setattr(stop_signals, "PATIENCE", 0.1)
    monkeypatch.setattr(stop_signals, "_end", found.append)
    return found


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_once_but_where_it_is_deferred(ended, signum):
    handlers = [signal.getsignal(number) for number in stop_signals.SIGNALS]
    with pytest.raises(Stopped) as stopped, StopSignals():
        send(signum)
        pytest.fail("it went on")
    assert (stopped.value.signum, stopped.value.by_all) == (signum, True)
    reached = []
    with pytest.raises(Stopped) as stopped, StopSignals() as signals, signals.deferred():
        send(signum)
        reached.append("behind the signal")
        signals.check()
        reached.append("behind the check")
    assert reached == ["behind the signal"]
    with pytest.raises(Stopped) as stopped, StopSignals() as signals:
        with signals.deferred():
            send(signum)
        pytest.fail("nothing has asked for it, so the end of the block does")
    assert stopped.value.signum == signum
    time.sleep(0.3)
    assert ended == []
    assert [signal.getsignal(number) for number in stop_signals.SIGNALS] == handlers


def test_a_thread_ends_what_does_not_come_back_to_python(ended):
    """Imitated by swallowing what the handlers raise."""
    with StopSignals() as signals:
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        time.sleep(0.3)
        assert ended == [signal.SIGTERM]
    ended.clear()
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt) as stopped, signals.deferred():
            send(signal.SIGINT)
            time.sleep(0.3)
            assert ended == []
            send(signal.SIGINT)
        assert not isinstance(stopped.value, Stopped)
        time.sleep(0.3)
    assert ended == [signal.SIGINT]


def in_step(agreements, rounds):
    """Lets every process look and check so often; returns {rank: (its check, what it was told)}."""
    found = {}
    for number in range(1, rounds + 1):
        for agreement in agreements:
            agreement.look()
        for rank, agreement in enumerate(agreements):
            if rank not in found and (signum := agreement.check()) is not None:
                found[rank] = number, signum
    return found


def test_processes_agree_on_the_check_after_the_one_that_is_furthest():
    store = Store()
    ahead, behind = (Agreement(store, rank, 2) for rank in (0, 1))
    for _ in range(5):
        ahead.look()
        behind.look()
        assert ahead.check() is None
    assert [behind.check() for _ in range(3)] == [None] * 3
    assert not store
    behind.wanted = signal.SIGTERM
    for agreement in (behind, ahead, behind):
        agreement.look()
    assert [behind.check() for _ in range(3)] == [None, None, signal.SIGTERM]
    assert ahead.check() == signal.SIGTERM


def test_two_signals_to_two_processes_are_one():
    store = Store()
    pair = [Agreement(store, rank, 2) for rank in (0, 1)]
    pair[0].wanted, pair[1].wanted = signal.SIGTERM, signal.SIGINT
    for agreement in (*pair, *pair):
        agreement.look()
    assert in_step(pair, 3) == {0: (1, signal.SIGTERM), 1: (1, signal.SIGTERM)}


def test_a_process_waits_at_its_check_until_all_have_told(monkeypatch):
    """Else it might pass the one that they agree on."""
    monkeypatch.setattr(stop_signals, "PERIOD", 0.01)
    store = Store()
    first, second = (Agreement(store, rank, 2) for rank in (0, 1))
    first.wanted = signal.SIGTERM
    first.look()
    waited = []

    def wait(seconds):
        waited.append(seconds)
        second.look()
        first.look()

    monkeypatch.setattr(first._changed, "wait", wait)
    assert first.check() == signal.SIGTERM and waited == [0.01]


def test_one_of_several_tells_the_others_where_they_have_not_agreed(monkeypatch, ended):
    lifeline = Lifeline(Store(), 0, 2, heartbeat_timeout=10)
    monkeypatch.setattr(stop_signals.distributed, "lifeline", lambda: lifeline)
    with pytest.raises(Stopped) as stopped, StopSignals():
        send(signal.SIGTERM)
    assert not stopped.value.by_all
    with pytest.raises(Stopped) as stopped, StopSignals() as signals:
        agreement = lifeline.errand.__self__
        with signals.deferred():
            send(signal.SIGTERM)
            lifeline.errand()
            Agreement(lifeline.store, 1, 2).look()
            lifeline.errand()
            assert agreement._stop == (1, signal.SIGTERM)
            signals.check()
    assert stopped.value.by_all
