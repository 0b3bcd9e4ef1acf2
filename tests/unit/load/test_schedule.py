"""Schedules are pure functions of a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafaga.load import schedule
from rafaga.load.schedule import Pattern, SchedulePart
from rafaga.load.steps import Step


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = schedule.poisson(1000, -1, 60, np.random.default_rng(1))
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert -1 <= times[0] < times[-1] < 60
    # Exponential gaps: mean and standard deviation are both 1/rate.
    assert (gaps.mean(), gaps.std()) == pytest.approx((1e-3, 1e-3), rel=0.02)
    per_second = np.histogram(times, np.arange(-1, 61))[0]
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.5)


def test_a_schedule_is_a_function_of_its_seed_and_draws_by_weight() -> None:
    step = Step(Pattern.POISSON, rate=1000, warm_up_s=1, duration_s=50, seed=3)
    first, again, other = (each.schedule([3, 0, 1]) for each in (step, step, replace(step, seed=4)))
    np.testing.assert_array_equal(first.due_s, again.due_s)
    np.testing.assert_array_equal(first.request, again.request)
    assert not np.array_equal(first.due_s[:50], other.due_s[:50])
    drawn = np.bincount(first.request, minlength=3)
    assert (drawn[1], drawn[0] / drawn[2]) == (0, pytest.approx(3, rel=0.05))


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
