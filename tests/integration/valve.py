"""Engines and image decoders that go on when the test lets them, or take as long as it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from rafaga.bundle import ImagePreparation
from rafaga.images import Prepared
from rafaga.server.config.device import Device
from rafaga.server.engines.contract import Engine, PendingOutputs
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, measured
from rafaga.server.engines.selection import Placement
from rafaga.server.scheduling.job import Arrays, Part
from rafaga.server.scheduling.latency import LatencyTable
from rafaga.server.services import decoding
from tests.integration.serving import PATIENCE_S


class WrappedEngine:
    """An engine whose `submit` is replaced. Unless `depth` is 2, runs compute in the caller's thread."""

    def __init__(self, engine: Engine, submit: Callable[[Sequence[Part]], PendingOutputs], depth: int = 1) -> None:
        self.submit, self.depth = submit, depth
        self.terminate, self.close = engine.terminate, engine.close


def rows_of(parts: Sequence[Part]) -> int:
    return sum(part.stop - part.start for part in parts)


class Valve:
    """Holds the runs of the engines that it loads. Open until `closed` is entered.

    inline: whether their models run in the transport's thread.
    """

    def __init__(self, inline: bool = False) -> None:
        self.inline = inline
        self._is_closed = False
        self._waiting = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self.runs: list[int] = []
        """Rows of every run that was let through."""
        self.thread = threading.current_thread()
        """The one that came last."""

    def load(self, placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        """An engine factory."""
        engine, latency = placement.load(device, model)
        if self.inline:  # on the slowest machine
            latency = LatencyTable(latency.buckets, [1e-6] * len(latency.buckets))

        def run(parts: Sequence[Part]) -> Arrays:
            self.pass_through(rows_of(parts))
            return engine.submit(parts).result()

        def submit(parts: Sequence[Part]) -> PendingOutputs:
            return _Deferred(lambda: run(parts))

        # Engines of depth 2 never run inline.
        return LoadedEngine(WrappedEngine(engine, submit, 1 if self.inline else 2), latency)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Engines stop before their next run; leaving lets them go on."""
        self._waiting, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self._is_closed = True
        self.runs.clear()
        try:
            yield
        finally:
            self._is_closed = False
            self._permits.release(1000)  # more than engines

    def wait_for_engine(self) -> None:
        """Returns once an engine waits at the closed valve with a batch."""
        assert self._waiting.acquire(timeout=PATIENCE_S), "no engine came"

    def let_one_through(self) -> None:
        self._permits.release()

    def pass_through(self, rows: int) -> None:
        self.thread = threading.current_thread()
        if self._is_closed:
            self._waiting.release()
            self._permits.acquire(timeout=PATIENCE_S)
        self.runs.append(rows)


class _Deferred:
    """PendingOutputs that the thread which asks for them computes."""

    def __init__(self, compute: Callable[[], Arrays]) -> None:
        self.result = compute

    def done(self) -> bool:
        return True  # so that no batch is taken ahead

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        call(self)


class Decoder:
    """Takes the place of the image decoder and gives black images, once it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._waiting = threading.Semaphore(0)
        monkeypatch.setattr(decoding, "prepare", self._prepare)

    def wait_for_image(self) -> None:
        assert self._waiting.acquire(timeout=PATIENCE_S), "no image came"

    def go_on(self) -> None:
        self._open.set()

    def _prepare(self, data: bytes, preparation: ImagePreparation, *_: object) -> Prepared:
        self._waiting.release()
        self._open.wait(PATIENCE_S)
        height, width = preparation.height or 8, preparation.width or 8
        return Prepared(np.zeros((height, width, preparation.channels), np.uint8), (height, width))


class Pace:
    """The pace of the engines that it loads. row_s: seconds of a run, per row."""

    def __init__(self, row_s: float) -> None:
        self._row_s = row_s
        self._going = threading.Event()
        self._going.set()

    def load(self, placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        """An engine factory."""
        engine, latency = placement.load(device, model)

        def submit(parts: Sequence[Part]) -> PendingOutputs:
            end_s = time.perf_counter() + rows_of(parts) * self._row_s
            outputs = engine.submit(parts)
            time.sleep(max(0.0, end_s - time.perf_counter()))
            self._going.wait()
            return outputs

        paced = WrappedEngine(engine, submit)
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
