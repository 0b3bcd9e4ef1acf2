"""ServedModel with fake engines: every job that was accepted is answered or failed, once, whatever happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
import pytest

from rafaga.bundle import TensorSpec
from rafaga.errors import DeadlineExceeded, Draining, InternalError, ModelNotReady, RafagaError, Refused
from rafaga.plain_model import PlainModel
from rafaga.server.engines.loading import Samples
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.latency import LatencyTable
from tests.unit.server.execution.fakes import (
    POISON,
    SPEC,
    WAIT_S,
    Caller,
    FakeEngine,
    Served,
    eventually,
    in_a_thread,
)


def test_a_reply_that_cannot_be_built(served: Served) -> None:
    """Its caller gets an error, and the others of the batch have their answers."""
    held = served.hold()
    before, broken, after = Caller(1), Caller(2), Caller(3)

    def break_down(*_: object) -> None:
        raise ZeroDivisionError

    broken.on_success = break_down
    for caller in (before, broken, after):
        served.model.submit(caller)
    served.engine.gate.set()
    assert isinstance(broken.end(), InternalError)
    assert all(caller.answered() for caller in (held, before, after))


@pytest.mark.parametrize("how", ["answered", "failed", "dropped"])
def test_callbacks_that_raise_do_not_end_the_engine(served: Served, how: str) -> None:
    held = served.hold()
    deadline = time.monotonic() + (0.6 if how == "dropped" else WAIT_S)
    broken = Caller(POISON if how == "failed" else 1, deadline=deadline)

    def break_down(*_: object) -> None:
        broken.done.set()
        raise ZeroDivisionError

    broken.on_success = broken.on_failure = break_down
    served.model.submit(broken)
    if how == "dropped":
        time.sleep(max(0.0, deadline - time.monotonic()))
    served.engine.gate.set()
    assert held.answered()
    assert broken.done.wait(WAIT_S)
    assert served.submit(7).answered()


def test_closing_finishes_the_run_and_refuses_what_is_queued(served: Served) -> None:
    held = served.hold()
    queued = served.submit(1)
    closing = in_a_thread(served.model.close)
    served.engine.gate.set()
    closing.join(WAIT_S)
    assert held.answered()
    assert isinstance(queued.end(), Draining)
    with pytest.raises(Draining):
        served.submit(2)


def test_an_engine_thread_that_dies_leaves_no_job_unanswered(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """A defect in the scheduling: accepted jobs fail, later ones are refused, until a restart helps."""
    held = served.hold()
    queued = served.submit(1)
    served.restarts.clear()
    with served.latency.broken():
        served.engine.gate.set()
        assert isinstance(queued.end(), ModelNotReady)
    held.end()
    with pytest.raises(ModelNotReady):
        served.submit(2)
    assert logging.CRITICAL in {record.levelno for record in caplog.records}
    served.restarts.set()
    eventually(lambda: not served.model.down)
    assert served.submit(2).answered()


def test_yielding_to_submitters_ends_with_a_full_batch(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that grows whenever the engine's thread yields must not delay its first batch forever."""
    callers = [served.hold(), served.submit(1)]

    def another_arrives() -> None:
        assert len(callers) < 100
        callers.append(served.submit(1))

    monkeypatch.setattr("os.sched_yield", another_arrives)
    served.engine.gate.set()
    assert callers[1].answered()
    assert len(callers) <= 2 + 8
    monkeypatch.undo()
    assert all(caller.answered() for caller in callers)


def test_predictions_learn_from_what_a_batch_really_takes(served: Served) -> None:
    """Answering counts: it keeps the engine from the next batch as much as computing does."""
    before = served.latency.predict(1)
    slow = Caller(1)
    answered = slow.on_success

    def answer_slowly(*end: object) -> None:
        time.sleep(0.05)
        answered(*end)  # type: ignore[arg-type]

    slow.on_success = answer_slowly
    served.model.submit(slow)
    slow.end()
    served.submit(1).end()
    assert served.latency.predict(1) > before


@pytest.mark.parametrize(
    ("batch", "shapes", "sized_by", "size"),
    [
        (8, [(None,), (None, 4)], None, 1),
        (8, [(None, 4), (None, None), (None, 2, None)], 2, 6),
        (0, [(4,), (None,)], 1, 3),
    ],
    ids=["fixed", "free", "without batches"],
)
def test_the_largest_input_of_free_size_decides_the_cost_of_a_row(
    batch: int, shapes: list[tuple[int | None, ...]], sized_by: int | None, size: int
) -> None:
    specs = tuple(TensorSpec(name=f"x{i}", dtype="int64", shape=shape) for i, shape in enumerate(shapes))
    rows = [np.zeros((1, *(n or 3 for n in (shape[1:] if batch else shape))), np.int64) for shape in shapes]
    model = ServedModel(
        PlainModel("many", 1, specs, SPEC, batch),
        Runtime(),
        [engine := FakeEngine()],
        LatencyTable([1], [1.0]),
        BatchPolicy(),
        Metrics().model("many"),
        Samples(tuple(rows)),
        lambda _: engine,
    )
    assert (model.sized_by, model.reference_size) == (sized_by, size)
    model.close()  # though it was never started
    assert engine.closed


@pytest.mark.parametrize(("seed", "count", "depth"), [(0, 1, 1), (1, 1, 2), (2, 2, 1)])
def test_each_job_is_answered_once_under_load(start: Callable[..., Served], seed: int, count: int, depth: int) -> None:
    """Eight threads submit, cancel and send poison while the engines run, and the model closes meanwhile."""
    served = start(count=count, depth=depth, policy=BatchPolicy(max_queue_wait_s=60, max_queue_jobs=64))
    accepted: list[Caller] = []  # lists, because appending needs no lock
    refused: list[Caller] = []
    cancelled: list[Caller] = []

    def ask(seed: int) -> None:
        rng = Random(seed)
        for n in range(150):
            count = rng.choice((1, 1, 1, 3, 12))
            values = [POISON if rng.random() < 0.05 else 20 + rng.randrange(100) for _ in range(count)]
            caller = Caller(*values, deadline=rng.choice((float("inf"), time.monotonic() + rng.random() / 50)))
            try:
                served.model.submit(caller)
            except (Refused, DeadlineExceeded):
                assert caller.ends == []
                refused.append(caller)
                continue
            accepted.append(caller)
            if rng.random() < 0.2:
                served.model.cancel(caller)
                cancelled.append(caller)
            if n % 10 == 9:
                caller.done.wait(0.01)

    threads = [in_a_thread(partial(ask, 100 * seed + n)) for n in range(8)]
    for thread in threads[:4]:
        thread.join()
    served.model.close()
    for thread in threads[4:]:
        thread.join()

    assert len(accepted) + len(refused) == 8 * 150
    assert all(len(caller.ends) <= 1 for caller in cancelled)
    for caller in set(accepted) - set(cancelled):
        if POISON in caller.values:
            assert isinstance(caller.end(), RafagaError)
        else:
            assert isinstance(caller.end(), Draining | DeadlineExceeded) or caller.answered()
    assert served.model.idle
