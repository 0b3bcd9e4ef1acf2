"""Engines that hang, break or die: what they owe fails, nothing else does, and a new engine takes over."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rafaga.bundle import TensorSpec
from rafaga.errors import BundleError, DeviceError, Draining, EngineFailure, ModelNotReady, RafagaError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.onnxruntime import Engine, Samples
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import Backoff, Watch, WatchPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job, JobTiming
from rafaga.server.scheduling.latency import LatencyTable

WAIT_S = 60.0
HANG, POISON = 13, 666
SPEC = (TensorSpec(name="x", dtype="int64", shape=(None,)),)
SOON = WatchPolicy(timeout_s=0.1, slowness=1.0, first_delay_s=0.02)


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


class Session:
    """Doubles its input; hangs on HANG until it is let go, fails on POISON, and on everything once broken."""

    def __init__(self) -> None:
        self.hanging = threading.Event()
        self.go_on = threading.Event()
        self.broken = False
        self.batches: list[list[int]] = []

    def run(self, _: object, feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        x = feed["x"]
        self.batches.append(x.tolist())
        if (x == HANG).any():
            self.hanging.set()
            assert self.go_on.wait(WAIT_S)
        if self.broken or (x == POISON).any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [x * 2]


class Caller:
    def __init__(self, values: tuple[int, ...]) -> None:
        self.ends: list[list[int] | RafagaError] = []
        self.done = threading.Event()
        self.job = Job((np.array(values),), self._succeed, self._fail)

    def _succeed(self, outputs: Arrays, _: JobTiming) -> None:
        self.ends.append(outputs[0].tolist())
        self.done.set()

    def _fail(self, error: RafagaError) -> None:
        self.ends.append(error)
        self.done.set()

    def end(self) -> list[int] | RafagaError:
        assert self.done.wait(WAIT_S), "forgotten"
        (end,) = self.ends
        return end


class Served:
    """One session after the other; `refusing` is what bringing up a new one fails with."""

    def __init__(self, watch: WatchPolicy = SOON) -> None:
        self.sessions: list[Session] = []
        self.refusing: Exception | None = None
        self.tries = threading.Semaphore(0)
        self.changed = threading.Semaphore(0)
        self.metrics = Metrics()
        described = PlainModel("doubler", 1, SPEC, SPEC, 8)

        def engine() -> Engine:
            self.tries.release()
            if self.refusing is not None:
                raise self.refusing
            self.sessions.append(Session())
            return Engine(described, self.sessions[-1])

        self.model = ServedModel(
            described,
            None,
            [engine()],
            LatencyTable((1, 2, 4, 8), (1e-3,) * 4),
            BatchPolicy(max_queue_wait_s=600.0),
            self.metrics.model("doubler"),
            Samples((np.zeros(1, np.int64),)),
            lambda _: engine(),
            watch,
        )
        self.model.start(self.changed.release)

    @property
    def session(self) -> Session:
        return self.sessions[-1]

    def submit(self, *values: int) -> Caller:
        caller = Caller(values)
        self.model.submit(caller.job)
        return caller

    def hang(self) -> Caller:
        caller = self.submit(HANG)
        assert self.session.hanging.wait(WAIT_S)
        return caller

    def wait_until(self, *, down: bool) -> None:
        assert self.changed.acquire(timeout=WAIT_S)
        assert self.model.down is down

    @property
    def restarts(self) -> float | None:
        return self.metrics.registry.get_sample_value("rafaga_engine_restarts_total", {"model": "doubler"})

    def end(self) -> None:
        for session in self.sessions:
            session.go_on.set()
        self.model.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(watch: WatchPolicy = SOON) -> Served:
        started.append(Served(watch))
        return started[-1]

    yield start
    for served in started:
        served.end()


def test_a_hung_engine_fails_what_it_owes_and_a_new_one_takes_over(start: Callable[..., Served]) -> None:
    """1. One runs for ever, two wait. 2. They fail, each as it must. 3. A new engine serves."""
    served = start(WatchPolicy(timeout_s=0.5, first_delay_s=0.3))
    hung = served.hang()
    waiting = [served.submit(1), served.submit(2)]
    served.wait_until(down=True)
    assert isinstance(hung.end(), EngineFailure), "not to be sent again: it may be what engines hang on"
    assert all(isinstance(caller.end(), ModelNotReady) for caller in waiting)
    with pytest.raises(ModelNotReady):
        served.submit(3)
    assert served.restarts == 0
    served.wait_until(down=False)
    assert served.submit(4).end() == [8]
    assert (len(served.sessions), served.restarts) == (2, 1)


def test_an_engine_that_was_given_up_answers_nobody(start: Callable[..., Served]) -> None:
    """Its run ends after all, when others are served already."""
    served = start()
    hung = served.hang()
    old = served.session
    assert isinstance(hung.end(), EngineFailure)
    served.wait_until(down=True)
    served.wait_until(down=False)
    old.go_on.set()
    (stuck,) = served.model._stuck
    stuck.join(WAIT_S)
    assert not stuck.is_alive()
    assert len(hung.ends) == 1
    assert served.submit(1).end() == [2]
    assert old.batches == [[HANG]], "it took no other work"
    assert served.model.idle


def test_a_slow_run_within_its_bound_is_left_alone(start: Callable[..., Served]) -> None:
    served = start(WatchPolicy(timeout_s=WAIT_S))
    slow = served.hang()
    served.model._watch.wake()
    served.session.go_on.set()
    assert slow.end() == [2 * HANG]
    assert (len(served.sessions), served.restarts) == (1, 0)


def test_the_bound_follows_the_prediction() -> None:
    policy = WatchPolicy(timeout_s=10.0, slowness=20.0)
    assert (policy.bound_s(0.001), policy.bound_s(3.0)) == (10.0, 60.0)


def test_a_process_that_stood_still_blames_no_engine() -> None:
    """The watch wakes long after the bound: it was asleep too, so the run gets its time again."""
    asked: list[str] = []
    done = threading.Event()

    class Ward:
        lacking = ()
        give_up_at = time.monotonic() - 5.0

        def give_up(self) -> None:
            asked.append("given up")

        def be_patient(self) -> None:
            asked.append("waited")
            self.give_up_at = math.inf
            done.set()

        def renew(self, number: int) -> bool:
            raise AssertionError

    watch = Watch(Ward(), WatchPolicy(), "ward")
    watch.start()
    assert done.wait(WAIT_S)
    watch.close()
    assert asked == ["waited"]


def test_an_engine_that_fails_on_its_own_sample_is_replaced(start: Callable[..., Served]) -> None:
    """The input is not to blame, so the caller may send it again; the same input then runs."""
    served = start()
    assert served.submit(1).end() == [2]
    served.session.broken = True
    callers = [served.submit(n) for n in (1, 2)]
    assert all(isinstance(caller.end(), ModelNotReady) for caller in callers)
    served.wait_until(down=True)
    served.wait_until(down=False)
    assert served.submit(1).end() == [2]
    assert served.restarts == 1


def test_poison_alone_brings_no_engine_down(start: Callable[..., Served]) -> None:
    served = start()
    for _ in range(5):
        assert isinstance(served.submit(POISON).end(), EngineFailure)
    assert served.submit(1).end() == [2]
    assert (len(served.sessions), served.restarts) == (1, 0)


def test_hanging_while_a_failed_batch_is_halved(start: Callable[..., Served]) -> None:
    """The half that hangs fails for good; the half that did not get its turn may be sent again."""
    served = start(WatchPolicy(timeout_s=1.0, slowness=1.0, first_delay_s=0.02))
    run = served.session.run
    held, release = threading.Event(), threading.Event()

    def run_halves(names: object, feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        if feed["x"].tolist() == [0]:
            held.set()
            assert release.wait(WAIT_S)
            return [feed["x"]]
        if len(feed["x"]) == 4:
            raise RuntimeError("too much")
        return run(names, feed, options)

    served.session.run = run_halves  # type: ignore[method-assign]
    served.submit(0)
    assert held.wait(WAIT_S)
    callers = [served.submit(n) for n in (1, HANG, 3, 4)]
    release.set()
    kinds = [type(caller.end()) for caller in callers]
    assert kinds == [EngineFailure, EngineFailure, ModelNotReady, ModelNotReady]


def test_a_thread_that_is_killed_is_replaced(start: Callable[..., Served]) -> None:
    """SystemExit in a callback gets past every handler of errors."""
    served = start()
    killer, other = Caller((1,)), Caller((2,))

    def leave(*_: object) -> None:
        raise SystemExit

    killer.job.on_success = leave
    hold = served.session.run
    held, release = threading.Event(), threading.Event()

    def run(names: object, feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        if feed["x"].tolist() == [0]:
            held.set()
            assert release.wait(WAIT_S)
        return hold(names, feed, options)

    served.session.run = run  # type: ignore[method-assign]
    served.submit(0)
    assert held.wait(WAIT_S)
    served.model.submit(killer.job)
    served.model.submit(other.job)
    release.set()
    assert isinstance(other.end(), ModelNotReady)
    served.wait_until(down=True)
    served.wait_until(down=False)
    assert served.submit(3).end() == [6]


def test_trying_until_there_is_an_engine(start: Callable[..., Served]) -> None:
    served = start()
    served.refusing = RuntimeError("no device")
    served.hang()
    served.wait_until(down=True)
    for _ in range(4):  # the first engine, and three that failed
        assert served.tries.acquire(timeout=WAIT_S)
    assert served.model.down
    with pytest.raises(ModelNotReady):
        served.submit(1)
    served.refusing = None
    served.wait_until(down=False)
    assert served.submit(1).end() == [2]
    assert served.restarts == 1


def test_threads_that_hang_are_not_piled_up(start: Callable[..., Served]) -> None:
    """With two lost engines still hanging no third is made, until one of them ends."""
    served = start()
    for _ in range(2):
        served.hang()
        served.wait_until(down=True)
        if len(served.sessions) < 2:
            served.wait_until(down=False)
    while served.tries.acquire(blocking=False):
        pass
    assert not served.tries.acquire(timeout=0.3)
    assert served.model.down
    assert served.model.hopeless
    served.sessions[0].go_on.set()
    eventually(lambda: not served.model.down)
    assert not served.model.hopeless
    assert served.submit(1).end() == [2]


@pytest.mark.parametrize("error", [DeviceError("cudaSetDevice: (700)"), RuntimeError("CUDA failure 700")], ids=repr)
def test_a_device_that_refuses_again_and_again_leaves_no_hope(start: Callable[..., Served], error: Exception) -> None:
    """It is told once it is so; a device that comes back all the same is used."""
    served = start(WatchPolicy(timeout_s=0.1, slowness=1.0, first_delay_s=0.01, max_delay_s=0.02, max_failures=3))
    served.refusing = error
    served.hang()
    eventually(lambda: served.model.hopeless)
    assert served.model._failures[0] >= 3
    served.refusing = None
    eventually(lambda: not served.model.down)
    assert not served.model.hopeless
    assert served.submit(1).end() == [2]


def test_a_bundle_that_is_refused_needs_no_new_process(start: Callable[..., Served]) -> None:
    served = start(WatchPolicy(timeout_s=0.1, slowness=1.0, first_delay_s=0.01, max_delay_s=0.02, max_failures=3))
    served.refusing = BundleError("model.onnx is not what was published")
    assert served.tries.acquire(timeout=WAIT_S)
    served.hang()
    for _ in range(6):
        assert served.tries.acquire(timeout=WAIT_S)
    assert served.model.down
    assert not served.model.hopeless


def test_closing_while_an_engine_hangs(start: Callable[..., Served]) -> None:
    served = start(WatchPolicy(timeout_s=WAIT_S))
    hung, waiting = served.hang(), served.submit(1)
    served.model.close(timeout_s=0.05)
    assert isinstance(hung.end(), EngineFailure)
    assert isinstance(waiting.end(), ModelNotReady | Draining)
    assert served.model.idle


def test_closing_while_there_is_no_engine(start: Callable[..., Served]) -> None:
    served = start()
    served.refusing = RuntimeError("no device")
    served.hang()
    served.wait_until(down=True)
    served.model.close()
    with pytest.raises(Draining):
        served.submit(1)
    assert served.model.down


class TestBackoff:
    policy = WatchPolicy(first_delay_s=1.0, max_delay_s=10.0, stable_s=100.0)

    def test_it_doubles_up_to_a_limit(self) -> None:
        backoff, now, delays = Backoff(self.policy), 0.0, []
        for _ in range(6):
            delays.append(backoff.next(now))
            now += delays[-1] + 1.0
        assert delays == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]

    def test_an_engine_that_lasted_is_a_fresh_start(self) -> None:
        backoff = Backoff(self.policy)
        assert [backoff.next(0.0), backoff.next(10.0)] == [1.0, 2.0]
        assert backoff.next(10.0 + 2.0 + 100.1) == 1.0


def test_an_engine_that_gets_no_thread_is_closed(start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    served = start()
    closed: list[Engine] = []
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        full.setattr(Engine, "close", lambda engine: closed.append(engine))
        assert not served.model.renew(0)
    assert [engine.session for engine in closed] == [served.session]
    assert served.submit(1).end() == [2], "the one that serves goes on"
