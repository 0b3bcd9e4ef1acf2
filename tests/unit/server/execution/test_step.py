"""A thread that brings requests runs them itself: nobody waits, nobody is answered twice, whoever else is at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rafaga.errors import Draining, EngineFailure, ModelNotReady
from rafaga.server.execution.supervisor import WatchPolicy
from rafaga.server.scheduling.batcher import BatchPolicy, Decision
from tests.unit.server.execution.test_served_model import POISON, WAIT_S, Caller, Served


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.session.gate.set()
    served.model.close()


def bring(served: Served, *values: int) -> Caller:
    return served.submit(*values, may_run=True)


def test_what_was_brought_is_answered_before_step_returns(served: Served) -> None:
    callers = [bring(served, n) for n in (1, 2, 3)]
    assert served.model.step() is False
    assert [caller.ends for caller in callers] == [[[2]], [[4]], [[6]]]
    assert served.session.batches == [[1, 2, 3]]


def test_it_is_called_until_nothing_is_left(served: Served) -> None:
    callers = [bring(served, n) for n in range(20)]
    assert [served.model.step() for _ in range(3)] == [True, True, False]
    assert [caller.ends for caller in callers] == [[[2 * n]] for n in range(20)]
    assert [len(batch) for batch in served.session.batches] == [8, 8, 4]


@pytest.mark.parametrize(("row_s", "steps"), [(1e-6, True), (1e-3, False)])
def test_only_quick_models_are_run_by_others(row_s: float, steps: bool) -> None:
    served = Served(row_s=row_s)
    caller = Caller([1])
    try:
        assert served.model.submit(caller.job, may_run=True) is steps
        if steps:
            served.model.step()
        assert caller.end() == [2]
    finally:
        served.model.close()


def test_what_takes_long_is_left_to_the_engines_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is what arrives beside it, until all of it was taken: the next batch might be either."""
    parked, runners, run = threading.Event(), [], served.session.run

    def noted(*arguments: Any) -> Any:
        runners.append(threading.current_thread())
        return run(*arguments)

    monkeypatch.setattr(served.session, "run", noted)
    monkeypatch.setattr(served.model, "_let_in", lambda: parked.wait(WAIT_S))
    long = Caller([1])
    long.job.cost = 100.0
    early = Caller([2])
    assert served.model.submit(early.job, may_run=True)
    assert not served.model.submit(long.job, may_run=True)
    late = Caller([3])
    assert not served.model.submit(late.job, may_run=True)
    assert served.model.step() is False
    assert served.session.batches == []
    parked.set()
    assert [caller.end() for caller in (long, early, late)] == [[2], [4], [6]]
    assert threading.current_thread() not in runners
    quick = Caller([4])
    assert served.model.submit(quick.job, may_run=True), "all of it was taken"
    served.model.step()
    assert quick.end() == [8]


def test_without_jobs_there_is_nothing_to_do(served: Served) -> None:
    assert served.model.step() is False
    assert served.session.batches == []


def test_while_the_engines_thread_is_at_work_it_gets_the_jobs(served: Served) -> None:
    held = served.hold()
    caller = bring(served, 1)
    assert served.model.step() is False
    served.session.gate.set()
    assert (held.end(), caller.end()) == ([0], [2])


def test_while_a_step_runs_the_engines_thread_waits(served: Served) -> None:
    """Then it takes what others have woken it for."""
    served.session.gate.clear()
    mine = bring(served, 1)
    stepping = threading.Thread(target=served.model.step)
    stepping.start()
    assert served.session.started.acquire(timeout=WAIT_S)
    others = [served.submit(n) for n in (2, 3)]
    served.session.gate.set()
    stepping.join(WAIT_S)
    while served.model.step():
        pass
    assert [caller.end() for caller in (mine, *others)] == [[2], [4], [6]]
    assert served.session.batches == [[1], [2, 3]]


def test_a_job_that_makes_the_engine_fail_fails_alone(served: Served) -> None:
    callers = [bring(served, n) for n in (1, POISON, 3)]
    assert served.model.step() is False
    ends = [caller.end() for caller in callers]
    assert [ends[0], ends[2]] == [[2], [6]]
    assert isinstance(ends[1], EngineFailure)


def test_a_defect_costs_the_engine_and_not_the_thread(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take, broken = served.model._batcher.take, threading.Event()
    broken.set()

    def break_down(now: float) -> Decision:
        assert not broken.is_set()
        return take(now)

    monkeypatch.setattr(served.model._batcher, "take", break_down)
    caller = bring(served, 1)
    assert served.model.step() is False
    assert isinstance(caller.end(), ModelNotReady)
    broken.clear()
    assert served.changed.acquire(timeout=WAIT_S)
    assert served.changed.acquire(timeout=WAIT_S), "up again"
    assert bring(served, 2).end() == [4], "by its own thread from now on"
    assert "lost to a defect" in caplog.text


def test_company_is_waited_for_by_the_engines_thread() -> None:
    served = Served(policy=BatchPolicy(max_queue_delay_s=0.05, max_queue_wait_s=60))
    try:
        caller = bring(served, 1)
        assert served.model.step(pytest.fail) is False
        (shift,) = served.model._shifts
        assert shift.on_hung is None, "nothing that hangs now is the caller's"
        assert caller.end() == [2]
    finally:
        served.model.close()


def test_closing_during_a_step(served: Served) -> None:
    served.session.gate.clear()
    mine = bring(served, 1)
    stepping = threading.Thread(target=served.model.step)
    stepping.start()
    assert served.session.started.acquire(timeout=WAIT_S)
    left = bring(served, 2)
    closing = threading.Thread(target=served.model.close)
    closing.start()
    served.session.gate.set()
    stepping.join(WAIT_S)
    closing.join(WAIT_S)
    assert mine.end() == [2]
    assert isinstance(left.end(), Draining)


def test_a_step_that_hangs_is_given_up() -> None:
    """What it owes is failed, and the next request finds a new engine."""
    served = Served(watch=WatchPolicy(timeout_s=0.3, slowness=1.0, first_delay_s=0.05))
    served.session.gate.clear()
    caller = bring(served, 1)
    told = threading.Event()
    stepping = threading.Thread(target=served.model.step, args=(told.set,))
    stepping.start()
    assert isinstance(caller.end(), EngineFailure)
    assert told.is_set(), "whose thread it is finds another"
    assert served.model._stuck == [stepping]
    served.session.gate.set()
    stepping.join(WAIT_S)
    assert served.changed.acquire(timeout=WAIT_S)
    assert served.changed.acquire(timeout=WAIT_S), "up again"
    assert bring(served, 2).end() == [4], "by its own thread from now on"
    served.model.close()
