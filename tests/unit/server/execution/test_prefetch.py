"""ServedModel with an engine that takes the next batch while one runs: who is sent early, answered and failed."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rafaga.bundle import TensorSpec
from rafaga.errors import EngineFailure, ModelNotReady, RafagaError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.device_memory import HostMemory
from rafaga.server.engines.onnxruntime import Samples
from rafaga.server.engines.pipelined import BoundEngine
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import WatchPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job
from rafaga.server.scheduling.latency import LatencyTable

SPEC = (TensorSpec(name="x", dtype="int64", shape=(None,)),)
DESCRIBED = PlainModel("doubler", 1, SPEC, SPEC, 4)
POISON = 666
WAIT_S = 30.0


class Binding:
    def __init__(self) -> None:
        self.bound: dict[str, tuple[int, int]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        self.bound["in"] = shape[0], address

    def bind_output(self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        self.bound["out"] = shape[0], address

    def array(self, which: str) -> np.ndarray:
        rows, address = self.bound[which]
        return np.frombuffer((ctypes.c_char * (8 * rows)).from_address(address), np.int64)


class Doubler:
    """Doubles what is bound, when it is let; fails on POISON."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.batches: list[list[int]] = []
        self.end = threading.Event()

    def run(self, *_: object) -> list[np.ndarray]:
        raise AssertionError("bound, or not at all")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_"):
            return list
        raise AttributeError(name)

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        x = binding.array("in")
        self.batches.append(x.tolist())
        self.started.release()
        assert self.gate.wait(WAIT_S)
        if (x == POISON).any():
            raise RuntimeError("Non-zero status code")
        binding.array("out")[:] = 2 * x


class Caller:
    def __init__(self, *values: int) -> None:
        self.values = values
        self.end: list[int] | RafagaError | None = None
        self.done = threading.Event()
        self.job = Job((np.array(values),), lambda outputs, _: self.finish(outputs[0].tolist()), self.finish)

    def finish(self, end: list[int] | RafagaError) -> None:
        assert self.end is None, "answered twice"
        self.end = end
        self.done.set()

    def wait(self) -> list[int] | RafagaError:
        assert self.done.wait(WAIT_S), "forgotten"
        assert self.end is not None
        return self.end

    def answered(self) -> bool:
        return self.wait() == [2 * v for v in self.values]


class Served:
    def __init__(self, watch: WatchPolicy | None = None) -> None:
        self.sessions: list[Doubler] = []
        self.engines: list[BoundEngine] = []
        self.model = ServedModel(
            DESCRIBED,
            None,
            [self.engine(0)],
            LatencyTable((1, 2, 4), (1e-3, 1e-3, 1e-3)),
            BatchPolicy(max_queue_wait_s=600),
            Metrics().model("doubler"),
            Samples((np.zeros(1, np.int64),)),
            self.engine,
            watch,
        )

    def engine(self, _: int) -> BoundEngine:
        self.sessions.append(Doubler())
        self.engines.append(BoundEngine(DESCRIBED, self.sessions[-1], HostMemory(), (1, 2, 4), exact=True))
        return self.engines[-1]

    @property
    def session(self) -> Doubler:
        return self.sessions[-1]

    def submit(self, *values: int) -> Caller:
        caller = Caller(*values)
        self.model.submit(caller.job)
        return caller


@pytest.fixture
def start() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def start(**watch: Any) -> Served:
        made.append(Served(WatchPolicy(**watch) if watch else None))
        made[-1].model.start()
        return made[-1]

    yield start
    for served in made:
        for session in served.sessions:
            session.gate.set()
        served.model.close()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def held(served: Served) -> Caller:
    """A batch of one row that runs until the gate opens."""
    served.session.gate.clear()
    first = served.submit(1)
    assert served.session.started.acquire(timeout=WAIT_S)
    return first


def test_a_full_batch_is_sent_while_another_runs(start: Callable[..., Served]) -> None:
    served = start()
    first = held(served)
    others = [served.submit(n) for n in (10, 11, 12, 13)]
    eventually(lambda: served.model._batcher.queued_rows == 0)
    eventually(lambda: not served.engines[0]._free)
    assert served.session.batches == [[1]], "it waits behind the one that runs"
    served.session.gate.set()
    assert first.answered()
    assert all(other.answered() for other in others)
    assert served.session.batches == [[1], [10, 11, 12, 13]]


def test_a_batch_that_is_not_full_is_left_to_grow(start: Callable[..., Served]) -> None:
    served = start()
    first = held(served)
    others = [served.submit(n) for n in (10, 11, 12)]
    time.sleep(0.05)
    assert served.model._batcher.queued_rows == 3
    others += [served.submit(13), served.submit(14)]
    eventually(lambda: served.model._batcher.queued_rows == 1)
    served.session.gate.set()
    assert first.answered()
    assert all(other.answered() for other in others)
    assert served.session.batches == [[1], [10, 11, 12, 13], [14]]


