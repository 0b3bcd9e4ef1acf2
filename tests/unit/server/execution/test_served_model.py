"""ServedModel with a pretended engine: whoever was accepted is answered or failed, once, whatever happens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest

from rafaga.bundle import TensorSpec
from rafaga.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailure,
    InternalError,
    ModelNotReady,
    RafagaError,
    Refused,
)
from rafaga.plain_model import PlainModel
from rafaga.server.engines.onnxruntime import Engine, Samples
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import WatchPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.scheduling.batcher import BatchPolicy, Decision
from rafaga.server.scheduling.job import Arrays, Job, JobTiming
from rafaga.server.scheduling.latency import LatencyTable

POISON = 666
SPEC = (TensorSpec(name="x", dtype="int64", shape=(None,)),)
WAIT_S = 30.0


class FakeSession:
    """Doubles its input, when it is let; fails on POISON."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def run(self, output_names: object, input_feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        x = input_feed["x"]
        self.batches.append(x.tolist())
        self.started.release()
        assert self.gate.wait(WAIT_S)
        if (x == POISON).any():
            raise RuntimeError("Non-zero status code: /secret/path")
        return [x * 2]


class Caller:
    """One job; `ends` are the calls of its callbacks."""

    def __init__(self, values: list[int], deadline: float = float("inf")) -> None:
        self.values = values
        self.ends: list[list[int] | RafagaError] = []
        self.done = threading.Event()
        self.job = Job((np.array(values),), self.succeed, self.fail, deadline)

    def succeed(self, outputs: Arrays, _: JobTiming) -> None:
        self.ends.append(outputs[0].tolist())
        self.done.set()

    def fail(self, error: RafagaError) -> None:
        self.ends.append(error)
        self.done.set()

    def end(self) -> list[int] | RafagaError:
        assert self.done.wait(WAIT_S), "forgotten"
        (end,) = self.ends
        return end


class Served:
    def __init__(
        self, batch: int = 8, policy: BatchPolicy | None = None, row_s: float = 1e-6, watch: WatchPolicy | None = None
    ) -> None:
        self.session = FakeSession()
        self.metrics = Metrics()
        described = PlainModel("doubler", 1, SPEC, SPEC, batch)
        sizes = [b for b in (1, 2, 4, 8) if b <= batch]
        latency = LatencyTable(sizes, [1e-3 + b * row_s for b in sizes])
        samples = Samples((np.zeros(1, np.int64),))
        self.engines = 0
        metrics = self.metrics.model("doubler")

        def engine() -> Engine:
            self.engines += 1
            return Engine(described, self.session)

        policy = policy or BatchPolicy(max_queue_wait_s=60)
        self.model = ServedModel(
            described, None, [engine()], latency, policy, metrics, samples, lambda _: engine(), watch
        )
        self.changed = threading.Semaphore(0)  # how often `down` has changed
        self.model.start(self.changed.release)

    def submit(self, *values: int, deadline: float = float("inf"), may_run: bool = False) -> Caller:
        caller = Caller(list(values), deadline)
        self.model.submit(caller.job, may_run=may_run)
        return caller

    def hold(self) -> Caller:
        """Closes the engine's gate and waits until it is in a run with one row."""
        self.session.gate.clear()
        caller = self.submit(0)
        assert self.session.started.acquire(timeout=WAIT_S)
        return caller

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"model": "doubler", **labels})


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.session.gate.set()
    served.model.close()


def test_a_lone_job_is_answered(served: Served) -> None:
    assert served.submit(1, 2).end() == [2, 4]


def test_jobs_that_arrive_during_a_run_share_the_next_batch(served: Served) -> None:
    held = served.hold()
    callers = [served.submit(n) for n in (1, 2, 3)]
    served.session.gate.set()
    assert [c.end() for c in (held, *callers)] == [[0], [2], [4], [6]]
    assert served.session.batches == [[0], [1, 2, 3]]


def test_a_job_larger_than_a_batch(served: Served) -> None:
    assert served.submit(*range(20)).end() == [2 * n for n in range(20)]
    assert [len(b) for b in served.session.batches] == [8, 8, 4]


