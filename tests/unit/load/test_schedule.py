"""Schedules are pure functions of a seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafaga.load import schedule
from rafaga.load.schedule import Pattern, SchedulePart
from rafaga.load.steps import Step


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = schedule.poisson(1000, -1, 60, np.random.default_rng(1))
    assert (np.diff(times) >= 0).all()
    assert times[0] >= -1
    assert times[-1] < 60
    gaps = np.diff(times)
    # Exponential gaps: mean and standard deviation are both 1/rate.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps.std() == pytest.approx(1e-3, rel=0.02)
    per_second = np.histogram(times, np.arange(-1, 61))[0]
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.5)


def test_a_mix_draws_by_weight() -> None:
    drawn = schedule.mix([3, 0, 1], 100_000, np.random.default_rng(2))
    counts = np.bincount(drawn, minlength=3)
    assert counts[1] == 0
    assert counts[0] / counts[2] == pytest.approx(3, rel=0.05)


def test_a_schedule_is_a_function_of_its_seed() -> None:
    step = Step(Pattern.POISSON, rate=100, warm_up_s=1, duration_s=5, seed=3)
    first, again = step.schedule([1, 1]), step.schedule([1, 1])
    np.testing.assert_array_equal(first.due_s, again.due_s)
    np.testing.assert_array_equal(first.request, again.request)
    other = Step(Pattern.POISSON, rate=100, warm_up_s=1, duration_s=5, seed=4).schedule([1, 1])
    assert not np.array_equal(first.due_s[:50], other.due_s[:50])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 200))
def test_shares_of_machines_and_processes_are_the_schedule_each_request_once(
    machines: int, processes: int, count: int
) -> None:
    whole = schedule.Schedule(np.arange(count, dtype=np.float64), np.arange(count))
    parts = [SchedulePart(m, machines).split(p, processes) for m in range(machines) for p in range(processes)]
    shares = [whole.share(part) for part in parts]
    assert sorted(np.concatenate([s.request for s in shares]).tolist()) == list(range(count))
    assert sum(part.take(count) for part in parts) == count
    assert max(len(s.due_s) for s in shares) - min(len(s.due_s) for s in shares) <= 1
