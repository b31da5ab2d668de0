"""Stopping where a run has several processes; with one, see test_trainer.py."""

import signal

import pytest

from rlhf_jax import distributed
from rlhf_jax.stop_signals import Stopped, StopSignals


def test_processes_stop_at_the_check_that_they_agreed_on_and_jax_keeps_its_handler(monkeypatch):
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    monkeypatch.setattr(distributed, "stop_is_due", lambda count: count == 3)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as signals:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        signals.check()
        signals.check()
        with pytest.raises(Stopped) as stopped:
            signals.check()
    assert stopped.value.signum == signal.SIGTERM
