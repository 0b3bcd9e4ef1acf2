"""Signals: the first asks for a drain, the second for hurry, and the old handlers come back."""

from __future__ import annotations

import os
import signal

import pytest

from rafaga.server.lifecycle import ShutdownSignals

WAIT_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_and_second(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with ShutdownSignals() as signals:
        os.kill(os.getpid(), number)
        signals.wait()
        assert not signals.second.is_set()
        os.kill(os.getpid(), number)
        assert signals.second.wait(WAIT_S)
    assert signal.getsignal(number) is before


def test_signals_while_the_events_are_in_use() -> None:
    """A handler runs between two instructions of the thread that looks at the Events: it must not wait for their
    locks."""
    with ShutdownSignals() as signals:
        for _ in range(300):
            os.kill(os.getpid(), signal.SIGTERM)
            signals.second.wait(0.00001)
        assert signals.second.wait(WAIT_S)


def test_without_signals_nothing_is_told() -> None:
    with ShutdownSignals() as signals:
        assert not signals.second.wait(0.01)
