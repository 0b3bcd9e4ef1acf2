"""A worker's ways besides its own thread: batches that run in the thread that submits jobs, and batches that are
submitted while another runs. Each job is answered once, whatever other threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from rafaga.errors import Draining, EngineFailure, ModelNotReady
from rafaga.server.engines.contract import PendingOutputs
from rafaga.server.execution.supervisor import SupervisorPolicy
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Part
from tests.unit.server.execution.fakes import HANG, SOON, WAIT_S, Caller, Served, eventually, in_a_thread


def submit(served: Served, *values: int) -> Caller:
    caller = Caller(*values)
    served.model.submit(caller, inline=True)
    return caller


def test_run_inline_answers_a_batch_and_is_called_until_nothing_is_left(served: Served) -> None:
    callers = [submit(served, n) for n in range(20)]
    assert served.model.run_inline() is True
    assert [caller.ends for caller in callers] == [[[2 * n]] for n in range(8)] + [[]] * 12
    assert [served.model.run_inline() for _ in range(2)] == [True, False]
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
    assert served.model.submit(caller, inline=True) is inline
    if inline:
        served.model.run_inline()
    assert caller.answered()


def test_costly_jobs_are_left_to_the_engines_thread(start: Callable[..., Served]) -> None:
    """With them those that arrive meanwhile, until all were taken: the next batch might hold either."""
    served = start(policy=BatchPolicy(max_queue_delay_s=1.0, max_queue_wait_s=600.0))
    early, costly, late = Caller(1), Caller(2), Caller(3, 4, 5, 6, 7, 8)
    costly.cost = 100.0
    assert [served.model.submit(caller, inline=True) for caller in (early, costly, late)] == [True, False, False]
    assert served.model.run_inline() is False
    assert all(caller.answered() for caller in (costly, early, late))
    assert threading.current_thread() not in served.engine.runners
    assert served.model.submit(Caller(9), inline=True), "all of it was taken"


def test_requests_that_wait_for_more_are_left_to_the_engines_thread(start: Callable[..., Served]) -> None:
    served = start(policy=BatchPolicy(max_queue_delay_s=0.05, max_queue_wait_s=60))
    caller = submit(served, 1)
    assert served.model.run_inline(pytest.fail) is False
    assert caller.answered()


def test_while_the_engines_thread_runs_a_batch_it_gets_the_jobs(served: Served) -> None:
    held = served.hold()
    caller = submit(served, 1)
    assert served.model.run_inline() is False
    served.engine.gate.set()
    assert held.answered()
    assert caller.answered()


def test_during_an_inline_run_the_engines_thread_waits(served: Served) -> None:
    """Afterwards it takes the jobs that it was woken for."""
    mine, running = held_inline(served)
    others = [served.submit(n) for n in (2, 3)]
    served.engine.gate.set()
    running.join(WAIT_S)
    while served.model.run_inline():
        pass
    assert all(caller.answered() for caller in (mine, *others))
    assert served.engine.batches == [[1], [2, 3]]


def test_closing_during_an_inline_run(served: Served) -> None:
    mine, running = held_inline(served)
    left = submit(served, 2)
    closing = in_a_thread(served.model.close)
    eventually(lambda: served.model.queue.stopping)
    served.engine.gate.set()
    running.join(WAIT_S)
    closing.join(WAIT_S)
    assert mine.answered()
    assert isinstance(left.end(), Draining)


def held_inline(served: Served) -> tuple[Caller, threading.Thread]:
    """Closes the engine's gate; a thread of the test is in a run of one row."""
    served.engine.gate.clear()
    caller = submit(served, 1)
    running = in_a_thread(served.model.run_inline)
    assert served.engine.started.acquire(timeout=WAIT_S)
    return caller, running


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
    assert not served.model.submit(again, inline=True), "by its own thread from now on"
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


@pytest.fixture
def pipelined(start: Callable[..., Served]) -> Served:
    """Its engine prepares the next batch while one runs."""
    return start(depth=2, batch=4)


