"""Several engines on one queue: they share its work, put split answers together, and are looked after one by one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rafaga.errors import EngineFailure
from rafaga.plain_model import PlainModel
from rafaga.server.engines.onnxruntime import Engine, Samples
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import WatchPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job, JobTiming
from rafaga.server.scheduling.latency import LatencyTable
from tests.unit.server.execution.test_supervisor import HANG, SOON, SPEC, WAIT_S, Caller, Session, eventually

DESCRIBED = PlainModel("doubler", 1, SPEC, SPEC, 8)


class Gated(Session):
    """Runs when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def run(self, names: object, feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        self.started.release()
        assert self.gate.wait(WAIT_S)
        return super().run(names, feed, options)


class Served:
    """Two engines; those in `refused` cannot be brought up again."""

    def __init__(self, watch: WatchPolicy | None = None) -> None:
        self.sessions = [Gated(), Gated()]
        self.refused: set[int] = set()
        self.made = self.sessions[:]
        self.asked = threading.Semaphore(0)
        self.slow = threading.Event()  # cleared: new ones take for ever
        self.slow.set()
        self.model = ServedModel(
            DESCRIBED,
            None,
            [Engine(DESCRIBED, session) for session in self.sessions],
            LatencyTable((1, 2, 4, 8), (1e-3,) * 4),
            BatchPolicy(max_queue_wait_s=600.0),
            Metrics().model("doubler"),
            Samples((np.zeros(1, np.int64),)),
            self.renew,
            watch,
        )
        self.model.start()

    def renew(self, number: int) -> Engine:
        self.asked.release()
        assert self.slow.wait(WAIT_S)
        if number in self.refused:
            raise RuntimeError("no device")
        self.sessions[number] = Gated()
        self.made.append(self.sessions[number])
        return Engine(DESCRIBED, self.sessions[number])

    def submit(self, *values: int) -> Caller:
        caller = Caller(values)
        self.model.submit(caller.job)
        return caller


@pytest.fixture
def start() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(watch: WatchPolicy | None = None) -> Served:
        started.append(Served(watch))
        return started[-1]

    yield start
    for served in started:
        for session in served.made:
            session.gate.set()
            session.go_on.set()
        served.slow.set()
        served.model.close()


def test_a_large_request_keeps_every_engine_busy(start: Callable[..., Served]) -> None:
    served = start()
    for session in served.sessions:
        session.gate.clear()
    caller = served.submit(*range(100, 132))
    assert all(session.started.acquire(timeout=WAIT_S) for session in served.sessions)
    for session in served.sessions:
        session.gate.set()
    assert caller.end() == [2 * n for n in range(100, 132)]


def test_split_answers_are_whole(start: Callable[..., Served]) -> None:
    """Many at once, their parts on whichever engine is free."""
    served = start()
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


def test_while_one_cannot_be_replaced_the_other_is_watched(start: Callable[..., Served]) -> None:
    """1. One hangs, and no device takes a new one. 2. The other hangs too, and is found. 3. One device comes back."""
    served = start(SOON)
    served.refused = {0, 1}
    first = served.submit(HANG)
    assert isinstance(first.end(), EngineFailure)
    second = served.submit(HANG)
    assert isinstance(second.end(), EngineFailure)
    assert served.model.down
    served.refused = {0}
    for session in served.sessions:
        session.go_on.set()
    eventually(lambda: not served.model.down)
    assert served.submit(1).end() == [2]


def test_a_lost_engine_does_not_count(start: Callable[..., Served]) -> None:
    """Neither in what the model can do, nor in how long who waits for it will wait."""
    served = start(SOON)
    both = served.model.capacity_rows_per_s()
    assert both == pytest.approx(2 * 8 / 1e-3)
    served.refused = {0, 1}
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.model.capacity_rows_per_s() == both / 2
    (left,) = (session for session in served.sessions if not session.hanging.is_set())
    left.gate.clear()
    busy = served.submit(1)
    assert left.started.acquire(timeout=WAIT_S)
    waiting = served.submit(*range(80))
    assert served.model.predicted_wait_s() >= 10 * 1e-3, "ten batches, for one engine"
    left.gate.set()
    assert busy.end() == [2]
    waiting.end()
    served.refused = set()
    for session in served.sessions:
        session.go_on.set()
    eventually(lambda: not served.model.lacking)
    assert served.model.capacity_rows_per_s() > 1.5 * both / 2


def test_while_one_is_brought_up_the_other_is_watched(start: Callable[..., Served]) -> None:
    """Bringing up takes its time, or hangs itself."""
    served = start(dataclasses.replace(SOON, max_stuck=3))
    served.slow.clear()
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.asked.acquire(timeout=WAIT_S)
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.asked.acquire(timeout=WAIT_S), "both at a time"
    for session in served.sessions:
        session.go_on.set()
    served.slow.set()
    eventually(lambda: not served.model.lacking)
    assert served.submit(*range(100, 132)).end() == [2 * n for n in range(100, 132)]


def test_without_a_thread_to_bring_one_up_the_watch_does_it(
    start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = start(SOON)
    start_thread = threading.Thread.start

    def exhausted(thread: threading.Thread) -> None:
        if thread.name.startswith("renew-"):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    eventually(lambda: not served.model.lacking)
    assert "no thread to bring up an engine" in caplog.text
