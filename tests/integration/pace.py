"""Engines that take their time: as long per row as the test says, whatever else the machine is doing.

A run sleeps, so that the cores stay free for the transport and the client.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rafaga.server.config.device import Device
from rafaga.server.engines.contract import Engine, PendingOutputs
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, measured
from rafaga.server.engines.selection import Placement
from rafaga.server.scheduling.job import Part
from tests.integration.valve import WrappedEngine


class Pace:
    """The pace of the engines that it loads. row_s: seconds of a run, per row."""

    def __init__(self, row_s: float) -> None:
        self._row_s = row_s
        self._going = threading.Event()
        self._going.set()

    def load(self, placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        """An engine factory."""
        engine, latency = placement.load(device, model)
        paced = _PacedEngine(engine, self)
        return LoadedEngine(paced, measured(paced, model.samples, latency.buckets))

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


class _PacedEngine(WrappedEngine):
    def __init__(self, engine: Engine, pace: Pace) -> None:
        super().__init__(engine)
        self._pace = pace

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        began_s = time.perf_counter()
        outputs = super().submit(rows)
        self._pace.keep(sum(part.stop - part.start for part in rows), began_s)
        return outputs