def test_no_more_than_one_is_ahead(start: Callable[..., Served]) -> None:
    served = start()
    first = held(served)
    others = [served.submit(n) for n in range(10, 22)]
    eventually(lambda: served.model._batcher.queued_rows == 8)
    time.sleep(0.05)
    assert served.model._batcher.queued_rows == 8
    served.session.gate.set()
    assert first.answered()
    assert all(other.answered() for other in others)


def test_one_that_fails_takes_nobody_with_it(start: Callable[..., Served]) -> None:
    served = start()
    first = held(served)
    others = [served.submit(n) for n in (10, POISON, 12, 13)]
    later = [served.submit(n) for n in (20, 21, 22, 23)]
    served.session.gate.set()
    assert first.answered()
    assert [isinstance(o.wait(), EngineFailure) for o in others] == [False, True, False, False]
    assert all(caller.answered() for caller in (others[0], *others[2:], *later))


def test_what_is_ahead_is_answered_before_the_end(start: Callable[..., Served]) -> None:
    served = start()
    first = held(served)
    others = [served.submit(n) for n in (10, 11, 12, 13)]
    eventually(lambda: not served.engines[0]._free)
    closing = threading.Thread(target=served.model.close)
    closing.start()
    eventually(lambda: served.model._stopping)
    served.session.gate.set()
    closing.join(WAIT_S)
    assert first.answered()
    assert all(other.answered() for other in others)


def test_an_engine_that_hangs_loses_both_batches_and_a_new_one_comes(start: Callable[..., Served]) -> None:
    """Those whose run hangs fail for good; those behind them may be sent again, and are served by the next engine."""
    served = start(timeout_s=0.3, slowness=1.0, first_delay_s=0.01)
    hung = held(served)
    behind = [served.submit(n) for n in (10, 11, 12, 13)]
    assert isinstance(hung.wait(), EngineFailure)
    assert all(isinstance(caller.wait(), ModelNotReady) for caller in behind)
    eventually(lambda: not served.model.down)
    assert served.submit(7).answered()
    assert len(served.engines) == 2
    served.sessions[0].gate.set()


def test_an_engine_that_was_given_up_takes_nothing_more(start: Callable[..., Served]) -> None:
    """It hung with nobody behind it; the full batch that comes later is the next engine's."""
    served = start(timeout_s=0.3, slowness=1.0, first_delay_s=0.01)
    assert isinstance(held(served).wait(), EngineFailure)
    eventually(lambda: not served.model.down)
    served.model._watch_policy = WatchPolicy(timeout_s=WAIT_S)
    first = held(served)
    others = [served.submit(n) for n in (10, 11, 12, 13)]
    eventually(lambda: served.model._batcher.queued_rows == 0)
    served.session.gate.set()
    assert first.answered()
    assert all(other.answered() for other in others)
    assert served.model.idle
    served.sessions[0].gate.set()


def test_a_batch_that_was_taken_and_not_yet_sent_is_owed(
    start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start(timeout_s=0.3, slowness=1.0, first_delay_s=0.01)
    begin = served.engines[0].begin
    hung = held(served)
    monkeypatch.setattr(served.engines[0], "begin", lambda parts: (hung.wait(), begin(parts))[1])
    behind = [served.submit(n) for n in (10, 11, 12, 13)]
    assert isinstance(hung.wait(), EngineFailure)
    assert all(isinstance(caller.wait(), ModelNotReady) for caller in behind)
    served.sessions[0].gate.set()
    eventually(lambda: not served.model.down)
    assert served.model.idle


def test_many_callers(start: Callable[..., Served]) -> None:
    served = start()
    ends: list[bool] = []

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            values = rng.integers(0, 500, rng.integers(1, 9)).tolist()
            ends.append(served.submit(*values).answered())

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)
    assert len(ends) == 240
    assert all(ends)


def test_answers_are_not_overwritten(start: Callable[..., Served]) -> None:
    served = start()
    kept: list[Arrays] = []
    done = threading.Semaphore(0)

    def keep(outputs: Arrays, _: object) -> None:
        kept.append(outputs)
        done.release()

    for n in range(20):
        served.model.submit(Job((np.full(4, n),), keep, lambda error: pytest.fail(str(error))))
    for _ in range(20):
        assert done.acquire(timeout=WAIT_S)
    assert sorted(outputs[0].tolist() for outputs in kept) == [[2 * n] * 4 for n in range(20)]
