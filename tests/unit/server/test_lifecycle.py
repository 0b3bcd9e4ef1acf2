"""Signals: the first asks for a drain, the second ends it, and afterwards the old handlers are back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from rafaga.server import lifecycle
from rafaga.server.lifecycle import ShutdownSignals

WAIT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def survives() -> Iterator[None]:
    """A signal that comes late ends no test run."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_and_second(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with ShutdownSignals() as signals:
        assert not signals.first.done()
        os.kill(os.getpid(), number)
        signals.first.result(WAIT_S)
        assert not signals.second.is_set()
        os.kill(os.getpid(), number)
        assert signals.second.wait(WAIT_S)
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_between_two_instructions_blocks_no_thread() -> None:
    """Handlers interrupt the main thread anywhere, also where it holds the lock of one of the events."""
    with ShutdownSignals() as signals:
        for _ in range(300):
            os.kill(os.getpid(), signal.SIGTERM)
            signals.second.wait(0.00001)
        assert signals.second.wait(WAIT_S)


class FakeServer:
    """`load` lasts until it is let go."""

    def __init__(self) -> None:
        self.loading, self.let_go = threading.Event(), threading.Event()
        self.is_open = False
        self.drains = 0

    def open(self) -> None:
        self.is_open = True

    def load(self) -> None:
        assert self.is_open
        self.loading.set()
        self.let_go.wait(WAIT_S)

    def drain_and_stop(self, hurry: threading.Event) -> bool:
        self.drains += 1
        return not hurry.is_set()


def kill_after(event: threading.Event) -> None:
    def kill() -> None:
        event.wait(WAIT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill).start()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_signal_drains(loaded: bool) -> None:
    """It does not wait for models that load. Those that were loaded already may have accepted calls."""
    server: Any = FakeServer()
    if loaded:
        server.let_go.set()
    kill_after(server.loading)
    assert lifecycle.run(server) == 0
    assert server.drains == 1
    server.let_go.set()


@pytest.mark.parametrize("step", ["open", "load"])
def test_what_the_start_raises_is_raised(step: str) -> None:
    server: Any = FakeServer()
    setattr(server, step, Mock(side_effect=OSError("127.0.0.1:80: address already in use")))
    with pytest.raises(OSError, match="in use"):
        lifecycle.run(server)
