"""Engines that take their time: as long per row as the test says, whatever else the machine is doing.

A run sleeps, so that the cores stay free for the transport and for whoever measures it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from rafaga.server.engines import onnxruntime as engine
from rafaga.server.engines.onnxruntime import Session


class Pace:
    """The pace of some engines. row_s: seconds of a run, per row."""

    def __init__(self, row_s: float) -> None:
        self._row_s = row_s
        self._going = threading.Event()
        self._going.set()

    @contextmanager
    def set(self) -> Iterator[None]:
        """For every engine that is loaded before this ends."""
        create = engine.create_session
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "create_session", lambda *arguments: _Paced(self, create(*arguments)))
            yield

    @contextmanager
    def at(self, row_s: float) -> Iterator[None]:
        """Another pace for a while."""
        before, self._row_s = self._row_s, row_s
        try:
            yield
        finally:
            self._row_s = before

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """No run ends before this does."""
        self._going.clear()
        try:
            yield
        finally:
            self._going.set()

    def keep(self, rows: int, began_s: float) -> None:
        time.sleep(max(0.0, began_s + rows * self._row_s - time.perf_counter()))
        self._going.wait()


class _Paced:
    def __init__(self, pace: Pace, session: Session) -> None:
        self._pace = pace
        self._session = session

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: dict[str, NDArray[np.generic]],
        run_options: ort.RunOptions | None = None,
    ) -> Sequence[NDArray[np.generic]]:
        began_s = time.perf_counter()
        outputs = self._session.run(output_names, input_feed, run_options)
        self._pace.keep(len(next(iter(input_feed.values()))), began_s)
        return outputs
