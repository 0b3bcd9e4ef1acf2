"""Engines that hang, break or die: the jobs they have taken fail, no others do, and a new engine takes over."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rafaga.errors import BundleError, DeviceError, Draining, EngineFailure, ModelNotReady
from rafaga.server.execution.supervisor import Backoff, SupervisorPolicy
from tests.unit.server.execution.fakes import HANG, SOON, WAIT_S, Served, eventually

RESTARTS = "rafaga_engine_restarts_total"
NO_DEVICE = RuntimeError("no device")


def test_an_engine_that_was_given_up_answers_no_job(start: Callable[..., Served]) -> None:
    """Its run ends after all, when others are served already."""
    served = start(supervision=SOON)
    hung = served.hang()
    old = served.engine
    assert isinstance(hung.end(), EngineFailure)
    served.wait_until(down=True)
    served.wait_until(down=False)
    old.go_on.set()
    eventually(lambda: old.closed)
    assert len(hung.ends) == 1
    assert served.submit(1).answered()
    assert old.batches == [[HANG]], "it took no other work"
    assert served.model.idle


def test_a_slow_run_within_its_bound_is_left_alone(start: Callable[..., Served]) -> None:
    """20 times its prediction here."""
    served = start(run_s=WAIT_S, supervision=SupervisorPolicy(timeout_s=0.01))
    slow = served.hang()
    assert not served.changed.acquire(timeout=0.1)
    served.engine.go_on.set()
    assert slow.answered()
    assert (len(served.all_engines), served.metric(RESTARTS)) == (1, 0)


class Clock:
    """Stands still unless the test moves it."""

    now, reads = 0.0, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


def test_a_process_that_stood_still_loses_no_engine(start: Callable[..., Served]) -> None:
    """1. The supervisor wakes long after the deadline: it was stopped too, so the run gets its bound again. 2. It wakes
    in time, and the run is given up."""
    clock = Clock()
    served = start(supervision=SOON, clock=clock)
    slow = served.hang()
    clock.now, clock.reads = 60.0, 0
    eventually(lambda: clock.reads > 10)
    served.engine.go_on.set()
    assert slow.answered()
    served.engine.go_on.clear()
    served.engine.hanging.clear()
    hung = served.hang()
    clock.now += 0.2
    assert isinstance(hung.end(), EngineFailure)


def test_an_engine_that_fails_on_its_own_sample_is_replaced(start: Callable[..., Served]) -> None:
    """The input is not to blame, so the caller may send it again; the same input then runs."""
    served = start(supervision=SOON)
    assert served.submit(1).answered()
    served.engine.broken = True
    callers = [served.submit(n) for n in (1, 2)]
    assert all(isinstance(caller.end(), ModelNotReady) for caller in callers)
    served.wait_until(down=True)
    served.wait_until(down=False)
    assert served.submit(1).answered()
    assert served.metric(RESTARTS) == 1


@pytest.mark.parametrize(
    ("error", "unrecoverable"),
    [
        (DeviceError("cudaSetDevice: (700)"), True),
        (RuntimeError("CUDA failure 700"), True),
        (BundleError("model.onnx is not what was published"), False),
    ],
    ids=repr,
)
def test_restarts_go_on_until_one_works(start: Callable[..., Served], error: Exception, unrecoverable: bool) -> None:
    """The engine is reported unrecoverable after three that failed in a row, unless the bundle is broken."""
    often = SupervisorPolicy(timeout_s=0.1, slowness=1.0, first_delay_s=0.01, max_delay_s=0.02, max_failures=3)
    served = start(supervision=often)
    served.refusing = {0: error}
    served.hang()
    for _ in range(6):
        assert served.asked.acquire(timeout=WAIT_S)
    assert served.model.down
    assert served.model.unrecoverable is unrecoverable
    with pytest.raises(ModelNotReady):
        served.submit(1)
    served.refusing = {}
    eventually(lambda: not served.model.down)
    assert not served.model.unrecoverable
    assert served.submit(1).answered()
    assert served.metric(RESTARTS) == 1


def test_only_so_many_hung_threads(start: Callable[..., Served]) -> None:
    """With two lost engines still hanging no third is made, until one of them ends."""
    served = start(supervision=SOON)
    for _ in range(2):
        served.hang()
        served.wait_until(down=True)
        if len(served.all_engines) < 2:
            served.wait_until(down=False)
    while served.asked.acquire(blocking=False):
        pass
    assert not served.asked.acquire(timeout=0.3)
    assert served.model.down
    assert served.model.unrecoverable
    served.all_engines[0].go_on.set()
    eventually(lambda: not served.model.down)
    assert not served.model.unrecoverable
    assert served.submit(1).answered()


def test_closing_while_an_engine_hangs(start: Callable[..., Served]) -> None:
    served = start(supervision=SupervisorPolicy(timeout_s=WAIT_S))
    hung, waiting = served.hang(), served.submit(1)
    served.model.close(timeout_s=0.05)
    assert isinstance(hung.end(), EngineFailure)
    assert isinstance(waiting.end(), ModelNotReady | Draining)
    assert served.model.idle


def test_restarts_are_ever_rarer_until_an_engine_lasts() -> None:
    backoff, now, delays = Backoff(SupervisorPolicy(first_delay_s=1.0, max_delay_s=10.0, stable_s=100.0)), 0.0, []
    for lasted_s in (1.0, 1.0, 1.0, 1.0, 1.0, 100.1, 1.0):
        delays.append(backoff.next(now))
        now += delays[-1] + lasted_s
    assert delays == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 1.0]


@pytest.mark.parametrize("name", ["restart-", "engine-"])
def test_engines_are_restarted_where_a_thread_cannot_start(
    start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The supervisor restarts the engine itself; an engine without a thread is closed, and the next one is tried."""
    served = start(count=2, supervision=SOON)
    start_thread = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    if name == "engine-":
        eventually(lambda: len(served.all_engines) > 2 and served.all_engines[2].closed)
        monkeypatch.undo()
    eventually(lambda: served.metric(RESTARTS) == 1)
    assert served.submit(1).answered()


