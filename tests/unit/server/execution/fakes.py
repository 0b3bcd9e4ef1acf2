"""A model whose engines double their inputs when the test lets them, and callers that keep what they are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from rafaga.bundle import TensorSpec
from rafaga.errors import RafagaError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.batched import Completed, assemble, failed
from rafaga.server.engines.contract import PendingOutputs
from rafaga.server.engines.loading import Samples
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import SupervisorPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job, JobTiming, Part
from rafaga.server.scheduling.latency import LatencyTable, buckets_up_to

WAIT_S = 60.0
HANG, POISON = -13, -666
SPEC = (TensorSpec(name="x", dtype="int64", shape=(None,)),)
SOON = SupervisorPolicy(timeout_s=0.1, slowness=1.0, first_delay_s=0.02)


class FakeEngine:
    """Doubles its input while `gate` is open; hangs on HANG until `go_on`; fails on POISON, and on everything once
    `broken`."""

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.gate, self.go_on, self.hanging = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.submitted: list[list[int]] = []
        self.batches: list[list[int]] = []
        self.runners: set[threading.Thread] = set()
        self.broken = self.closed = False
        self._executor = ThreadPoolExecutor(1)

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        (x,) = assemble(rows)
        self.submitted.append(x.tolist())
        if self.depth > 1:
            return self._executor.submit(self.compute, x)
        try:
            return Completed(self.compute(x))
        except Exception as error:
            return failed(error)

    def compute(self, x: np.ndarray) -> Arrays:
        self.batches.append(x.tolist())
        self.runners.add(threading.current_thread())
        self.started.release()
        assert self.gate.wait(WAIT_S)
        if (x == HANG).any():
            self.hanging.set()
            assert self.go_on.wait(WAIT_S)
        if self.broken or (x == POISON).any():
            raise RuntimeError("Non-zero status code: /secret/path")
        return (x * 2,)

    def terminate(self) -> None:
        """A run that hangs does not notice."""

    def close(self, timeout_s: float = 10.0) -> bool:
        self.closed = True
        self._executor.shutdown(wait=False)
        return True


class FakeLatency(LatencyTable):
    """Predicts as a LatencyTable, or raises: a defect in the scheduling."""

    _broken = False

    @contextmanager
    def broken(self) -> Iterator[None]:
        self._broken = True
        yield
        self._broken = False

    def predict(self, rows: int, cost: float = 1.0) -> float:
        if self._broken:
            raise ZeroDivisionError
        return super().predict(rows, cost)


class Caller(Job):
    """A job of one caller; `ends` are the calls of its callbacks."""

    def __init__(self, *values: int, deadline: float = float("inf")) -> None:
        super().__init__((np.array(values),), self._succeed, self._finish, deadline)
        self.values = values
        self.ends: list[list[int] | RafagaError] = []
        self.done = threading.Event()

    def _succeed(self, outputs: Arrays, _: JobTiming) -> None:
        self._finish(outputs[0].tolist())

    def _finish(self, end: list[int] | RafagaError) -> None:
        self.ends.append(end)
        self.done.set()

    def end(self) -> list[int] | RafagaError:
        assert self.done.wait(WAIT_S), "no answer and no error"
        (end,) = self.ends
        return end

    def answered(self) -> bool:
        return self.end() == [2 * value for value in self.values]


class Served:
    """A model with `count` engines. refusing: what a restart fails with. restarts: an open gate lets them go on."""

    def __init__(
        self,
        count: int = 1,
        depth: int = 1,
        batch: int = 8,
        run_s: float = 1e-3,
        policy: BatchPolicy | None = None,
        supervision: SupervisorPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engines = [FakeEngine(depth) for _ in range(count)]
        self.all_engines = self.engines[:]
        self.refusing: dict[int, Exception] = {}
        self.restarts = threading.Event()
        self.restarts.set()
        self.asked = threading.Semaphore(0)  # how often an engine was to be restarted
        self.changed = threading.Semaphore(0)  # how often `down` or `unrecoverable` has changed
        self.metrics = Metrics()
        buckets = buckets_up_to(batch)
        self.latency = FakeLatency(buckets, [run_s] * len(buckets))
        self.model = ServedModel(
            PlainModel("doubler", 1, SPEC, SPEC, batch),
            Runtime(),
            self.engines,
            self.latency,
            policy or BatchPolicy(max_queue_wait_s=600.0),
            self.metrics.model("doubler"),
            Samples((np.zeros(1, np.int64),)),
            self.load,
            supervision,
            clock,
        )
        self.model.start(self.changed.release)

    def load(self, number: int) -> FakeEngine:
        self.asked.release()
        assert self.restarts.wait(WAIT_S)
        if number in self.refusing:
            raise self.refusing[number]
        self.engines[number] = FakeEngine(self.engines[number].depth)
        self.all_engines.append(self.engines[number])
        return self.engines[number]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[0]

    def submit(self, *values: int, deadline: float = float("inf")) -> Caller:
        caller = Caller(*values, deadline=deadline)
        self.model.submit(caller)
        return caller

    def hold(self) -> Caller:
        """Closes the engine's gate, and waits until it is in a run of one row."""
        self.engine.gate.clear()
        caller = self.submit(0)
        assert self.engine.started.acquire(timeout=WAIT_S)
        return caller

    def hang(self) -> Caller:
        caller = self.submit(HANG)
        assert self.engine.hanging.wait(WAIT_S)
        return caller

    def wait_until(self, *, down: bool) -> None:
        assert self.changed.acquire(timeout=WAIT_S)
        assert self.model.down is down

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"model": "doubler", **labels})

    @property
    def queued_rows(self) -> float | None:
        return self.metric("rafaga_queue_rows")

    def end(self) -> None:
        self.restarts.set()
        for engine in self.all_engines:
            engine.gate.set()
            engine.go_on.set()
        self.model.close()


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
