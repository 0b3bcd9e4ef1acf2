"""Whatever arrives, is cancelled, takes long or fails: what the batcher must hold in every order of events."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rafaga.errors import DeadlineExceeded, EngineFailure, RafagaError, Refused
from rafaga.priority import Priority
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.job import Arrays, Batch, Job, JobTiming, Ragged, padding_rows
from rafaga.server.scheduling.latency import LatencyTable

QUEUE_JOBS = 12
MAX_WAIT_S = 0.8


def urgency(job: Job) -> float:
    """When it is due, whatever its priority."""
    return min(job.deadline, job.arrival + MAX_WAIT_S)


class Caller(Job):
    """One job and what became of it."""

    def __init__(self, number: int, rows: int, mixed: bool, **about: Any) -> None:
        """`mixed`: its rows have different lengths."""
        first = number * 1000
        order = np.random.default_rng(number).permutation(rows) if mixed else np.arange(rows)
        ragged = Ragged(range(rows + 1, 1, -1), order, ()) if mixed else None
        super().__init__((first + order,), self._answered, self._failed, ragged=ragged, **about)
        self.expected = [-n for n in range(first, first + rows)]
        self.cancelled = False
        self.ends = 0
        self.next_row = 0  # the first that no batch had yet

    def _answered(self, outputs: Arrays, _: JobTiming) -> None:
        self.ends += 1
        assert not self.cancelled
        assert outputs[0].tolist() == self.expected

    def _failed(self, _: RafagaError) -> None:
        self.ends += 1
        assert not self.cancelled


def callers(jobs: Iterable[Job]) -> list[Caller]:
    return [job for job in jobs if isinstance(job, Caller)]


class BatcherMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        table = LatencyTable((1, 2, 4, 8), (0.08, 0.09, 0.11, 0.16))
        self.batcher = Batcher(BatchPolicy(max_queue_wait_s=MAX_WAIT_S, max_queue_jobs=QUEUE_JOBS), table)
        self.now = 100.0
        self.accepted: list[Caller] = []
        self.queued: list[Caller] = []  # in no particular order
        self.running: list[Batch] = []  # one on each engine that is at work
        self.ahead: dict[Batch, Batch] = {}  # taken already, by what its engine still runs
        self.count = 0

    @initialize(engines=st.integers(1, 3))
    def begin(self, engines: int) -> None:
        self.batcher.engines = engines

    @rule(seconds=st.floats(0, 0.3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        rows=st.integers(1, 20),
        left=st.one_of(st.just(math.inf), st.floats(0.01, 3.0)),
        key=st.integers(0, 1),
        cost=st.sampled_from([0.3, 1.0, 1.0, 3.0]),
        priority=st.sampled_from(Priority),
        mixed=st.booleans(),
    )
    def submit(self, rows: int, left: float, mixed: bool, **about: Any) -> None:
        caller = Caller(self.count, rows, mixed and rows > 1, deadline=self.now + left, **about)
        self.count += 1
        idle = self.batcher.idle
        with suppress(Refused):
            self.batcher.submit(caller, self.now)
            assert sum(c.level <= caller.level for c in self.queued) < QUEUE_JOBS
            self.accepted.append(caller)
            self.queued.append(caller)
        assert not idle or caller in self.queued, "an idle engine takes any job"
        assert caller.ends == 0

    @precondition(lambda self: self.batcher.engines > 1)
    @rule(engines=st.integers(1, 3))
    def engines_come_and_go(self, engines: int) -> None:
        self.batcher.engines = max(engines, len(self.running))

    @precondition(lambda self: len(self.running) < self.batcher.engines)
    @rule()
    def take(self) -> None:
        batch = self._take(None)
        if batch is None:
            assert not self.queued
        else:
            self.running.append(batch)

    @precondition(lambda self: len(self.running) > len(self.ahead))
    @rule(data=st.data())
    def take_ahead(self, data: st.DataObject) -> None:
        running = data.draw(st.sampled_from([batch for batch in self.running if batch not in self.ahead]))
        batch = self._take(running)
        if batch is not None:
            assert batch.begins >= self.now
            self.ahead[running] = batch

    def _take(self, after: Batch | None) -> Batch | None:
        alone = self.batcher.queued_jobs == 1
        due = {caller: caller.due for caller in self.queued}
        batch, wake_at, dropped = self.batcher.take(self.now, after)
        assert wake_at is None
        late_at = self.now + (0.0 if after is None else 1.4 * after.left_s(self.now))
        for caller in callers(dropped):
            assert caller.deadline < late_at + self.batcher.latency.predict(min(caller.rest, 8) + 8, 3.0) * 3
            self.queued.remove(caller)
            caller.fail(DeadlineExceeded("late"))
        if batch is None:
            return None
        taken = callers(part.job for part in batch.parts)
        assert batch.rows == sum(stop - start for _, start, stop in batch.parts) <= 8
        assert len({caller.key for caller in taken}) == 1
        for caller, (_, start, stop) in zip(taken, batch.parts, strict=True):
            assert not caller.cancelled
            assert caller.next_row == start < stop, "rows leave in their order"
            caller.next_row = stop
            if stop == caller.rows:
                self.queued.remove(caller)
            assert alone or caller.deadline >= batch.predicted_end - 1e-9, "no work on a job that would be late"
            assert caller.rest == 0 or caller.due >= due[caller], "its remaining rows are not more urgent"
        assert 0 <= padding_rows(batch.parts) <= 0.2 * batch.rows + 1e-9
        self._check_order(taken, due)
        return batch

    def _check_order(self, taken: list[Caller], due: dict[Caller, float]) -> None:
        """No job that was left behind, of the same key, is more urgent than the first; nor than any, if rows are
        alike."""
        behind = [c for c in self.queued if c.key == taken[0].key and not c.next_row]
        if len({cost for caller in taken + behind for cost in caller.costs or [caller.cost]}) > 1:
            del taken[1:]
        assert max(due[caller] for caller in taken) <= min((other.due for other in behind), default=math.inf)
        for caller, other in itertools.product(taken, behind):
            if other.level == caller.level:
                assert urgency(caller) <= urgency(other), "earliest due first, inside a priority"
            elif other.level < caller.level:
                assert self.now - caller.arrival >= MAX_WAIT_S * 0.999, "the higher first, until age decides"

    def _ended(self, batch: Batch, seconds: float | None) -> None:
        self.batcher.finished(batch, seconds)
        if (following := self.ahead.pop(batch, None)) is not None:
            self.batcher.begun(following, self.now)
            self.running.append(following)

    @precondition(lambda self: self.running)
    @rule(slowness=st.floats(0.3, 5.0), engine=st.integers(0, 2))
    def answer(self, slowness: float, engine: int) -> None:
        """In whatever order: parts of one job may end in another than theirs."""
        batch = self.running.pop(engine % len(self.running))
        seconds = slowness * 0.1
        self.now += seconds
        for job, start, stop in batch.parts:
            job.answer(start, (-job.inputs[0][start:stop],), seconds, batch.rows)
        self._ended(batch, seconds)

    @precondition(lambda self: self.running)
    @rule(engine=st.integers(0, 2))
    def engine_fails(self, engine: int) -> None:
        batch = self.running.pop(engine % len(self.running))
        for caller in callers(part.job for part in batch.parts):
            assert self.batcher.remove(caller) == (caller in self.queued)
            if caller in self.queued:
                self.queued.remove(caller)
            caller.fail(EngineFailure("broken"))
        self._ended(batch, None)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(self.queued))
        caller.cancelled = True
        caller.abandon()
        assert self.batcher.remove(caller)
        assert not self.batcher.remove(caller)
        self.queued.remove(caller)

    @rule()
    def close(self) -> None:
        assert set(self.batcher.remove_all()) == set(self.queued)
        for caller in self.queued:
            caller.fail(EngineFailure("closed"))
        self.queued.clear()

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.batcher.queued_jobs == len(self.queued)
        assert self.batcher.queued_rows == sum(c.rows - c.next_row for c in self.queued)
        assert self.batcher.idle == (not self.queued and not self.running)

    @invariant()
    def the_predicted_wait_is_that_of_the_queue(self) -> None:
        visitor = Job((np.zeros(1),), lambda *_: None, lambda _: None)
        visitor.arrival = self.now
        wait = self.batcher.predicted_wait(visitor, self.now)
        left = sorted(abs(batch.predicted_end - self.now) for batch in self.running)
        running = 0.0 if len(left) < self.batcher.engines else left[-self.batcher.engines]
        running += sum(batch.seconds for batch in self.ahead.values()) / self.batcher.engines
        all_of_it = sum((c.rows - c.next_row) * c.row_s for c in self.queued)
        assert running - 1e-6 <= wait <= running + all_of_it / self.batcher.engines + 1e-6
        if not self.queued:
            assert abs(wait - running) < 1e-9

    @invariant()
    def no_job_is_answered_twice(self) -> None:
        assert all(c.ends <= 1 for c in self.accepted)

    def teardown(self) -> None:
        """The queue runs dry, and then every job was answered, failed or cancelled."""
        while self.running:
            self.answer(1.0, 0)
        while self.queued:
            self.take()
            if self.running:
                self.answer(1.0, 0)
        self.counts_are_exact()
        assert self.batcher.take(self.now) == (None, None, ())
        assert all(c.ends == (0 if c.cancelled else 1) for c in self.accepted)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=150, stateful_step_count=40)
