"""Engines and image decoders that go on when the test lets them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from rafaga.bundle import ImagePreparation
from rafaga.images import Prepared
from rafaga.server.engines.onnxruntime import Session
from rafaga.server.services import decoding
from tests.integration.serving import PATIENCE_S


class Valve:
    """Stands before every engine that is loaded while it is installed. Open until `closed` is entered."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._waiting = threading.Semaphore(0)
        self.runs: list[int] = []
        """Rows of every run that was let through."""

    def before(self, session: Session) -> Session:
        return _Valved(self, session)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Engines stop before their next run; leaving lets them go on."""
        self._open.clear()
        self.runs.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait_for_engine(self) -> None:
        """Returns once an engine stands before the closed valve with a batch in its hands."""
        assert self._waiting.acquire(timeout=PATIENCE_S), "no engine came"

    def pass_through(self, rows: int) -> None:
        if not self._open.is_set():
            self._waiting.release()
        self._open.wait(PATIENCE_S)
        self.runs.append(rows)


class _Valved:
    def __init__(self, valve: Valve, session: Session) -> None:
        self._valve = valve
        self._session = session

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, NDArray[np.generic]],
        run_options: ort.RunOptions | None = None,
    ) -> Sequence[NDArray[np.generic]]:
        self._valve.pass_through(len(next(iter(input_feed.values()))))
        return self._session.run(output_names, input_feed, run_options)


class Decoder:
    """Takes the place of the image decoder and gives black images, once it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._waiting = threading.Semaphore(0)
        monkeypatch.setattr(decoding, "prepare", self._prepare)

    def wait_for_image(self) -> None:
        assert self._waiting.acquire(timeout=PATIENCE_S), "nobody decodes"

    def go_on(self) -> None:
        self._open.set()

    def _prepare(self, data: bytes, preparation: ImagePreparation, max_pixels: int) -> Prepared:
        self._waiting.release()
        self._open.wait(PATIENCE_S)
        height, width = preparation.height or 8, preparation.width or 8
        return Prepared(np.zeros((height, width, preparation.channels), np.uint8), (height, width))
