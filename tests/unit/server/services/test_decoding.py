"""The pool that decodes images: an error fails the call, an unexpected exception is logged too."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import grpc
import numpy as np
import pytest

from rafaga.bundle import ImagePreparation
from rafaga.errors import Cancelled, InvalidImage, QueueFull
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.services.decoding import DecodePool, decode
from rafaga.server.services.submission import RequestLimits
from tests.integration import messages
from tests.unit.server.transport.fake_call import FakeCall


@pytest.mark.parametrize(
    ("raised", "code"),
    [(InvalidImage("torn"), grpc.StatusCode.INVALID_ARGUMENT), (ValueError("x"), grpc.StatusCode.INTERNAL)],
)
def test_the_call_fails_with_the_error(
    raised: Exception, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    workers, call = DecodePool(1, 1), FakeCall()
    workers.run(call, Mock(side_effect=raised))
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
    workers, gone = DecodePool(1, 1), FakeCall()
    gone.cancel()
    workers.run(gone, lambda: done.append(False))
    workers.close()
    assert done == [True]


MODEL = cast(
    ServedModel,
    SimpleNamespace(
        bundle=SimpleNamespace(image=ImagePreparation(height=8, width=8, channels=3)),
        metrics=SimpleNamespace(preprocess_seconds=[]),
    ),
)


def test_a_decode_ends_with_its_call() -> None:
    """As when its deadline passes or its caller hangs up, while the second image is read."""
    photo = messages.jpeg(messages.random_photo(0, 400, 400)[0])

    class Ending(FakeCall):
        asked = 0

        @property
        def finished(self) -> bool:
            self.asked += 1
            return self.asked > last

    limits, last = RequestLimits(10, 10**6, 10**6), 10**6
    decode(whole := Ending(), [photo, photo], MODEL, limits)
    last = 3 * whole.asked // 4
    with pytest.raises(Cancelled):
        decode(Ending(), [photo, photo], MODEL, limits)


def test_the_pixels_of_all_files_are_bounded() -> None:
    """Eight of the largest: each of the thousand files of a request may hold so much."""
    limits = RequestLimits(1000, 100, 100)
    call, file = FakeCall(), messages.png(np.zeros((10, 10, 3), np.uint8))
    assert len(decode(call, [file] * 8, MODEL, limits).rows) == 8
    with pytest.raises(InvalidImage, match="at most 800 pixels in the files of a request: split it"):
        decode(call, [file] * 9, MODEL, limits)