def test_a_job_that_makes_the_engine_fail_fails_alone(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    held = served.hold()
    callers = [served.submit(n) for n in (1, 2, POISON, 4, 5)]
    served.session.gate.set()
    held.end()
    ends = [c.end() for c in callers]
    assert [ends[0], ends[1], ends[3], ends[4]] == [[2], [4], [8], [10]]
    assert isinstance(ends[2], EngineFailure)
    assert "secret" not in str(ends[2])
    assert served.metric("rafaga_engine_failures_total") == 1
    assert served.submit(7).end() == [14], "the engine goes on"
    assert [r.message for r in caplog.records] == ["a batch failed"], "said once"


def test_all_jobs_of_a_batch_may_fail(served: Served) -> None:
    held = served.hold()
    callers = [served.submit(POISON) for _ in range(5)]
    served.session.gate.set()
    held.end()
    assert all(isinstance(c.end(), EngineFailure) for c in callers)


def test_a_large_job_fails_as_a_whole(served: Served) -> None:
    """Its second part fails; the third is not computed any more."""
    caller = served.submit(*range(8), POISON, *range(9, 40))
    assert isinstance(caller.end(), EngineFailure)
    assert served.submit(1).end() == [2]
    # Before the job is blamed, the engine runs its own sample.
    assert [len(b) for b in served.session.batches] == [8, 8, 1, 1]


def test_a_model_that_answers_fewer_rows_than_asked(served: Served) -> None:
    """Waiting for the missing rows would be for ever."""
    served.session.run = lambda _, feed, __: [feed["x"][:1]]  # type: ignore[method-assign]
    assert served.submit(1).end() == [1]
    assert isinstance(served.submit(1, 2).end(), EngineFailure)


def test_a_reply_that_cannot_be_built(served: Served) -> None:
    """The caller is told, and the others of the batch have their answers."""
    held = served.hold()
    before, broken, after = Caller([1]), Caller([2]), Caller([3])

    def break_down(*_: object) -> None:
        raise ZeroDivisionError

    broken.job.on_success = break_down
    for caller in (before, broken, after):
        served.model.submit(caller.job)
    served.session.gate.set()
    held.end()
    assert isinstance(broken.end(), InternalError)
    assert (before.end(), after.end()) == ([2], [6])


@pytest.mark.parametrize("way", ["answered", "failed", "dropped"])
def test_callbacks_that_raise_do_not_end_the_engine(served: Served, way: str) -> None:
    held = served.hold()
    deadline = time.monotonic() + (0.6 if way == "dropped" else WAIT_S)
    broken = Caller([POISON if way == "failed" else 1], deadline)

    def break_down(*_: object) -> None:
        broken.done.set()
        raise ZeroDivisionError

    broken.job.on_success = broken.job.on_failure = break_down
    served.model.submit(broken.job)
    if way == "dropped":
        time.sleep(max(0.0, deadline - time.monotonic()))
    served.session.gate.set()
    held.end()
    assert broken.done.wait(WAIT_S)
    assert served.submit(7).end() == [14]


def test_a_deadline_that_passes_in_the_queue(served: Served) -> None:
    held = served.hold()
    deadline = time.monotonic() + 0.6
    late = served.submit(1, deadline=deadline)
    time.sleep(max(0.0, deadline - time.monotonic()))
    served.session.gate.set()
    held.end()
    assert isinstance(late.end(), DeadlineExceeded)
    assert served.session.batches == [[0]], "nothing was computed for it"
    assert served.metric("rafaga_dropped_total", cause="deadline") == 1


def test_a_cancelled_job_is_not_computed(served: Served) -> None:
    held = served.hold()
    gone, stays = served.submit(1), served.submit(2)
    served.model.cancel(gone.job)
    served.model.cancel(gone.job)
    served.session.gate.set()
    assert (held.end(), stays.end()) == ([0], [4])
    assert served.session.batches == [[0], [2]]
    assert gone.ends == []
    assert served.metric("rafaga_dropped_total", cause="cancelled") == 1


def test_a_job_cancelled_while_it_runs(served: Served) -> None:
    held = served.hold()
    served.model.cancel(held.job)
    served.session.gate.set()
    assert served.submit(1).end() == [2]
    assert held.ends == []
    assert served.metric("rafaga_dropped_total", cause="cancelled") is None, "it was computed"


def test_cancelled_jobs_are_left_out_when_a_failed_batch_is_halved(served: Served) -> None:
    held = served.hold()
    callers = [served.submit(n) for n in (1, POISON, 3, 4)]
    gone = callers[3]
    run = served.session.run

    def cancel_then_run(names: object, feed: dict[str, np.ndarray], _: object) -> list[np.ndarray]:
        if len(feed["x"]) == 4:
            served.model.cancel(gone.job)
        return run(names, feed)

    served.session.run = cancel_then_run  # type: ignore[method-assign]
    served.session.gate.set()
    held.end()
    assert (callers[0].end(), callers[2].end()) == ([2], [6])
    assert gone.ends == []
    assert served.session.batches[1:] == [[1, POISON, 3, 4], [1, POISON], [1], [POISON], [3]]


def test_draining_answers_what_is_queued_and_refuses_the_rest(served: Served) -> None:
    held = served.hold()
    queued = served.submit(1)
    served.model.drain()
    with pytest.raises(Draining):
        served.submit(2)
    served.session.gate.set()
    assert (held.end(), queued.end()) == ([0], [2])


def test_closing_finishes_the_run_and_refuses_what_is_queued(served: Served) -> None:
    held = served.hold()
    queued = served.submit(1)
    closing = threading.Thread(target=served.model.close)
    closing.start()
    served.session.gate.set()
    closing.join(WAIT_S)
    assert held.end() == [0]
    assert isinstance(queued.end(), Draining)
    with pytest.raises(Draining):
        served.submit(2)


def test_closing_behind_an_engine_that_hangs_refuses_what_is_queued(served: Served) -> None:
    served.hold()
    queued = served.submit(1)
    served.model.close(timeout_s=0.05)
    assert isinstance(queued.end(), Draining)


def test_a_model_that_was_never_started_can_be_closed() -> None:
    served = Served()
    served.model.close()
    idle = ServedModel(
        served.model.bundle,
        None,
        [Engine(served.model.bundle, served.session)],
        LatencyTable((1,), (1e-3,)),
        BatchPolicy(),
        served.metrics.model("doubler"),
        Samples((np.zeros(1, np.int64),)),
        lambda _: Engine(served.model.bundle, served.session),
    )
    idle.close()


def test_an_engine_thread_that_dies_leaves_nobody_waiting(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect of the scheduling itself: what was accepted is failed, what comes is refused, until it works again."""
    held = served.hold()
    queued = served.submit(1)
    take, broken = served.model._batcher.take, threading.Event()
    broken.set()

    def break_down(now: float) -> Decision:
        assert not broken.is_set()
        return take(now)

    monkeypatch.setattr(served.model._batcher, "take", break_down)
    served.session.gate.set()
    assert held.end() == [0]
    assert isinstance(queued.end(), ModelNotReady)
    with pytest.raises(ModelNotReady):
        served.submit(2)
    assert logging.CRITICAL in {record.levelno for record in caplog.records}
    broken.clear()
    for _ in ("lost", "renewed"):
        assert served.changed.acquire(timeout=WAIT_S)
    assert served.submit(2).end() == [4]


def test_letting_requests_in_ends_with_a_full_batch(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that grows whenever the engine's thread gives way must not keep it from the first batch for ever."""
    held = served.hold()
    callers = [served.submit(1)]
    yields = 0

    def another_arrives() -> None:
        nonlocal yields
        yields += 1
        assert yields < 100
        callers.append(served.submit(1))

    monkeypatch.setattr("os.sched_yield", another_arrives)
    served.session.gate.set()
    held.end()
    assert callers[0].end() == [2]
    assert yields <= 8
    monkeypatch.undo()
    assert all(c.end() == [2] for c in callers)


def test_predictions_learn_from_what_a_batch_really_takes(served: Served) -> None:
    """Answering counts: it keeps the engine from the next batch as much as computing does."""
    before = served.model._batcher.latency.predict(1)
    slow = Caller([1])
    answered = slow.job.on_success

    def answer_slowly(*end: object) -> None:
        time.sleep(0.05)
        answered(*end)  # type: ignore[arg-type]

    slow.job.on_success = answer_slowly
    served.model.submit(slow.job)
    slow.end()
    served.submit(1).end()
    assert served.model._batcher.latency.predict(1) > before


@pytest.mark.parametrize(
    ("batch", "shapes", "sized_by", "size"),
    [
        (8, [(None,), (None, 4)], 0, 1),  # none of them: one is as good as another
        (8, [(None, 4), (None, None), (None, 2, None)], 2, 6),
        (0, [(4,), (None,)], 1, 3),
    ],
    ids=["fixed", "free", "without batches"],
)
def test_the_cost_of_a_row_is_told_by_the_largest_input_of_any_size(
    batch: int, shapes: list[tuple[int | None, ...]], sized_by: int, size: int
) -> None:
    specs = tuple(TensorSpec(name=f"x{i}", dtype="int64", shape=shape) for i, shape in enumerate(shapes))
    described = PlainModel("many", 1, specs, SPEC, batch)
    rows = [np.zeros((1, *(n or 3 for n in (shape[1:] if batch else shape))), np.int64) for shape in shapes]
    samples, metrics = Samples(tuple(rows)), Metrics().model("many")
    engine = Engine(described, FakeSession())
    model = ServedModel(
        described, None, [engine], LatencyTable([1], [1.0]), BatchPolicy(), metrics, samples, lambda _: engine
    )
    assert (model.sized_by, model.reference_size) == (sized_by, size)


def test_load_figures(served: Served) -> None:
    assert served.metric("rafaga_queue_rows") == 0
    assert served.model.predicted_wait_s() == 0.0
    assert served.model.capacity_rows_per_s() > 0
    held = served.hold()
    served.submit(*range(24))
    assert served.metric("rafaga_queue_rows") == 24
    assert served.model.predicted_wait_s() > 0.0
    assert not served.model.idle
    served.session.gate.set()
    held.end()


@pytest.mark.parametrize("seed", range(3))
def test_everybody_is_answered_once_under_load(seed: int) -> None:
    """Eight threads submit, cancel and send poison while the engine runs, and the model closes under them."""
    served = Served(policy=BatchPolicy(max_queue_wait_s=60, max_queue_jobs=64))
    callers: list[Caller] = []
    cancelled: set[Caller] = set()
    refused = 0
    lock = threading.Lock()

    def ask(seed: int) -> None:
        nonlocal refused
        rng = Random(seed)
        for n in range(150):
            values = [
                POISON if rng.random() < 0.05 else rng.randrange(100) for _ in range(rng.choice((1, 1, 1, 3, 12)))
            ]
            deadline = rng.choice((float("inf"), time.monotonic() + rng.random() / 50))
            caller = Caller(values, deadline)
            try:
                served.model.submit(caller.job)
            except (Refused, DeadlineExceeded):
                assert caller.ends == []
                with lock:
                    refused += 1
                continue
            with lock:
                callers.append(caller)
            if rng.random() < 0.2:
                served.model.cancel(caller.job)
                with lock:
                    cancelled.add(caller)
            if n % 10 == 9:
                caller.done.wait(0.01)

    threads = [threading.Thread(target=ask, args=(100 * seed + n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads[:4]:
        thread.join()
    served.model.close()
    for thread in threads[4:]:
        thread.join()

    assert len(callers) + refused == 8 * 150
    for caller in callers:
        if caller in cancelled:
            assert len(caller.ends) <= 1
        else:
            end = caller.end()
            if POISON in caller.values:
                assert isinstance(end, RafagaError)
            elif not isinstance(end, RafagaError):
                assert end == [2 * v for v in caller.values]
            else:
                assert isinstance(end, Draining | DeadlineExceeded)
    assert served.model.idle