def test_while_one_cannot_restart_the_other_is_supervised(start: Callable[..., Served]) -> None:
    """1. One hangs, and no device takes a new one. 2. The other hangs too, and is found. 3. One device comes back."""
    served = start(count=2, supervision=SOON)
    served.refusing = {0: NO_DEVICE, 1: NO_DEVICE}
    for _ in range(2):
        assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.model.down
    served.refusing = {0: NO_DEVICE}
    for engine in served.engines:
        engine.go_on.set()
    eventually(lambda: not served.model.down)
    assert served.submit(1).answered()


def test_a_lost_engine_does_not_count(start: Callable[..., Served]) -> None:
    """Neither in the capacity, nor in the predicted wait."""
    served = start(count=2, supervision=SOON)
    both = served.model.queue.capacity_rows_per_s()
    assert both == pytest.approx(2 * 8 / 1e-3)
    served.refusing = {0: NO_DEVICE, 1: NO_DEVICE}
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.model.queue.capacity_rows_per_s() == both / 2
    (left,) = (engine for engine in served.engines if not engine.hanging.is_set())
    left.gate.clear()
    busy = served.submit(1)
    assert left.started.acquire(timeout=WAIT_S)
    waiting = served.submit(*range(80))
    assert served.model.queue.predicted_wait_s() >= 10 * 1e-3, "ten batches, for one engine"
    left.gate.set()
    assert busy.end() == [2]
    waiting.end()
    served.refusing = {}
    for engine in served.engines:
        engine.go_on.set()
    eventually(lambda: served.metric(RESTARTS) == 1)
    assert served.model.queue.capacity_rows_per_s() > 1.5 * both / 2
