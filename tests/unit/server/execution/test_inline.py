"""The thread that submits jobs runs them itself: each is answered once, whatever other threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from rafaga.errors import Draining, EngineFailure, ModelNotReady
from rafaga.server.execution.supervisor import SupervisorPolicy
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Arrays
from tests.unit.server.execution.fakes import HANG, SOON, WAIT_S, Caller, Served, eventually


def submit(served: Served, *values: int) -> Caller:
    caller = Caller(*values)
    served.model.submit(caller.job, inline=True)
    return caller


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_the_batch_is_answered_when_run_inline_returns(served: Served) -> None:
    callers = [submit(served, n) for n in (1, 2, 3)]
    assert served.model.run_inline() is False
    assert [caller.ends for caller in callers] == [[[2]], [[4]], [[6]]]
    assert served.engine.batches == [[1, 2, 3]]


def test_it_is_called_until_nothing_is_left(served: Served) -> None:
    callers = [submit(served, n) for n in range(20, 40)]
    assert [served.model.run_inline() for _ in range(3)] == [True, True, False]
    assert all(caller.answered() for caller in callers)
    assert [len(batch) for batch in served.engine.batches] == [8, 8, 4]


@pytest.mark.parametrize(
    ("arguments", "inline"),
    [
        ({}, True),
        ({"run_s": 10e-3}, False),
        ({"count": 2}, False),
        ({"depth": 2}, True),
        ({"depth": 2, "count": 2}, False),
    ],
)
def test_which_models_run_inline(start: Callable[..., Served], arguments: dict[str, float], inline: bool) -> None:
    """Quick ones; and those with an engine that has a thread of its own are started. Not those with several engines."""
    served = start(**arguments)
    caller = Caller(1)
    assert served.model.submit(caller.job, inline=True) is inline
    if inline:
        served.model.run_inline()
    assert caller.answered()


def test_a_lone_row_is_handed_to_an_idle_engine(start: Callable[..., Served]) -> None:
    """At once, and the caller's thread does not wait for the run."""
    served = start(depth=2)
    served.engine.gate.clear()
    first = submit(served, 1)
    assert served.model.run_inline() is False
    assert served.engine.submitted == [[1]]
    second = submit(served, 2)
    assert served.model.run_inline() is False
    assert served.engine.submitted == [[1]], "it computes: its thread takes the next batch"
    served.engine.gate.set()
    assert first.answered()
    assert second.answered()


def test_several_rows_are_assembled_by_the_engines_thread(start: Callable[..., Served]) -> None:
    served = start(depth=2)
    lone = Caller(1)
    assert served.model.submit(lone.job, inline=True)
    assert not served.model.submit(Caller(2, 3).job, inline=True)
    assert served.model.run_inline() is False
    assert lone.answered()


def test_a_row_that_was_handed_over_is_answered_when_the_model_closes(start: Callable[..., Served]) -> None:
    served = start(depth=2)
    served.engine.gate.clear()
    caller = submit(served, 1)
    served.model.run_inline()
    served.model.queue.stop()
    served.engine.gate.set()
    assert caller.answered()


def test_an_engine_that_hangs_on_a_row_that_was_handed_over(start: Callable[..., Served]) -> None:
    served = start(depth=2, supervision=SOON)
    caller = submit(served, HANG)
    served.model.run_inline(pytest.fail)
    assert isinstance(caller.end(), EngineFailure)
    served.wait_until_restarted()
    assert not served.model.submit(Caller(1).job, inline=True), "the next engine may hang too"


def test_costly_jobs_are_left_to_the_engines_thread(start: Callable[..., Served]) -> None:
    """With them those that arrive meanwhile, until all were taken: the next batch might hold either."""
    runners: list[threading.Thread] = []
    served = start(policy=BatchPolicy(max_queue_delay_s=1.0, max_queue_wait_s=600.0))
    compute = served.engine.compute

    def noted(x: np.ndarray) -> Arrays:
        runners.append(threading.current_thread())
        return compute(x)

    served.engine.compute = noted  # type: ignore[method-assign]
    early, costly, late = Caller(1), Caller(2), Caller(3, 4, 5, 6, 7, 8)
    costly.job.cost = 100.0
    assert served.model.submit(early.job, inline=True)
    assert not served.model.submit(costly.job, inline=True)
    assert not served.model.submit(late.job, inline=True)
    assert served.model.run_inline() is False
    assert all(caller.answered() for caller in (costly, early, late))
    assert threading.current_thread() not in runners
    assert served.model.submit(Caller(9).job, inline=True), "all of it was taken"


def test_while_the_engines_thread_runs_a_batch_it_gets_the_jobs(served: Served) -> None:
    held = served.hold()
    caller = submit(served, 1)
    assert served.model.run_inline() is False
    served.engine.gate.set()
    assert held.answered()
    assert caller.answered()


def test_during_an_inline_run_the_engines_thread_waits(served: Served) -> None:
    """Afterwards it takes the jobs that it was woken for."""
    served.engine.gate.clear()
    mine = submit(served, 1)
    running = in_a_thread(served.model.run_inline)
    assert served.engine.started.acquire(timeout=WAIT_S)
    others = [served.submit(n) for n in (2, 3)]
    served.engine.gate.set()
    running.join(WAIT_S)
    while served.model.run_inline():
        pass
    assert all(caller.answered() for caller in (mine, *others))
    assert served.engine.batches == [[1], [2, 3]]


def test_requests_that_wait_for_more_are_left_to_the_engines_thread(start: Callable[..., Served]) -> None:
    served = start(policy=BatchPolicy(max_queue_delay_s=0.05, max_queue_wait_s=60))
    caller = submit(served, 1)
    assert served.model.run_inline(pytest.fail) is False
    assert caller.answered()


def test_closing_during_an_inline_run(served: Served) -> None:
    served.engine.gate.clear()
    mine = submit(served, 1)
    running = in_a_thread(served.model.run_inline)
    assert served.engine.started.acquire(timeout=WAIT_S)
    left = submit(served, 2)
    closing = in_a_thread(served.model.close)
    eventually(lambda: refused(served))
    served.engine.gate.set()
    running.join(WAIT_S)
    closing.join(WAIT_S)
    assert mine.answered()
    assert isinstance(left.end(), Draining)


def refused(served: Served) -> bool:
    try:
        served.submit(1)
    except Draining:
        return True
    return False


def test_an_inline_run_that_hangs_is_given_up(start: Callable[..., Served]) -> None:
    """Its jobs fail, `on_hung` is called, and the next request finds a new engine."""
    served = start(supervision=SupervisorPolicy(timeout_s=0.3, slowness=1.0, first_delay_s=0.05))
    caller = submit(served, HANG)
    hung_reported = threading.Event()
    running = in_a_thread(lambda: served.model.run_inline(hung_reported.set))
    assert isinstance(caller.end(), EngineFailure)
    assert hung_reported.is_set()
    served.engine.go_on.set()
    running.join(WAIT_S)
    eventually(lambda: not served.model.down)
    again = Caller(2)
    assert not served.model.submit(again.job, inline=True), "by its own thread from now on"
    assert again.answered()


def test_an_unhandled_exception_costs_the_engine_and_not_the_thread(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caller = submit(served, 1)
    with served.latency.broken():
        assert served.model.run_inline() is False
    assert isinstance(caller.end(), ModelNotReady)
    assert "unhandled exception" in caplog.text
    eventually(lambda: served.metric("rafaga_engine_restarts_total") == 1)
    assert served.submit(2).answered()
