"""Several engines on one queue: they share its work, put split answers together, and are supervised one by one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest

from rafaga.errors import EngineFailure
from rafaga.server.scheduling.job import Arrays, Job, JobTiming
from tests.unit.server.execution.fakes import HANG, SOON, WAIT_S, Served, eventually

RESTARTS = "rafaga_engine_restarts_total"
NO_DEVICE = RuntimeError("no device")


def test_a_large_request_keeps_every_engine_busy(start: Callable[..., Served]) -> None:
    served = start(count=2)
    for engine in served.engines:
        engine.gate.clear()
    caller = served.submit(*range(100, 132))
    assert all(engine.started.acquire(timeout=WAIT_S) for engine in served.engines)
    for engine in served.engines:
        engine.gate.set()
    assert caller.end() == [2 * n for n in range(100, 132)]


def test_split_answers_are_whole(start: Callable[..., Served]) -> None:
    """Many at once, their parts on whichever engine is free."""
    served = start(count=2)
    callers = [served.submit(*range(n, n + 30)) for n in range(1000, 1100)]
    for caller in callers:
        assert caller.end() == [2 * n for n in caller.job.inputs[0]]
    eventually(lambda: served.model.idle)


def test_parts_that_are_answered_at_once() -> None:
    """Copying lets other threads in: the last part completes the answer, not the one that was counted last."""
    for _ in range(5):
        ends: list[tuple[Arrays, JobTiming]] = []

        def answered(outputs: Arrays, timing: JobTiming, ends: list[tuple[Arrays, JobTiming]] = ends) -> None:
            ends.append((tuple(o.copy() for o in outputs), timing))

        job = Job((np.zeros((4, 1)),), answered, lambda error: pytest.fail(str(error)))
        together = threading.Barrier(4)

        def bring(row: int, job: Job = job, together: threading.Barrier = together) -> None:
            part = np.full((1, 500_000), row)
            together.wait(WAIT_S)
            job.answer(row, (part,), 0.25, row + 1)

        threads = [threading.Thread(target=bring, args=(row,)) for row in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        ((outputs, timing),) = ends
        assert (outputs[0] == np.arange(4)[:, np.newaxis]).all()
        assert timing == JobTiming(0.0, 1.0, 4)


def test_parts_that_fail_at_once() -> None:
    for _ in range(200):
        ends: list[Exception] = []
        job = Job((np.zeros(2),), lambda *_: pytest.fail("answered"), ends.append)
        together = threading.Barrier(2)

        def fail(job: Job = job, together: threading.Barrier = together) -> None:
            together.wait(WAIT_S)
            job.fail(EngineFailure("broken"))

        threads = [threading.Thread(target=fail) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(ends) == 1


def test_while_one_cannot_restart_the_other_is_supervised(start: Callable[..., Served]) -> None:
    """1. One hangs, and no device takes a new one. 2. The other hangs too, and is found. 3. One device comes back."""
    served = start(count=2, supervision=SOON)
    served.refusing = {0: NO_DEVICE, 1: NO_DEVICE}
    first = served.submit(HANG)
    assert isinstance(first.end(), EngineFailure)
    second = served.submit(HANG)
    assert isinstance(second.end(), EngineFailure)
    assert served.model.down
    served.refusing = {0: NO_DEVICE}
    for engine in served.engines:
        engine.go_on.set()
    eventually(lambda: not served.model.down)
    assert served.submit(1).end() == [2]


def test_a_lost_engine_does_not_count(start: Callable[..., Served]) -> None:
    """Neither in the capacity, nor in the predicted wait."""
    served = start(count=2, supervision=SOON)
    both = served.model.capacity_rows_per_s()
    assert both == pytest.approx(2 * 8 / 1e-3)
    served.refusing = {0: NO_DEVICE, 1: NO_DEVICE}
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.model.capacity_rows_per_s() == both / 2
    (left,) = (engine for engine in served.engines if not engine.hanging.is_set())
    left.gate.clear()
    busy = served.submit(1)
    assert left.started.acquire(timeout=WAIT_S)
    waiting = served.submit(*range(80))
    assert served.model.predicted_wait_s() >= 10 * 1e-3, "ten batches, for one engine"
    left.gate.set()
    assert busy.end() == [2]
    waiting.end()
    served.refusing = {}
    for engine in served.engines:
        engine.go_on.set()
    eventually(lambda: served.metric(RESTARTS) == 1)
    assert served.model.capacity_rows_per_s() > 1.5 * both / 2


def test_while_one_restarts_the_other_is_supervised(start: Callable[..., Served]) -> None:
    """A restart may take minutes, or hang."""
    served = start(count=2, supervision=dataclasses.replace(SOON, max_stuck=3))
    served.restarts.clear()
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.asked.acquire(timeout=WAIT_S)
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.asked.acquire(timeout=WAIT_S), "both at a time"
    for engine in served.engines:
        engine.go_on.set()
    served.restarts.set()
    eventually(lambda: served.metric(RESTARTS) == len(served.engines))
    assert served.submit(*range(100, 132)).end() == [2 * n for n in range(100, 132)]


def test_without_a_thread_for_it_the_supervisor_restarts_engines(
    start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = start(count=2, supervision=SOON)
    start_thread = threading.Thread.start

    def exhausted(thread: threading.Thread) -> None:
        if thread.name.startswith("restart-"):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    eventually(lambda: served.metric(RESTARTS) == 1)
    assert "no thread to restart an engine" in caplog.text
