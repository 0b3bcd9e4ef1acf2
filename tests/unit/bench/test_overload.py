"""What the overload part offers: multiples of the peak that the same server had before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench import overload
from bench.plan import Plan, Task
from bench.records import Sample

PEAKS = {"grpcio": 40.0, "native": 50.0}


class Client(AbstractContextManager["Client"]):
    """Of a server that answers 32 callers at its peak, and whatever is offered to it otherwise."""

    def __init__(self, target: str, model: str, *_: object, deadline_ms: float, **__: object) -> None:
        assert (model, deadline_ms) == ("googlenet", 500.0)
        self._peak = PEAKS[target]

    def __exit__(self, *_: object) -> None:
        pass

    def closed(self, callers: int, seconds: float, warm_up_s: float = 1.0) -> Sample:
        return Sample(rate=self._peak if callers == 32 else 1.0)

    def open(self, rate: float, seconds: float, warm_up_s: float) -> Sample:
        return Sample(rate=rate)


def test_the_rate_is_the_load_times_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def serving(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        yield {server: server for server in PEAKS}

    monkeypatch.setattr(overload, "serving", serving)
    monkeypatch.setattr(overload, "Client", Client)
    monkeypatch.setattr(overload, "on", lambda _: nullcontext())
    (block,) = overload.measure(Task(Path(), Plan(blocks=1), lambda _: None))
    offered = {(run.subject.target, run.subject.load): run.sample.rate for run in block}
    for server, peak in PEAKS.items():
        assert offered[server, "peak"] == peak
        assert offered[server, "alone"] == 1.0
        for load, times in (("0.8×", 0.8), ("2×", 2.0), ("5×", 5.0)):
            assert offered[server, load] == pytest.approx(times * peak)