def test_a_lone_row_is_handed_to_an_idle_engine(pipelined: Served) -> None:
    """At once, and the caller's thread does not wait for the run."""
    pipelined.engine.gate.clear()
    first = submit(pipelined, 1)
    assert pipelined.model.run_inline() is False
    assert pipelined.engine.submitted == [[1]]
    second = submit(pipelined, 2)
    assert pipelined.model.run_inline() is False
    assert pipelined.engine.submitted == [[1]], "it computes: its thread takes the next batch"
    pipelined.engine.gate.set()
    assert first.answered()
    assert second.answered()


def test_several_rows_are_assembled_by_the_engines_thread(pipelined: Served) -> None:
    lone = Caller(1)
    assert pipelined.model.submit(lone, inline=True)
    assert not pipelined.model.submit(Caller(2, 3), inline=True)
    assert pipelined.model.run_inline() is False
    assert lone.answered()


def test_a_row_that_was_handed_over_is_answered_when_the_model_closes(pipelined: Served) -> None:
    pipelined.engine.gate.clear()
    caller = submit(pipelined, 1)
    pipelined.model.run_inline()
    pipelined.model.queue.stop()
    pipelined.engine.gate.set()
    assert caller.answered()


def test_an_engine_that_hangs_on_a_row_that_was_handed_over(start: Callable[..., Served]) -> None:
    served = start(depth=2, supervision=SOON)
    caller = submit(served, HANG)
    served.model.run_inline(pytest.fail)
    assert isinstance(caller.end(), EngineFailure)
    served.wait_until(down=True)
    served.wait_until(down=False)
    assert not served.model.submit(Caller(1), inline=True), "the next engine may hang too"


def test_one_full_batch_is_submitted_while_another_runs(pipelined: Served) -> None:
    callers = [pipelined.hold(), *(pipelined.submit(n) for n in range(20, 32))]
    eventually(lambda: pipelined.engine.submitted == [[0], [20, 21, 22, 23]])
    assert pipelined.engine.batches == [[0]], "it waits behind the one that runs"
    assert pipelined.queued_rows == 8
    pipelined.engine.gate.set()
    assert all(caller.answered() for caller in callers)


def test_a_batch_that_is_not_full_is_left_to_grow(pipelined: Served) -> None:
    callers = [pipelined.hold(), *(pipelined.submit(n) for n in (10, 11, 12))]
    assert pipelined.engine.submitted == [[0]]
    callers += [pipelined.submit(14), pipelined.submit(15)]
    eventually(lambda: pipelined.queued_rows == 1)
    pipelined.engine.gate.set()
    assert all(caller.answered() for caller in callers)
    assert pipelined.engine.batches == [[0], [10, 11, 12, 14], [15]]


def test_a_batch_ahead_is_answered_before_the_end(pipelined: Served) -> None:
    callers = [pipelined.hold(), *(pipelined.submit(n) for n in (10, 11, 12, 14))]
    eventually(lambda: len(pipelined.engine.submitted) == 2)
    closing = in_a_thread(pipelined.model.close)
    pipelined.engine.gate.set()
    closing.join(WAIT_S)
    assert all(caller.answered() for caller in callers)


@pytest.mark.parametrize("late", [False, True])
def test_an_engine_that_hangs_loses_both_batches(start: Callable[..., Served], late: bool) -> None:
    """Clients must not retry the run that hangs. They may retry the batch behind it, and the next engine serves it.

    `late`: that batch was taken, and not yet submitted.
    """
    served = start(depth=2, batch=4, supervision=SupervisorPolicy(timeout_s=0.3, slowness=1.0, first_delay_s=0.01))
    hung, entered, submit = served.hang(), threading.Event(), served.engine.submit

    def submit_late(rows: Sequence[Part]) -> PendingOutputs:
        entered.set()
        assert not late or hung.done.wait(WAIT_S)
        return submit(rows)

    served.engine.submit = submit_late  # type: ignore[method-assign]
    behind = [served.submit(n) for n in (10, 11, 12, 14)]
    assert entered.wait(WAIT_S)
    assert isinstance(hung.end(), EngineFailure)
    assert all(isinstance(caller.end(), ModelNotReady) for caller in behind)
    eventually(lambda: not served.model.down)
    assert served.submit(7).answered()
    assert len(served.all_engines) == 2
