"""The loops on a virtual clock: what is sent when, and what a stall of the server does to the figures of each."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rafaga.load.figures import Figures, Objective
from rafaga.load.generator import Caller, CallFailed, closed_loop, open_loop
from rafaga.load.log import NOT_SENT, OK, Log, Reply
from rafaga.load.schedule import Pattern
from rafaga.load.steps import Step
from rafaga.load.tally import Tally

STALL = ((5.0, 6.0),)


class Clock(selectors.SelectSelector):
    """Jumps to an event loop's next timer instead of waiting for it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "deadlock: no timer is set"
            self.now_s += max(timeout, 0.0)
        return ready


class FakeServer:
    """Answers after `service_s` as many at once as come. In a stall (begin, end) no answer comes before the end.

    `fails`: the reason with which the n-th call fails, or None.
    """

    def __init__(
        self,
        service_s: float = 0.005,
        stalls: Sequence[tuple[float, float]] = (),
        fails: Callable[[int], str | None] = lambda call: None,
    ) -> None:
        self._service_s = service_s
        self._stalls = stalls
        self._fails = fails
        self.clock = Clock()
        self.sent_s: list[float] = []
        self.timeouts_s: list[float] = []

    async def __call__(self, request: int, timeout_s: float) -> Reply:
        reason = self._fails(len(self.sent_s))
        now = self.clock.now_s
        self.sent_s.append(now)
        self.timeouts_s.append(timeout_s)
        done = now + self._service_s
        for begin, end in self._stalls:
            if begin <= done < end:
                done = end
        if done > now + timeout_s:
            done, reason = now + timeout_s, "DEADLINE_EXCEEDED"
        await asyncio.sleep(done - now)
        if reason:
            raise CallFailed(reason)
        return Reply(100, 0, 4900, 4)


def tally(step: Step, server: FakeServer, deadline_s: float = 10.0, max_outstanding: int = 10_000) -> Tally:
    log = Log()

    async def send() -> None:
        caller = Caller(server, log, step.warm_up_s, deadline_s)
        if step.open:
            await open_loop(caller, step.schedule([1.0]), max_outstanding)
        else:
            await closed_loop(caller, step.callers, [0], step.duration_s)

    loop = asyncio.SelectorEventLoop(server.clock)
    loop.time = lambda: server.clock.now_s  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(send())
    counted = Tally(1.0)
    counted.add(log.take(), step.duration_s, ["digits"])
    return counted


def figures(step: Step, counted: Tally, objective: Objective | None = None) -> Figures:
    return Figures.of(step, counted, (), objective)


@pytest.mark.parametrize("pattern", [Pattern.POISSON, Pattern.CONSTANT])
def test_a_stall_shows_in_the_p99_of_the_open_loop(pattern: Pattern) -> None:
    """Ten seconds, one of them stalled: a tenth of the requests fell into it and waited half a second on average."""
    step = Step(pattern, rate=100, duration_s=10)
    found = figures(step, tally(step, FakeServer(stalls=STALL)))
    assert found.latency.p50_ms == pytest.approx(5, rel=0.01)
    assert found.latency.p95_ms > 400
    assert found.latency.p99_ms > 850
    assert found.latency.max_ms == pytest.approx(1005, abs=10)


def test_the_same_stall_hides_from_callers_that_wait_for_it() -> None:
    step = Step(Pattern.CLOSED, callers=1, duration_s=10)
    counted = tally(step, FakeServer(stalls=STALL))
    found = figures(step, counted)
    assert counted.ok == pytest.approx(1800, abs=2), "no request was sent for a whole second"
    assert found.latency.p99_ms == pytest.approx(5, rel=0.01), "one request in 1,800 saw the stall"
    assert found.latency.max_ms == pytest.approx(1005, abs=10)


def test_a_generator_that_falls_behind_says_so_and_keeps_counting_from_the_schedule() -> None:
    """Something holds up the generator itself for a second: sent late, every request still has been due when it was."""

    def held_up(call: int) -> None:
        server.clock.now_s += call == 500  # what a long garbage collection would do

    server = FakeServer(fails=held_up)
    step = Step(Pattern.CONSTANT, rate=100, duration_s=10)
    found = figures(step, tally(step, server))
    assert found.lateness.p99_ms > 850
    assert found.latency.p99_ms > 850
    assert found.from_send.p99_ms == pytest.approx(5, rel=0.01), "what a clock started at the send would report"
    assert any("late" in warning for warning in found.warnings)


def test_requests_are_sent_when_they_are_due_and_the_warm_up_is_not_counted() -> None:
    server = FakeServer()
    step = Step(Pattern.CONSTANT, rate=10, warm_up_s=2, duration_s=5)
    counted = tally(step, server)
    np.testing.assert_allclose(server.sent_s, np.arange(70) / 10, atol=1e-9)
    assert counted.outcomes == {OK: 50}
    assert [interval.outcomes for interval in counted.intervals] == [{OK: 10}] * 5


def test_the_deadline_counts_from_when_a_request_is_due() -> None:
    server = FakeServer(stalls=((1.0, 9.0),))
    step = Step(Pattern.CONSTANT, rate=10, duration_s=4)
    counted = tally(step, server, deadline_s=0.5)
    assert counted.outcomes == {OK: 10, "DEADLINE_EXCEEDED": 30}
    assert counted.unanswered.max_us == pytest.approx(500_000, rel=0.01)
    assert max(server.timeouts_s) == pytest.approx(0.5)


def test_what_the_generator_cannot_send_counts_against_it() -> None:
    server = FakeServer(service_s=1.0)
    step = Step(Pattern.CONSTANT, rate=10, duration_s=2)
    counted = tally(step, server, max_outstanding=5)
    assert counted.outcomes == {OK: 10, NOT_SENT: 10}
    assert figures(step, counted, Objective(2000)).met is False


def test_refusals_and_failures_are_counted_by_reason() -> None:
    reasons = {0: "QUEUE_FULL", 1: "DEADLINE_UNREACHABLE", 2: "ENGINE_FAILURE"}
    server = FakeServer(fails=lambda call: reasons.get(call % 10))
    step = Step(Pattern.CONSTANT, rate=10, duration_s=10)
    counted = tally(step, server)
    assert counted.outcomes == {OK: 70, "QUEUE_FULL": 10, "DEADLINE_UNREACHABLE": 10, "ENGINE_FAILURE": 10}
    found = figures(step, counted, Objective(100))
    assert (found.refused, found.failed, found.goodput) == (20, 10, 7.0)
    assert found.met is False, "a quick refusal does not meet the objective"


def test_an_objective_counts_all_requests() -> None:
    step = Step(Pattern.CONSTANT, rate=100, duration_s=10)
    stalled = tally(step, FakeServer(stalls=STALL))
    assert figures(step, stalled, Objective(100)).met is False
    assert figures(step, stalled, Objective(100)).goodput == pytest.approx(91, abs=1)
    assert figures(step, stalled, Objective(1000)).met is True
    assert figures(step, stalled).met is None
    assert figures(step, tally(step, FakeServer()), Objective(100)).met is True
