"""The pool that decodes images: an error fails the call, an unexpected exception is logged too."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rafaga.bundle import ImagePreparation
from rafaga.errors import Cancelled, InternalError, InvalidImage, QueueFull, RafagaError
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.services.decoding import DecodePool, decode
from rafaga.server.services.submission import RequestLimits
from rafaga.server.transport.call import Call
from tests.integration import messages


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


MODEL = cast(
    ServedModel,
    SimpleNamespace(
        bundle=SimpleNamespace(image=ImagePreparation(height=8, width=8, channels=3)),
        metrics=SimpleNamespace(preprocessed=lambda _: None),
    ),
)


def test_a_decode_ends_with_its_call() -> None:
    """As when its deadline passes or its caller hangs up, while the second image is read."""
    photo = messages.jpeg(messages.random_photo(0, 400, 400)[0])

    class Ending(OneCall):
        asked = 0

        @property
        def finished(self) -> bool:
            self.asked += 1
            return self.asked > last

        @finished.setter
        def finished(self, _: bool) -> None: ...

    limits, last = RequestLimits(10, 10**6, 10**6), 10**6
    decode(cast(Call, whole := Ending()), [photo, photo], MODEL, limits)
    last = 3 * whole.asked // 4
    with pytest.raises(Cancelled):
        decode(cast(Call, Ending()), [photo, photo], MODEL, limits)


def test_the_pixels_of_all_files_are_bounded() -> None:
    """Eight of the largest: each of the thousand files of a request may hold so much."""
    limits = RequestLimits(1000, 100, 100)
    call, file = cast(Call, OneCall()), messages.png(np.zeros((10, 10, 3), np.uint8))
    assert len(decode(call, [file] * 8, MODEL, limits).rows) == 8
    with pytest.raises(InvalidImage, match="at most 800 pixels in the files of a request: split it"):
        decode(call, [file] * 9, MODEL, limits)
