"""Work beside the threads that calls arrive on: its errors become the call's, and defects reach the log."""

from __future__ import annotations

import logging
import threading
from typing import Any, cast

import pytest

from rafaga.errors import InternalError, InvalidImage, QueueFull, RafagaError
from rafaga.server.services.decoding import DecodePool
from rafaga.server.transport.call import Call


class OneCall:
    """The part of a Call that a DecodePool uses."""

    method = "/rafaga.v1.Vision/Classify"

    def __init__(self) -> None:
        self.finished = False
        self.error: RafagaError | None = None
        self.failed = threading.Event()

    def fail(self, error: RafagaError) -> None:
        self.error = error
        self.failed.set()


def failing(error: Exception) -> Any:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(("raised", "told"), [(InvalidImage("torn"), InvalidImage), (ValueError("x"), InternalError)])
def test_an_error_becomes_the_calls(raised: Exception, told: type, caplog: pytest.LogCaptureFixture) -> None:
    workers, call = DecodePool(1, 1), OneCall()
    with caplog.at_level(logging.ERROR):
        workers.run(cast(Call, call), failing(raised))
        workers.close()
    assert call.failed.is_set()
    assert type(call.error) is told
    assert bool(caplog.records) is (told is InternalError)  # a caller's mistake is not the log's business


def test_too_much_is_refused_and_a_finished_call_costs_nothing() -> None:
    workers, gate, done = DecodePool(1, 1), threading.Event(), []
    workers.run(cast(Call, OneCall()), lambda: done.append(gate.wait(10)))
    with pytest.raises(QueueFull):
        workers.run(cast(Call, OneCall()), lambda: done.append(False))
    gate.set()
    workers.close()
    assert done == [True]
    workers, gone = DecodePool(1, 1), OneCall()
    gone.finished = True
    workers.run(cast(Call, gone), lambda: done.append(False))
    workers.close()
    assert done == [True]
