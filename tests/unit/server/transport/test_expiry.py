"""Calls end when the time runs out that their requests allow, and are forgotten when they end before."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from collections.abc import Iterator
from unittest.mock import Mock

import grpc
import pytest

from rafaga.errors import Status
from rafaga.server.transport import expiry as expiries
from rafaga.server.transport.expiry import Expiry
from rafaga.server.transport.router import Call
from tests.unit.server.transport.fake_call import WAIT_S, FakeCall


@pytest.fixture
def expiry() -> Iterator[Expiry]:
    expiry = Expiry()
    yield expiry
    expiry.close()
    if expiry._thread is not None:
        expiry._thread.join(WAIT_S)
        assert not expiry._thread.is_alive()


class Awaited(FakeCall):
    """Records when its work was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = threading.Event()
        self.on_cancel(self.dropped.set)


def test_calls_expire_in_the_order_of_their_deadlines(expiry: Expiry) -> None:
    order: list[Awaited] = []

    class Ordered(Awaited):
        def _send_failure(self, status: Status) -> None:
            super()._send_failure(status)
            order.append(self)

    calls = [Ordered() for _ in range(3)]
    now = time.monotonic()
    for call, left_s in zip(calls, (0.3, 0.1, 0.2), strict=True):
        expiry.watch(call, now + left_s)
    assert all(call.dropped.wait(WAIT_S) for call in calls)
    assert order == [calls[1], calls[2], calls[0]]
    assert {call.code for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert len(expiry) == 0


def test_where_the_system_gives_no_thread_the_next_call_tries_again(
    expiry: Expiry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(threading, "Thread", Mock(side_effect=RuntimeError))
        with pytest.raises(RuntimeError):
            expiry.watch(Awaited(), time.monotonic())
    call = Awaited()
    expiry.watch(call, time.monotonic())
    assert call.dropped.wait(WAIT_S)


def test_others_are_left_alone(expiry: Expiry) -> None:
    """Calls that were answered in time, or have centuries."""
    answered, patient, late = Awaited(), Awaited(), Awaited()
    now = time.monotonic()
    expiry.watch(answered, now + 0.05)
    expiry.watch(patient, now + 9e12)
    expiry.watch(late, now + 0.06)
    answered.reply(b"in time")
    assert late.dropped.wait(WAIT_S)
    assert (answered.sent, patient.sent) == ([b"in time"], [])
    assert not answered.dropped.is_set()


def test_a_call_that_cannot_be_failed_does_not_end_the_thread(expiry: Expiry) -> None:
    class Broken(Awaited):
        def _send_failure(self, status: object) -> None:
            raise ConnectionError

    broken, late = Broken(), Awaited()
    expiry.watch(broken, time.monotonic())
    assert broken.dropped.wait(WAIT_S)
    expiry.watch(late, time.monotonic())
    assert late.dropped.wait(WAIT_S)


def test_calls_that_ended_are_not_kept(expiry: Expiry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the calls, with their requests, nor for long what was noted of them."""
    monkeypatch.setattr(expiries, "_MIN_TIDY", 16)
    expiry._tidy_at = 16
    waiting = FakeCall()
    expiry.watch(waiting, math.inf)
    first: weakref.ref[Call] | None = None
    for _ in range(1000):
        call = FakeCall()
        first = first or weakref.ref(call)
        expiry.watch(call, time.monotonic() + 1e6)
        call.reply(b"")
        assert len(expiry) <= 17
    del call
    gc.collect()
    assert first is not None
    assert first() is None
    assert waiting.sent == []
