"""The batcher's rules, one by one, with times given by the test. `test_batcher_properties` looks for violations."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from rafaga.errors import DeadlineExceeded, DeadlineUnreachable, QueueFull, RafagaError, Refused
from rafaga.priority import Priority
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.job import Arrays, Batch, Job, JobTiming, Ragged, padding_rows
from rafaga.server.scheduling.latency import LatencyTable


def gpu() -> LatencyTable:
    """Like a model on a GPU: eight rows take twice as long as one."""
    return LatencyTable((1, 2, 4, 8), (0.080, 0.091, 0.114, 0.160))


class Answers:
    """What the callbacks of the jobs made by `job` were called with."""

    def __init__(self) -> None:
        self.outputs: dict[str, Arrays] = {}
        self.timings: dict[str, JobTiming] = {}
        self.errors: dict[str, RafagaError] = {}

    def job(self, name: str = "job", rows: int = 1, **about: object) -> Job:
        def answered(outputs: Arrays, timing: JobTiming) -> None:
            assert name not in self.outputs
            assert name not in self.errors
            self.outputs[name], self.timings[name] = outputs, timing

        def failed(error: RafagaError) -> None:
            assert name not in self.outputs
            assert name not in self.errors
            self.errors[name] = error

        return Job((np.arange(rows),), answered, failed, **about)  # type: ignore[arg-type]


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def job(answers: Answers) -> Callable[..., Job]:
    return answers.job


def batcher(latency: LatencyTable | None = None, **policy: float) -> Batcher:
    return Batcher(BatchPolicy(**policy), latency or of_four())  # type: ignore[arg-type]


def of_four() -> LatencyTable:
    """A full batch has four rows and takes 0.14 s."""
    return LatencyTable((1, 2, 4), (0.11, 0.12, 0.14))


def taken(batcher: Batcher, now: float = 0.0) -> Batch:
    decision = batcher.take(now)
    assert decision.batch is not None
    assert not decision.dropped
    return decision.batch


def jobs_of(batch: Batch) -> list[Job]:
    return [part.job for part in batch.parts]


def run(batch: Batch, seconds: float = 0.1) -> None:
    """Answers every row with ten times its input."""
    for job, start, stop in batch.parts:
        job.answer(start, (job.inputs[0][start:stop] * 10,), seconds, batch.rows)


def assert_empty(batcher: Batcher) -> None:
    assert (batcher.queued_jobs, batcher.queued_rows) == (0, 0)
    decision = batcher.take(1e6)
    assert decision == (None, None, ())


class TestBatching:
    def test_a_lone_job_is_taken_at_once(self, job: Callable[..., Job]) -> None:
        queue = batcher()
        queue.submit(lone := job(), 5.0)
        batch = taken(queue, 5.0)
        assert jobs_of(batch) == [lone]
        assert lone.queue_s == 0.0

    def test_batches_stop_at_the_efficient_size(self, job: Callable[..., Job]) -> None:
        """Where rows cost the same in every batch, larger batches only add waiting."""
        queue = batcher(LatencyTable((1, 2, 4, 8), (0.1, 0.2, 0.4, 0.8)))
        for name in "abcd":
            queue.submit(job(name), 0.0)
        assert [taken(queue).rows for _ in range(4)] == [1, 1, 1, 1]

    def test_padding_counts_as_work(self, job: Callable[..., Job]) -> None:
        """A batch takes as long as its most costly row, times the rows."""
        queue = batcher(gpu())
        queue.submit(job("shorter", cost=3.0), 0.0)
        queue.submit(job("longer", cost=4.0), 0.0)
        batch = taken(queue)
        assert (batch.rows, batch.cost) == (2, 4.0)
        assert batch.predicted_end == pytest.approx(4 * 0.091)

    def test_a_queue_delay_waits_for_more_jobs(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_delay_s=0.5)
        queue.submit(job("first"), 0.0)
        assert queue.take(0.1) == (None, 0.5, ())
        queue.submit(job("second"), 0.2)
        assert taken(queue, 0.5).rows == 2

    def test_a_queue_delay_ends_when_a_batch_is_full(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_delay_s=0.5)
        for name in "abcd":
            queue.submit(job(name), 0.0)
        assert taken(queue, 0.0).rows == 4

    def test_a_queue_delay_makes_no_job_late(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu(), max_queue_delay_s=10.0)
        queue.submit(job(deadline=1.0), 0.0)
        wake_at = queue.take(0.0).wake_at
        assert wake_at is not None
        assert wake_at < 1.0 - 0.080
        assert taken(queue, wake_at + 1e-6).rows == 1

    def test_keys_are_never_mixed(self, job: Callable[..., Job]) -> None:
        queue = batcher()
        for n, key in enumerate("abab"):
            queue.submit(job(str(n), key=key), 0.0)
        assert [[j.key for j in jobs_of(taken(queue))] for _ in range(2)] == [["a", "a"], ["b", "b"]]


def series(answers: Answers, name: str, lengths: list[int], **about: object) -> Job:
    """A job of a ragged model, whose cost of 1 is a length of 100. Its input is the number of each row."""
    order = np.argsort([-n for n in lengths], kind="stable")
    fallen = [lengths[i] for i in order]
    ragged = Ragged(fallen, order, ()) if len(lengths) > 1 else None
    job = answers.job(name, len(lengths), cost=fallen[0] / 100, ragged=ragged, **about)
    job.inputs = (order,)
    return job


class TestLengths:
    def test_series_of_other_lengths_wait_for_a_batch_of_their_own(self, job: Callable[..., Job]) -> None:
        """The most urgent job goes first whatever its length, and like ones pass those of other lengths."""
        queue = batcher(gpu())
        costs = {"a": 1.0, "b": 4.0, "c": 0.9, "d": 5.0, "e": 1.1}
        for name, cost in costs.items():
            queue.submit(job(name, cost=cost), 0.0)
        assert [[j.cost for j in jobs_of(taken(queue))] for _ in range(2)] == [[1.0, 0.9, 1.1], [4.0, 5.0]]
        assert_empty(queue)

    @pytest.mark.parametrize("seed", range(5))
    def test_at_most_a_fifth_of_a_batch_is_padding(self, answers: Answers, seed: int) -> None:
        rng = np.random.default_rng(seed)
        queue = batcher(gpu(), max_queue_wait_s=1e4)
        for n in range(100):
            lengths = rng.integers(20, 500, rng.choice([1, 1, 1, 7, 40])).tolist()
            queue.submit(series(answers, str(n), lengths), 0.001 * n)
        batches = []
        while queue.queued_jobs:
            urgent = queue._most_urgent()[-1][2]  # type: ignore[index]
            batches.append(batch := taken(queue, 1.0))
            assert batch.parts[0].job is urgent
            assert 0 <= padding_rows(batch.parts) <= 0.2 * batch.rows + 1e-9
            run(batch)
        assert np.mean([batch.rows for batch in batches]) > 6, "of eight"
        assert len(answers.outputs) == 100
        for (rows,) in answers.outputs.values():
            assert rows.tolist() == list(range(0, 10 * len(rows), 10)), "in the order of the request"

    def test_a_request_of_many_lengths_is_split_by_them(self, answers: Answers) -> None:
        queue = batcher(gpu())
        queue.submit(mixed := series(answers, "mixed", [10, 400, 390, 12, 395]), 0.0)
        first, second = taken(queue), taken(queue)
        assert [batch.rows for batch in (first, second)] == [3, 2]
        assert [batch.cost for batch in (first, second)] == pytest.approx([4.0, 0.12])
        assert mixed.cost == pytest.approx(sum([10, 400, 390, 12, 395]) / 5 / 100), "predicted by its mean"
        run(second)
        assert not answers.outputs
        run(first)
        assert answers.outputs["mixed"][0].tolist() == [0, 10, 20, 30, 40]

    def test_rows_of_a_longer_request_join_as_far_as_they_fit(self, answers: Answers) -> None:
        queue = batcher(gpu())
        queue.submit(series(answers, "urgent", [400]), 0.0)
        queue.submit(series(answers, "mixed", [20, 390, 380, 10]), 0.0)
        assert [(start, stop) for _, start, stop in taken(queue).parts] == [(0, 1), (0, 2)]
        assert queue.queued_rows == 2

    def test_only_so_many_jobs_are_passed_over(self, job: Callable[..., Job]) -> None:
        """A long queue of other lengths is not searched to its end for each batch."""
        queue = batcher(gpu(), max_queue_wait_s=1e4)
        for n, cost in enumerate([1.0, *[9.0] * 100, 1.0]):
            queue.submit(job(str(n), cost=cost), 0.0)
        assert taken(queue).rows == 1

    def test_a_job_whose_rest_would_be_late_is_dropped(self, answers: Answers) -> None:
        """Its first rows alone would be in time."""
        queue = batcher(gpu())
        queue.submit(series(answers, "running", [100]), 0.0)
        taken(queue)
        queue.submit(mixed := series(answers, "mixed", [400, 50, 50], deadline=0.8), 0.0)
        assert queue.take(0.45).dropped == (mixed,)


class TestOrder:
    def test_an_urgent_job_overtakes_the_rest_of_a_large_one(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu(), max_queue_wait_s=100)
        queue.submit(large := job("large", rows=20), 0.0)
        first = taken(queue)
        queue.submit(urgent := job("urgent", deadline=2.0), 0.1)
        queue.finished(first, 0.16)
        assert jobs_of(taken(queue, 0.2)) == [urgent, large]

    def test_jobs_with_deadlines_do_not_starve_one_without(self, job: Callable[..., Job]) -> None:
        """Jobs with less time keep arriving, enough to fill every batch: after max_queue_wait_s it is its turn."""
        queue = batcher(gpu(), max_queue_wait_s=1.0)
        queue.submit(job("running"), 0.0)
        batch = taken(queue)
        queue.submit(patient := job("patient"), 0.0)
        now = 0.0
        while patient not in jobs_of(batch):
            for n in range(12):
                with suppress(Refused):
                    queue.submit(job(f"{now} {n}", deadline=now + 0.5), now)
            now += 0.16
            queue.finished(batch, 0.16)
            decision = queue.take(now)
            assert decision.batch is not None
            batch = decision.batch
        assert 0.5 <= patient.queue_s <= 1.0 + 0.16


class TestRefusals:
    def test_n_plus_two_jobs_into_a_queue_of_n(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_jobs=5, max_queue_wait_s=1e6)
        for n in range(5):
            queue.submit(job(str(n)), 0.0)
        for n in range(2):
            with pytest.raises(QueueFull) as refusal:
                queue.submit(job(f"refused {n}"), 0.0)
            assert refusal.value.retry_after_s == pytest.approx(5 * 0.14 / 4)
        assert queue.queued_jobs == 5

    def test_a_wait_past_the_bound(self, job: Callable[..., Job]) -> None:
        """Behind a running batch and two that wait are three times 0.14 s."""
        queue = batcher(max_queue_wait_s=0.4)
        queue.submit(job("running", rows=4), 0.0)
        taken(queue)
        queue.submit(job("waiting", rows=4), 0.0)
        queue.submit(job("waiting too", rows=4), 0.0)
        with pytest.raises(QueueFull, match=r"below 0\.400 s, predicted 0\.420 s") as refusal:
            queue.submit(job("refused"), 0.0)
        assert refusal.value.retry_after_s == pytest.approx(0.14)
        queue.submit(job("later"), 0.05)

    def test_the_deadline_is_the_bound_of_the_wait_where_there_is_one(self, job: Callable[..., Job]) -> None:
        """A batch of four takes 2 s, twice the longest wait. It is refused to callers without a deadline only."""
        queue = batcher(LatencyTable((1, 4), (1.9, 2.0)), max_queue_wait_s=1.0)
        queue.submit(job("running", rows=4), 0.0)
        taken(queue)
        with pytest.raises(QueueFull, match=r"set a deadline to wait longer"):
            queue.submit(job("any time"), 0.0)
        with pytest.raises(DeadlineUnreachable):
            queue.submit(job("too soon", deadline=3.0), 0.0)
        patient = [job(str(n), rows=4, deadline=60.0) for n in range(40)]
        accepted = 0
        for each in patient:
            try:
                queue.submit(each, 0.0)
                accepted += 1
            except DeadlineUnreachable:
                break
        assert accepted == 26, "so many batches of 2 s end, one after the other, in nine tenths of a minute"

    def test_a_deadline_that_the_queue_puts_out_of_reach(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_wait_s=100.0)
        queue.submit(job("running", rows=4), 0.0)
        taken(queue)
        with pytest.raises(DeadlineUnreachable, match=r"0\.200 s are left") as refusal:
            queue.submit(job("refused", deadline=0.2), 0.0)
        assert refusal.value.retry_after_s == pytest.approx(0.14)
        queue.submit(job("in time", deadline=0.4), 0.0)

    def test_no_retry_is_advised_where_the_model_itself_takes_too_long(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_wait_s=100.0)
        queue.submit(job("running"), 0.0)
        with pytest.raises(DeadlineUnreachable) as refusal:
            queue.submit(job("refused", rows=40, deadline=1.0), 0.0)
        assert refusal.value.retry_after_s is None

    def test_a_large_job_is_judged_by_all_its_rows(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_wait_s=100.0)
        queue.submit(job("running"), 0.0)
        taken(queue)
        with pytest.raises(DeadlineUnreachable):
            queue.submit(job("forty rows take ten batches", rows=40, deadline=1.4), 0.0)
        queue.submit(job("four rows take one", rows=4, deadline=1.4), 0.0)

    def test_only_what_is_due_earlier_is_waited_for(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_wait_s=100.0)
        queue.submit(job("running"), 0.0)
        taken(queue)
        queue.submit(job("a hundred rows due later", rows=100), 0.0)
        queue.submit(urgent := job("urgent", deadline=0.5), 0.0)
        assert jobs_of(taken(queue, 0.1))[0] is urgent

    def test_admission_keeps_a_margin(self, job: Callable[..., Job]) -> None:
        """An answer predicted for the last tenth of the time left would often come after it."""
        queue = batcher(gpu())
        queue.submit(job("running"), 0.0)
        taken(queue)
        with pytest.raises(DeadlineUnreachable):
            queue.submit(job("to the millisecond", deadline=0.161), 0.0)
        queue.submit(job("with time to spare", deadline=0.2), 0.0)

    def test_the_margin_grows_with_the_noise(self, job: Callable[..., Job]) -> None:
        latency = LatencyTable((1, 2, 4, 8), (0.08, 0.091, 0.114, 0.160))
        for n in range(200):
            latency.observe(1, 0.08 * (1.5 if n % 2 else 0.5))
        queue = batcher(latency)
        queue.submit(job("running"), 0.0)
        taken(queue)
        with pytest.raises(DeadlineUnreachable):
            queue.submit(job("refused", deadline=0.2), 0.0)

    def test_an_engine_that_hangs_fills_the_queue(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu(), max_queue_wait_s=1.0)
        queue.submit(job("running"), 0.0)
        taken(queue)
        queue.submit(job("soon after"), 0.1)
        with pytest.raises(QueueFull):
            queue.submit(job("long after"), 2.0)

    def test_a_passed_deadline(self, job: Callable[..., Job]) -> None:
        with pytest.raises(DeadlineExceeded):
            batcher().submit(job(deadline=1.0), 1.0)


class TestDropping:
    def test_late_jobs_are_dropped_before_any_work(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu())
        queue.submit(running := job("running"), 0.0)
        first = taken(queue)
        assert jobs_of(first) == [running]
        queue.submit(late := job("late", deadline=0.3), 0.0)
        queue.submit(patient := job("patient"), 0.0)
        queue.finished(first, 0.25)
        decision = queue.take(0.25)
        assert decision.dropped == (late,)
        assert decision.batch is not None
        assert jobs_of(decision.batch) == [patient]
        assert_empty(queue)

    def test_the_rest_of_a_large_job_is_dropped_once_it_is_late(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu())
        queue.submit(large := job("large", rows=40, deadline=1.0), 0.0)
        first = taken(queue, 0.0)
        queue.finished(first, 0.5)
        assert queue.take(0.5).dropped == (large,)
        assert_empty(queue)

    def test_a_smaller_batch_saves_an_urgent_job_while_few_wait(self, job: Callable[..., Job]) -> None:
        queue = batcher(LatencyTable((1, 2, 4, 8), (0.11, 0.21, 0.41, 0.79)))
        queue.submit(urgent := job("urgent", deadline=0.15), 0.0)
        queue.submit(job("patient"), 0.0)
        assert jobs_of(taken(queue)) == [urgent]

    def test_a_full_batch_is_not_made_smaller_for_an_urgent_job(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu(), max_queue_wait_s=10)
        queue.submit(job("running"), 0.0)
        first = taken(queue)
        queue.submit(urgent := job("urgent", deadline=0.2), 0.0)
        for n in range(9):
            queue.submit(job(str(n)), 0.01)
        queue.finished(first, 0.1)
        decision = queue.take(0.1)
        assert decision.dropped == (urgent,)
        assert decision.batch is not None
        assert decision.batch.rows == 8

    def test_a_costly_row_does_not_make_an_urgent_job_late(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu(), max_queue_wait_s=10)
        queue.submit(urgent := job("urgent", deadline=0.1), 0.0)
        queue.submit(job("costly", cost=16.0), 0.0)
        assert jobs_of(taken(queue)) == [urgent]


class TestPriority:
    """A batch has room for four rows; a step is a second."""

    def test_age_decides_in_the_end(self, job: Callable[..., Job]) -> None:
        """A step of priority is worth one `max_queue_wait_s`, and no more."""
        queue = batcher(max_queue_wait_s=1.0)
        queue.submit(job("running"), 0.0)
        first = taken(queue)
        queue.submit(old := job("old", rows=4), 0.1)
        queue._running.clear()  # it has waited, and nothing is predicted
        queue.submit(young := job("young", rows=4, priority=Priority.HIGH), 1.2)
        queue.finished(first, 0.1)
        assert jobs_of(taken(queue, 1.2)) == [old]
        assert jobs_of(taken(queue, 1.2)) == [young]

    def test_the_higher_does_not_wait_for_the_lower(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_wait_s=1.0)
        queue.submit(job("running"), 0.0)
        taken(queue)
        with suppress(Refused):
            for n in range(100):
                queue.submit(job(f"low {n}", rows=4, priority=Priority.LOW), 0.0)
        full = queue.predicted_wait(job(priority=Priority.LOW), 0.0)
        assert full > 0.8
        assert queue.predicted_wait(job(), 0.0) == pytest.approx(0.11)
        queue.submit(urgent := job("urgent", deadline=0.5), 0.0)
        assert jobs_of(taken(queue, 0.1))[0] is urgent

    def test_a_full_queue_is_full_for_its_priority_and_below(self, job: Callable[..., Job]) -> None:
        queue = batcher(max_queue_wait_s=100.0, max_queue_jobs=2)
        queue.submit(job("running"), 0.0)
        taken(queue)
        for name in "ab":
            queue.submit(job(name), 0.0)
        for priority in (Priority.NORMAL, Priority.LOW):
            with pytest.raises(QueueFull):
                queue.submit(job(priority.name, priority=priority), 0.0)
        for name in "cd":
            queue.submit(job(name, priority=Priority.HIGH), 0.0)
        with pytest.raises(QueueFull):
            queue.submit(job("high", priority=Priority.HIGH), 0.0)
        assert queue.queued_jobs == 4

    def test_a_share_is_set_aside_for_the_lower(self, job: Callable[..., Job]) -> None:
        """Ten rows of a higher priority, and one of the lower goes before them all; then ten more."""
        queue = batcher(max_queue_wait_s=1000.0)
        queue.submit(job("running"), 0.0)
        taken(queue)
        for n in range(10):
            queue.submit(job(f"high {n}", priority=Priority.HIGH), 0.0)
        queue.submit(lower := job("lower"), 0.0)
        queue.submit(job("lower too"), 0.0)
        batch = taken(queue, 0.1)
        assert jobs_of(batch)[0] is lower
        assert all(each.priority is Priority.HIGH for each in jobs_of(batch)[1:])


class TestRemoval:
    def test_removed_work_is_waited_for_no_more(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu())
        queue.submit(large := job("large", rows=64), 0.0)
        wait = queue.predicted_wait(job(), 0.0)
        queue.remove(large)
        assert (wait, queue.predicted_wait(job(), 0.0)) == (pytest.approx(0.52), 0.0), "what is due before its own"


class TestPrediction:
    def test_running_and_queued_work_add_up(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu())
        queue.submit(job(rows=8), 0.0)
        taken(queue)
        queue.submit(job(rows=4, cost=2.0), 0.0)
        assert queue.predicted_wait(job(), 0.1) == pytest.approx(0.06 + 0.16)

    def test_what_was_taken_ahead_runs_after_what_runs(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu())
        queue.submit(job("first", rows=8), 0.0)
        first = taken(queue)
        queue.submit(job("second", rows=8), 0.0)
        second = queue.take(0.05, after=first).batch
        assert second is not None
        assert (second.begins, second.predicted_end) == (pytest.approx(0.16), pytest.approx(0.32))
        assert queue.predicted_wait(job(), 0.1) == pytest.approx(0.06 + 0.16)
        assert queue.predicted_wait(job(), 0.2) == pytest.approx(0.04 + 0.16), "the first takes longer"

    def test_runs_that_take_longer_do_not_add_up(self, job: Callable[..., Job], answers: Answers) -> None:
        """An engine that never rests, and always knows its next batch: each run is half as long again as predicted."""
        queue, now = batcher(gpu()), 0.0
        queue.submit(job("0", rows=8), now)
        running = taken(queue)
        for n in range(1, 10):
            queue.submit(job(str(n), rows=8), now)
            following = queue.take(now, after=running).batch
            assert following is not None
            now += 1.5 * running.seconds
            run(running)
            queue.finished(running, None)
            queue.begun(following, now)
            assert queue.predicted_wait(job(), now) == pytest.approx(queue.latency.predict(8))
            assert jobs_of(following)[0].queue_s == pytest.approx(1.5 * running.seconds), "the actual wait"
            running = following

    def test_deadlines_are_judged_by_when_a_batch_taken_ahead_would_end(self, job: Callable[..., Job]) -> None:
        queue = batcher(gpu())
        queue.submit(job("first", rows=8), 0.0)
        first = taken(queue)
        queue.submit(late := job("late", rows=8, deadline=0.5), 0.0)
        assert queue.take(0.2, after=first).batch is not None
        queue.submit(late := job("late", rows=8, deadline=1.0), 0.3)
        decision = queue.take(0.7, after=first)  # the first is 0.54 s late, and expected to be as late again
        assert (decision.batch, decision.dropped) == (None, (late,))


class TestLongJobs:
    """A job of 1,000 rows at 25 rows per second: it alone takes 40 s."""

    ROW_S = 0.04

    def serve(self, queue: Batcher, until: float, every_s: float, small: Callable[[], Job]) -> tuple[list[int], float]:
        """A small job every so often, until the queue is empty: in which second those came that were refused, and when
        the engine stood still."""
        now, due, refused = 0.0, 0.0, []
        while True:
            while due <= min(now, until):
                try:
                    new = small()
                    new.deadline = due + 0.5
                    queue.submit(new, due)
                except Refused:
                    refused.append(int(due))
                due += every_s
            decision = queue.take(now)
            for dropped in decision.dropped:
                dropped.fail(DeadlineExceeded("late"))
            if decision.batch is None:
                return refused, now
            now += decision.batch.rows * self.ROW_S
            run(decision.batch, decision.batch.rows * self.ROW_S)
            queue.finished(decision.batch, decision.batch.rows * self.ROW_S)

    @pytest.fixture
    def queue(self) -> Batcher:
        return batcher(LatencyTable((1, 2, 4, 8), [self.ROW_S * b for b in (1, 2, 4, 8)]))

    @pytest.mark.parametrize("left_s", [math.inf, 80.0])
    def test_they_leave_room(self, queue: Batcher, answers: Answers, job: Callable[..., Job], left_s: float) -> None:
        """Others with half a second bring four tenths of what the engine can take: hardly one is refused."""
        queue.submit(job("long", rows=1000, deadline=left_s), 0.0)
        names = (f"small {n}" for n in range(10_000))
        refused, end = self.serve(queue, 80.0, 0.1, lambda: job(next(names)))
        assert len(refused) <= 10
        assert set(refused) <= {0, 1}, "until it has had its first half second, and what it delayed is made up for"
        assert not answers.errors
        assert "long" in answers.outputs
        assert end == pytest.approx(40 / 0.6, abs=0.5), "it has what they leave"

    def test_they_keep_their_half(self, queue: Batcher, answers: Answers, job: Callable[..., Job]) -> None:
        """Others bring twice what the engine can take, of equal priority; the deadline is met."""
        queue.submit(job("long", rows=1000, deadline=100.0), 0.0)
        names = (f"small {n}" for n in range(10_000))
        refused, _ = self.serve(queue, 100.0, 0.02, lambda: job(next(names)))
        assert "long" in answers.outputs
        answered = len(answers.outputs) - 1
        assert 0.4 * 100 / self.ROW_S <= answered <= 0.65 * 100 / self.ROW_S
        assert answered + len(answers.errors) + len(refused) == 5001
        assert len(answers.errors) <= 0.01 * answered

    def test_alone_they_have_the_whole_engine(self, queue: Batcher, answers: Answers, job: Callable[..., Job]) -> None:
        queue.submit(job("long", rows=1000), 0.0)
        _, end = self.serve(queue, -1.0, 1.0, job)
        assert end == pytest.approx(40.0)
        assert answers.outputs["long"][0].tolist() == list(range(0, 10_000, 10))

    def test_one_at_a_time(self, queue: Batcher, job: Callable[..., Job]) -> None:
        """The next may come back when the first will have run."""
        queue.submit(job("long", rows=1000), 0.0)
        taken(queue)
        with pytest.raises(QueueFull) as refusal:
            queue.submit(job("second", rows=1000), 0.0)
        assert refusal.value.retry_after_s == pytest.approx(39.0, abs=0.2)

    def test_what_went_leaves_nothing_behind(self, queue: Batcher, job: Callable[..., Job]) -> None:
        queue.submit(long := job("long", rows=1000), 0.0)
        queue.submit(job("small"), 0.0)
        for _ in range(30):
            queue.finished(taken(queue), None)
        queue.submit(small := job("other"), 0.0)
        assert queue.remove(long)
        assert queue.predicted_wait(job(), 0.0) == pytest.approx(self.ROW_S)
        assert queue.remove(small)
        assert queue.idle
