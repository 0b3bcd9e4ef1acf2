"""What priorities do to those above and below while more comes than can be computed, in simulated time."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga.plan.simulation import Curve, Report, SimulatedRequest, poisson, simulate
from rafaga.priority import Priority
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy

GPU = Curve(0.00387, 0.000129, noise=0.1, stall=3.0, stall_probability=0.005)
WAIT_S = 0.2
SECONDS = 2.0


def under(
    loads: dict[Priority, float], deadline_s: float = 0.1, curve: Curve = GPU, seconds: float = SECONDS, seed: int = 1
) -> Report:
    """`loads`: offered rows over what the engine can do, by priority."""

    def request(rng: Random) -> SimulatedRequest:
        (priority,) = rng.choices(list(loads), list(loads.values()))
        return SimulatedRequest(deadline_s, priority=priority)

    batcher = Batcher(BatchPolicy(max_queue_wait_s=WAIT_S), curve.table())
    arrivals = poisson(curve.peak() * sum(loads.values()), seconds, request, Random(seed))
    return simulate(batcher, curve.sample, arrivals, seconds, seed=seed + 1, warm_up_s=seconds / 4)


@pytest.mark.parametrize("deadline_s", [0.1, math.inf])
def test_a_flood_from_below_costs_those_above_little(deadline_s: float) -> None:
    alone = under({Priority.HIGH: 0.5}, deadline_s)
    flooded = under({Priority.HIGH: 0.5, Priority.NORMAL: 2.0, Priority.LOW: 2.0}, deadline_s)
    assert flooded.good_of[Priority.HIGH] >= 0.95 * alone.good_of[Priority.HIGH]
    # What is left goes to the next below, save what is set aside for the last.
    left = flooded.good_of[Priority.NORMAL] + flooded.good_of[Priority.LOW]
    assert left >= 0.8 * 0.5 * GPU.peak() * flooded.seconds
    assert flooded.good_of[Priority.NORMAL] > 2 * flooded.good_of[Priority.LOW]


@pytest.mark.parametrize("deadline_s", [0.1, math.inf])
def test_a_flood_from_above_leaves_a_share(deadline_s: float) -> None:
    """A tenth of what those above it get, for each."""
    flooded = under({Priority.HIGH: 5.0, Priority.NORMAL: 0.5, Priority.LOW: 0.5}, deadline_s)
    assert flooded.good_of[Priority.NORMAL] >= 0.08 * flooded.good_of[Priority.HIGH]
    assert flooded.good_of[Priority.LOW] >= 0.08 * flooded.good_of[Priority.HIGH]
    assert flooded.good_of[Priority.HIGH] >= 0.75 * flooded.good


@pytest.mark.parametrize(
    ("load", "deadline_s"),
    [(5, 0.1), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((2, 0.1), (2, math.inf), (5, math.inf)))],
)
def test_goodput_holds_under_overload_of_all_priorities(load: float, deadline_s: float) -> None:
    peak = max(under({Priority.NORMAL: each}, deadline_s).goodput for each in (0.9, 1.0, 1.2))
    mixed = under(dict.fromkeys(Priority, load / 3), deadline_s)
    assert mixed.goodput >= 0.9 * peak
    assert mixed.wasted <= 0.03


def test_below_saturation_every_priority_is_served() -> None:
    report = under(dict.fromkeys(Priority, 0.25))
    assert report.good >= 0.98 * report.offered


@settings(max_examples=25)
@given(
    high=st.floats(0.0, 6.0),
    normal=st.floats(0.01, 3.0),
    low=st.floats(0.01, 3.0),
    fixed_s=st.floats(0.0, 0.02),
    row_s=st.floats(0.0002, 0.01),
    seed=st.integers(0, 1000),
)
def test_no_accepted_job_waits_forever(
    high: float, normal: float, low: float, fixed_s: float, row_s: float, seed: int
) -> None:
    """Without deadlines: age overtakes every step of priority, whatever comes from above."""
    curve = Curve(fixed_s, row_s)
    loads = {Priority.HIGH: high, Priority.NORMAL: normal, Priority.LOW: low}
    report = under(loads, math.inf, curve, seconds=600 / curve.peak(), seed=seed)
    batches_s = 3 * curve.mean(32)
    for priority, longest_s in report.longest_s.items():
        assert longest_s <= (priority + 1) * WAIT_S + batches_s
