"""Engines that take their time: as long per row as the test says, whatever else the machine is doing.

A run sleeps, so that the cores stay free for the transport and for whoever measures it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from rafaga.server.engine import Session


class Pace:
    """Sets the pace of every engine that is loaded while it is installed. row_s: seconds of a run, per row."""

    def __init__(self, row_s: float) -> None:
        self._row_s = row_s
        self._going = threading.Event()
        self._going.set()

    def of(self, session: Session) -> Session:
        return _Paced(self, session)

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
        self, output_names: Sequence[str] | None, input_feed: dict[str, NDArray[np.generic]]
    ) -> Sequence[NDArray[np.generic]]:
        began_s = time.perf_counter()
        outputs = self._session.run(output_names, input_feed)
        self._pace.keep(len(next(iter(input_feed.values()))), began_s)
        return outputs
