"""The batcher's rules, one by one, with times given by the test. `test_batcher_properties` looks for violations."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from rafaga.errors import DeadlineExceeded, DeadlineUnreachable, QueueFull, RafagaError, Refused
from rafaga.priority import Priority
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.job import Arrays, Batch, Job, JobTiming, Ragged, padding_rows
from rafaga.server.scheduling.latency import LatencyTable


class Rows(Job):
    """A job that keeps its answer or error."""

    def __init__(self, rows: int = 1, **about: Any) -> None:
        super().__init__((np.arange(rows),), self._succeed, self._fail, **about)
        self.output: list[int] | None = None
        self.error: RafagaError | None = None

    def _succeed(self, outputs: Arrays, _: JobTiming) -> None:
        assert self.output is self.error is None
        self.output = outputs[0].tolist()

    def _fail(self, error: RafagaError) -> None:
        assert self.output is self.error is None
        self.error = error


def series(lengths: list[int], **about: Any) -> Rows:
    """A job of a ragged model, whose cost of 1 is a length of 100. Its input is the number of each row."""
    order = np.argsort([-n for n in lengths], kind="stable")
    falling = [lengths[i] for i in order]
    ragged = Ragged(falling, order, ()) if len(lengths) > 1 else None
    job = Rows(len(lengths), cost=falling[0] / 100, ragged=ragged, **about)
    job.inputs = (order,)
    return job


def gpu() -> LatencyTable:
    """Like a model on a GPU: eight rows take twice as long as one."""
    return LatencyTable((1, 2, 4, 8), (0.080, 0.091, 0.114, 0.160))


def of_four() -> LatencyTable:
    """A full batch has four rows and takes 0.14 s."""
    return LatencyTable((1, 2, 4), (0.11, 0.12, 0.14))


def batcher(latency: LatencyTable | None = None, **policy: Any) -> Batcher:
    return Batcher(BatchPolicy(**policy), latency or of_four())


def busy(latency: LatencyTable | None = None, rows: int = 1, **policy: Any) -> tuple[Batcher, Batch]:
    """With the batch that runs since 0.0."""
    queue = batcher(latency, **policy)
    queue.submit(Rows(rows), 0.0)
    return queue, taken(queue)


def taken(queue: Batcher, now: float = 0.0, after: Batch | None = None) -> Batch:
    decision = queue.take(now, after)
    assert decision.batch is not None
    assert not decision.dropped
    return decision.batch


def jobs_of(batch: Batch | None) -> list[Job]:
    assert batch is not None
    return [part.job for part in batch.parts]


def run(batch: Batch, seconds: float = 0.1) -> None:
    """Answers every row with ten times its input."""
    for job, start, stop in batch.parts:
        job.answer(start, (job.inputs[0][start:stop] * 10,), seconds, batch.rows)


def assert_empty(queue: Batcher) -> None:
    assert (queue.queued_jobs, queue.queued_rows) == (0, 0)
    assert queue.take(1e6) == (None, None, ())


class TestBatching:
    def test_batches_stop_at_the_efficient_size(self) -> None:
        """Where rows cost the same in every batch, larger batches only add waiting."""
        queue = batcher(LatencyTable((1, 2, 4, 8), (0.1, 0.2, 0.4, 0.8)))
        queue.submit(Rows(4), 0.0)
        assert [taken(queue).rows for _ in range(4)] == [1, 1, 1, 1]

    def test_padding_counts_as_work(self) -> None:
        """A batch takes as long as its most costly row, times the rows."""
        queue = batcher(gpu())
        queue.submit(Rows(cost=3.0), 0.0)
        queue.submit(Rows(cost=4.0), 0.0)
        batch = taken(queue)
        assert (batch.rows, batch.cost) == (2, 4.0)
        assert batch.predicted_end == pytest.approx(4 * 0.091)

    def test_a_queue_delay_waits_for_a_full_batch(self) -> None:
        queue = batcher(max_queue_delay_s=0.5)
        queue.submit(Rows(), 0.0)
        assert queue.take(0.1) == (None, 0.5, ())
        queue.submit(Rows(), 0.2)
        assert taken(queue, 0.5).rows == 2
        queue.submit(Rows(4), 1.0)
        assert taken(queue, 1.0).rows == 4

    def test_a_queue_delay_makes_no_job_late(self) -> None:
        queue = batcher(gpu(), max_queue_delay_s=10.0)
        queue.submit(Rows(deadline=1.0), 0.0)
        wake_at = queue.take(0.0).wake_at
        assert wake_at is not None
        assert wake_at < 1.0 - 0.080
        assert taken(queue, wake_at + 1e-6).rows == 1

    def test_an_urgent_job_waits_only_for_what_is_due_earlier(self) -> None:
        """It overtakes the rest of a large one."""
        queue = batcher(gpu(), max_queue_wait_s=100)
        queue.submit(large := Rows(100), 0.0)
        first = taken(queue)
        queue.submit(urgent := Rows(deadline=0.6), 0.1)
        queue.finished(first, 0.16)
        assert jobs_of(taken(queue, 0.2)) == [urgent, large]


class TestLengths:
    def test_series_of_other_lengths_wait_for_a_batch_of_their_own(self) -> None:
        """The most urgent job goes first whatever its length, and like ones pass those of other lengths."""
        queue = batcher(gpu())
        for cost in (1.0, 4.0, 0.9, 5.0, 1.1):
            queue.submit(Rows(cost=cost), 0.0)
        assert [[job.cost for job in jobs_of(taken(queue))] for _ in range(2)] == [[1.0, 0.9, 1.1], [4.0, 5.0]]
        assert_empty(queue)

    @pytest.mark.parametrize("seed", range(5))
    def test_batches_of_like_lengths_are_nearly_full(self, seed: int) -> None:
        """At most a fifth is padding. The answers have the order of the request."""
        rng = np.random.default_rng(seed)
        queue = batcher(gpu(), max_queue_wait_s=1e4)
        jobs = [series(rng.integers(20, 500, rng.choice([1, 1, 1, 7, 40])).tolist()) for _ in range(100)]
        for n, job in enumerate(jobs):
            queue.submit(job, 0.001 * n)
        batches = []
        while queue.queued_jobs:
            batches.append(batch := taken(queue, 1.0))
            assert 0 <= padding_rows(batch.parts) <= 0.2 * batch.rows + 1e-9
            run(batch)
        assert np.mean([batch.rows for batch in batches]) > 6, "of eight"
        assert all(job.output == list(range(0, 10 * job.rows, 10)) for job in jobs)

    def test_a_request_of_many_lengths_is_split_by_them(self) -> None:
        queue = batcher(gpu())
        queue.submit(mixed := series([10, 400, 390, 12, 395]), 0.0)
        first, second = taken(queue), taken(queue)
        assert [batch.rows for batch in (first, second)] == [3, 2]
        assert [batch.cost for batch in (first, second)] == pytest.approx([4.0, 0.12])
        assert mixed.cost == pytest.approx(sum([10, 400, 390, 12, 395]) / 5 / 100), "predicted by its mean"
        run(second)
        assert mixed.output is None
        run(first)
        assert mixed.output == [0, 10, 20, 30, 40]

    def test_rows_of_a_longer_request_join_as_far_as_they_fit(self) -> None:
        queue = batcher(gpu())
        queue.submit(series([400]), 0.0)
        queue.submit(series([20, 390, 380, 10]), 0.0)
        assert [(start, stop) for _, start, stop in taken(queue).parts] == [(0, 1), (0, 2)]
        assert queue.queued_rows == 2

    def test_only_so_many_jobs_are_passed_over(self) -> None:
        """A long queue of other lengths is not searched to its end for each batch."""
        queue = batcher(gpu(), max_queue_wait_s=1e4)
        for cost in [1.0, *[9.0] * 100, 1.0]:
            queue.submit(Rows(cost=cost), 0.0)
        assert taken(queue).rows == 1

    def test_a_job_whose_rest_would_be_late_is_dropped(self) -> None:
        """Its first rows alone would be in time."""
        queue, _ = busy(gpu())
        queue.submit(mixed := series([400, 50, 50], deadline=0.8), 0.0)
        assert queue.take(0.45).dropped == (mixed,)


class TestRefusals:
    def test_a_wait_past_the_bound(self) -> None:
        """Behind a running batch and two that wait are three times 0.14 s."""
        queue, _ = busy(rows=4, max_queue_wait_s=0.4)
        queue.submit(Rows(4), 0.0)
        queue.submit(Rows(4), 0.0)
        with pytest.raises(QueueFull, match=r"below 0\.400 s, predicted 0\.420 s") as refusal:
            queue.submit(Rows(), 0.0)
        assert refusal.value.retry_after_s == pytest.approx(0.14)
        queue.submit(Rows(), 0.05)

    def test_the_deadline_is_the_bound_of_the_wait_where_there_is_one(self) -> None:
        """A batch of four takes 2 s, twice the longest wait. It is refused to callers without a deadline only."""
        queue, _ = busy(LatencyTable((1, 4), (1.9, 2.0)), rows=4, max_queue_wait_s=1.0)
        with pytest.raises(QueueFull, match=r"set a deadline to wait longer"):
            queue.submit(Rows(), 0.0)
        with pytest.raises(DeadlineUnreachable):
            queue.submit(Rows(deadline=3.0), 0.0)
        with suppress(DeadlineUnreachable):
            for _ in range(40):
                queue.submit(Rows(4, deadline=60.0), 0.0)
        assert queue.queued_jobs == 26, "so many batches of 2 s end, one after the other, in nine tenths of a minute"

    def test_a_deadline_that_the_queue_puts_out_of_reach(self) -> None:
        queue, _ = busy(rows=4, max_queue_wait_s=100.0)
        with pytest.raises(DeadlineUnreachable, match=r"0\.200 s are left") as refusal:
            queue.submit(Rows(deadline=0.2), 0.0)
        assert refusal.value.retry_after_s == pytest.approx(0.14)
        queue.submit(Rows(deadline=0.4), 0.0)

    def test_a_large_job_is_judged_by_all_its_rows(self) -> None:
        """No retry is advised: the model itself takes too long."""
        queue, _ = busy(max_queue_wait_s=100.0)
        with pytest.raises(DeadlineUnreachable) as refusal:
            queue.submit(Rows(40, deadline=1.4), 0.0)
        assert refusal.value.retry_after_s is None
        queue.submit(Rows(4, deadline=1.4), 0.0)

    def test_admission_keeps_a_margin_that_grows_with_the_noise(self) -> None:
        """An answer predicted for the last tenth of the time left would often come after it."""
        queue, _ = busy(gpu())
        with pytest.raises(DeadlineUnreachable):
            queue.submit(Rows(deadline=0.161), 0.0)
        queue.submit(Rows(deadline=0.2), 0.0)
        noisy = gpu()
        for n in range(200):
            noisy.observe(1, 0.08 * (1.5 if n % 2 else 0.5))
        queue, _ = busy(noisy)
        with pytest.raises(DeadlineUnreachable):
            queue.submit(Rows(deadline=0.2), 0.0)

    def test_an_engine_that_hangs_fills_the_queue(self) -> None:
        queue, _ = busy(gpu(), max_queue_wait_s=1.0)
        queue.submit(Rows(), 0.1)
        with pytest.raises(QueueFull):
            queue.submit(Rows(), 2.0)

    def test_a_passed_deadline(self) -> None:
        with pytest.raises(DeadlineExceeded):
            batcher().submit(Rows(deadline=1.0), 1.0)


class TestDropping:
    def test_late_jobs_are_dropped_before_any_work(self) -> None:
        queue, running = busy(gpu())
        queue.submit(late := Rows(deadline=0.3), 0.0)
        queue.submit(patient := Rows(), 0.0)
        queue.finished(running, 0.25)
        decision = queue.take(0.25)
        assert (decision.dropped, jobs_of(decision.batch)) == ((late,), [patient])
        assert_empty(queue)

    def test_the_rest_of_a_large_job_is_dropped_once_it_is_late(self) -> None:
        queue = batcher(gpu())
        queue.submit(large := Rows(40, deadline=1.0), 0.0)
        queue.finished(taken(queue), 0.5)
        assert queue.take(0.5).dropped == (large,)
        assert_empty(queue)

    def test_a_smaller_batch_saves_an_urgent_job_while_few_wait(self) -> None:
        queue = batcher(LatencyTable((1, 2, 4, 8), (0.11, 0.21, 0.41, 0.79)))
        queue.submit(urgent := Rows(deadline=0.15), 0.0)
        queue.submit(Rows(), 0.0)
        assert jobs_of(taken(queue)) == [urgent]

    def test_a_full_batch_is_not_made_smaller_for_an_urgent_job(self) -> None:
        queue, running = busy(gpu(), max_queue_wait_s=10)
        queue.submit(urgent := Rows(deadline=0.2), 0.0)
        for _ in range(9):
            queue.submit(Rows(), 0.01)
        queue.finished(running, 0.1)
        decision = queue.take(0.1)
        assert (decision.dropped, len(jobs_of(decision.batch))) == ((urgent,), 8)


class TestPriority:
    """A batch has room for four rows; a step is a second."""

    def test_age_decides_in_the_end(self) -> None:
        """A step of priority is worth one `max_queue_wait_s`, and no more."""
        queue, _ = busy(max_queue_wait_s=1.0)
        queue.submit(old := Rows(4), 0.1)
        queue.submit(young := Rows(4, priority=Priority.HIGH, deadline=3.0), 1.2)
        assert jobs_of(taken(queue, 1.2)) == [old]
        assert jobs_of(taken(queue, 1.2)) == [young]

    def test_the_higher_does_not_wait_for_the_lower(self) -> None:
        queue, _ = busy(max_queue_wait_s=1.0)
        with suppress(Refused):
            for _ in range(100):
                queue.submit(Rows(4, priority=Priority.LOW), 0.0)
        assert queue.predicted_wait(Rows(priority=Priority.LOW), 0.0) > 0.8
        assert queue.predicted_wait(Rows(), 0.0) == pytest.approx(0.11)
        queue.submit(urgent := Rows(deadline=0.5), 0.0)
        assert jobs_of(taken(queue, 0.1))[0] is urgent

    def test_a_full_queue_is_full_for_its_priority_and_below(self) -> None:
        queue, _ = busy(max_queue_wait_s=100.0, max_queue_jobs=2)

        def refuse(priority: Priority) -> None:
            with pytest.raises(QueueFull) as refusal:
                queue.submit(Rows(priority=priority), 0.0)
            assert refusal.value.retry_after_s == pytest.approx(0.11 + 2 * 0.14 / 4)

        for _ in range(2):
            queue.submit(Rows(), 0.0)
        refuse(Priority.NORMAL)
        refuse(Priority.LOW)
        for _ in range(2):
            queue.submit(Rows(priority=Priority.HIGH), 0.0)
        refuse(Priority.HIGH)
        assert queue.queued_jobs == 4

    def test_a_share_is_set_aside_for_the_lower(self) -> None:
        """Ten rows of a higher priority, and one of the lower goes before them all; then ten more."""
        queue, _ = busy(max_queue_wait_s=1000.0)
        for _ in range(10):
            queue.submit(Rows(priority=Priority.HIGH), 0.0)
        queue.submit(lower := Rows(), 0.0)
        queue.submit(Rows(), 0.0)
        first, *others = jobs_of(taken(queue, 0.1))
        assert first is lower
        assert [each.priority for each in others] == [Priority.HIGH] * 3


class TestPrediction:
    def test_running_and_queued_work_add_up(self) -> None:
        queue, _ = busy(gpu(), rows=8)
        queue.submit(Rows(4, cost=2.0), 0.0)
        assert queue.predicted_wait(Rows(), 0.1) == pytest.approx(0.06 + 0.16)

    def test_removed_work_is_waited_for_no_more(self) -> None:
        queue = batcher(gpu())
        queue.submit(large := Rows(64), 0.0)
        assert queue.predicted_wait(Rows(), 0.0) == pytest.approx(0.52), "what is due before its own"
        queue.remove(large)
        assert queue.predicted_wait(Rows(), 0.0) == 0.0

    def test_what_was_taken_ahead_runs_after_what_runs(self) -> None:
        queue, first = busy(gpu(), rows=8)
        queue.submit(Rows(8), 0.0)
        second = taken(queue, 0.05, after=first)
        assert (second.begins, second.predicted_end) == (pytest.approx(0.16), pytest.approx(0.32))
        assert queue.predicted_wait(Rows(), 0.1) == pytest.approx(0.06 + 0.16)
        assert queue.predicted_wait(Rows(), 0.2) == pytest.approx(0.04 + 0.16), "the first takes longer"

    def test_runs_that_take_longer_do_not_add_up(self) -> None:
        """An engine that never rests, and always knows its next batch: each run is half as long again as predicted."""
        queue, running = busy(gpu(), rows=8)
        now = 0.0
        for _ in range(9):
            queue.submit(Rows(8), now)
            following = taken(queue, now, after=running)
            now += 1.5 * running.seconds
            queue.finished(running, None)
            queue.begun(following, now)
            assert queue.predicted_wait(Rows(), now) == pytest.approx(queue.latency.predict(8))
            assert jobs_of(following)[0].queue_s == pytest.approx(1.5 * running.seconds), "the actual wait"
            running = following

    def test_deadlines_are_judged_by_when_a_batch_taken_ahead_would_end(self) -> None:
        queue, first = busy(gpu(), rows=8)
        queue.submit(Rows(8, deadline=0.5), 0.0)
        taken(queue, 0.2, after=first)
        queue.submit(late := Rows(8, deadline=1.0), 0.3)
        # The first is 0.54 s late, and expected to be as late again.
        assert queue.take(0.7, after=first) == (None, None, (late,))


class TestLongJobs:
    """A job of 1,000 rows at 25 rows per second: it alone takes 40 s."""

    ROW_S = 0.04

    @pytest.fixture
    def queue(self) -> Batcher:
        return batcher(LatencyTable((1, 2, 4, 8), [self.ROW_S * b for b in (1, 2, 4, 8)]))

    def serve(self, queue: Batcher, until: float, every_s: float) -> tuple[list[Rows], list[int], float]:
        """A small job every so often, until the queue is empty. Gives those that were accepted, in which second those
        came that were refused, and when the engine stood still."""
        now, due = 0.0, 0.0
        accepted: list[Rows] = []
        refused: list[int] = []
        while True:
            while due <= min(now, until):
                try:
                    queue.submit(small := Rows(deadline=due + 0.5), due)
                    accepted.append(small)
                except Refused:
                    refused.append(int(due))
                due += every_s
            decision = queue.take(now)
            for dropped in decision.dropped:
                dropped.fail(DeadlineExceeded("late"))
            if decision.batch is None:
                return accepted, refused, now
            seconds = decision.batch.rows * self.ROW_S
            now += seconds
            run(decision.batch, seconds)
            queue.finished(decision.batch, seconds)

    @pytest.mark.parametrize("left_s", [math.inf, 80.0])
    def test_they_leave_room(self, queue: Batcher, left_s: float) -> None:
        """Others with half a second bring four tenths of what the engine can take: hardly one is refused."""
        queue.submit(long := Rows(1000, deadline=left_s), 0.0)
        accepted, refused, end = self.serve(queue, 80.0, 0.1)
        assert len(refused) <= 10
        assert set(refused) <= {0, 1}, "until it has had its first half second, and what it delayed is made up for"
        assert all(job.output for job in (long, *accepted))
        assert end == pytest.approx(40 / 0.6, abs=0.5), "it has what they leave"

    def test_they_keep_their_half(self, queue: Batcher) -> None:
        """Others bring twice what the engine can take, of equal priority; the deadline is met."""
        queue.submit(long := Rows(1000, deadline=100.0), 0.0)
        accepted, refused, _ = self.serve(queue, 100.0, 0.02)
        assert long.output
        answered = sum(job.output is not None for job in accepted)
        assert 0.4 * 100 / self.ROW_S <= answered <= 0.65 * 100 / self.ROW_S
        assert len(accepted) + len(refused) == 5001
        assert sum(job.error is not None for job in accepted) == len(accepted) - answered <= 0.01 * answered

    def test_alone_they_have_the_whole_engine(self, queue: Batcher) -> None:
        queue.submit(long := Rows(1000), 0.0)
        *_, end = self.serve(queue, -1.0, 1.0)
        assert end == pytest.approx(40.0)
        assert long.output == list(range(0, 10_000, 10))

    def test_one_at_a_time(self, queue: Batcher) -> None:
        """The next may come back when the first will have run."""
        queue.submit(Rows(1000), 0.0)
        taken(queue)
        with pytest.raises(QueueFull) as refusal:
            queue.submit(Rows(1000), 0.0)
        assert refusal.value.retry_after_s == pytest.approx(39.0, abs=0.2)

    def test_what_went_leaves_nothing_behind(self, queue: Batcher) -> None:
        queue.submit(long := Rows(1000), 0.0)
        queue.submit(Rows(), 0.0)
        for _ in range(30):
            queue.finished(taken(queue), None)
        queue.submit(small := Rows(), 0.0)
        assert queue.remove(long)
        assert queue.predicted_wait(Rows(), 0.0) == pytest.approx(self.ROW_S)
        assert queue.remove(small)
        assert queue.idle
