"""The pool that decodes images: an error fails the call, an unexpected exception is logged too."""

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


@pytest.mark.parametrize(
    ("raised", "reported"), [(InvalidImage("torn"), InvalidImage), (ValueError("x"), InternalError)]
)
def test_the_call_fails_with_the_error(raised: Exception, reported: type, caplog: pytest.LogCaptureFixture) -> None:
    workers, call = DecodePool(1, 1), OneCall()
    with caplog.at_level(logging.ERROR):
        workers.run(cast(Call, call), failing(raised))
        workers.close()
    assert call.failed.is_set()
    assert type(call.error) is reported
    assert bool(caplog.records) is (reported is InternalError)  # a client's mistake is not logged


def test_a_full_pool_refuses_and_finished_calls_are_skipped() -> None:
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
