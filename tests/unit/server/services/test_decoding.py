"""The pool that decodes images: an error fails the call, an unexpected exception is logged too."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import grpc
import pytest

from rafaga.errors import InvalidImage, QueueFull
from rafaga.server.services.decoding import DecodePool
from tests.unit.server.transport.fake_call import FakeCall


def failing(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("raised", "code"),
    [(InvalidImage("torn"), grpc.StatusCode.INVALID_ARGUMENT), (ValueError("x"), grpc.StatusCode.INTERNAL)],
)
def test_the_call_fails_with_the_error(
    raised: Exception, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    workers, call = DecodePool(1, 1), FakeCall()
    with caplog.at_level(logging.ERROR):
        workers.run(call, failing(raised))
        workers.close()
    assert call.code is code
    assert bool(caplog.records) is (code is grpc.StatusCode.INTERNAL)  # a client's mistake is not logged


def test_a_full_pool_refuses_and_finished_calls_are_skipped() -> None:
    workers, gate, done = DecodePool(1, 1), threading.Event(), []
    workers.run(FakeCall(), lambda: done.append(gate.wait(10)))
    with pytest.raises(QueueFull):
        workers.run(FakeCall(), lambda: done.append(False))
    gate.set()
    workers.close()
    assert done == [True]
    workers, gone = DecodePool(1, 1), FakeCall()
    gone.cancel()
    workers.run(gone, lambda: done.append(False))
    workers.close()
    assert done == [True]
