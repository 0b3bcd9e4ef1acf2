"""How much of the engine's time becomes answers in time, below and far above what it can do, and what priorities do to
those above and below: in simulated time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga.plan.simulation import Curve, Report, SimulatedRequest, poisson, simulate
from rafaga.priority import Priority
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.latency import LatencyTable

NOISE = {"noise": 0.1, "stall": 3.0, "stall_probability": 0.005}
GPU = Curve(0.00387, 0.000129, **NOISE)


@dataclass(frozen=True)
class Service:
    """A model, the time its callers have, and for how long it is watched. ahead: see `simulate`."""

    curve: Curve
    deadline_s: float
    seconds: float
    ahead: bool = False
    policy: BatchPolicy = field(default_factory=BatchPolicy)

    def under(
        self,
        load: float,
        *,
        latency: LatencyTable | None = None,
        request: Callable[[Random], SimulatedRequest] | None = None,
        warm_up: float = 0.25,
        engines: int = 1,
        seed: int = 1,
    ) -> Report:
        """`load`: offered rows over what the engines can do. `warm_up`: the share of the time that is not counted."""
        batcher = Batcher(self.policy, latency or self.curve.table(), engines)
        request = request or (lambda _: SimulatedRequest(self.deadline_s))
        arrivals = poisson(self.curve.peak() * engines * load, self.seconds, request, Random(seed))
        warm_up_s = self.seconds * warm_up
        return simulate(batcher, self.curve.sample, arrivals, self.seconds, seed + 1, warm_up_s, self.ahead)


SERVICES = {
    "ResNet-50 on a CPU": Service(Curve(0.0, 0.020, **NOISE), 0.5, 40.0),
    "ResNet-50 on a CPU, better in batches": Service(Curve(0.008, 0.018, **NOISE), 0.5, 40.0),
    "a GPU: 32 rows in twice the time of one": Service(GPU, 0.1, 0.6),
    "a GPU, three batches of time": Service(GPU, 0.025, 2.0),
    "LeNet-5": Service(Curve(60e-6, 10e-6, **NOISE), 0.02, 0.05),
}
TWO = ["ResNet-50 on a CPU", "a GPU, three batches of time"]


NIGHTLY = pytest.mark.nightly


@functools.cache
def peak_of(service: Service) -> float:
    return max(service.under(load).goodput for load in (0.9, 1.0, 1.2))


@pytest.mark.parametrize(
    ("name", "ahead", "engines"),
    [
        *((name, False, 1) for name in SERVICES),
        *(pytest.param(name, True, 1, marks=[] if name in TWO else NIGHTLY) for name in SERVICES),
        *((name, False, 2) for name in TWO),
        *(pytest.param(name, False, 4, marks=NIGHTLY) for name in TWO),
    ],
)
def test_goodput_holds_under_overload(name: str, ahead: bool, engines: int) -> None:
    """ahead: the batches run one by one, or one is taken ahead."""
    one = dataclasses.replace(SERVICES[name], ahead=ahead)
    peak = engines * peak_of(one)
    # Otherwise a batcher that never gets far would pass: its peak would be low too.
    assert peak >= 0.95 * engines * one.curve.peak()
    service = dataclasses.replace(one, seconds=one.seconds / engines)
    moderate, double, fivefold = (service.under(load, engines=engines) for load in (0.8, 2, 5))
    assert moderate.good >= 0.97 * moderate.offered
    assert double.goodput >= 0.95 * peak
    assert fivefold.goodput >= 0.9 * peak
    # Overload is refused on arrival: few requests are dropped in the queue or answered too late.
    for report in (double, fivefold):
        assert report.dropped <= 0.03 * report.offered
        # A run that stalls makes what was taken ahead late as well.
        assert report.wasted <= (0.025 if ahead else 0.01)


def test_a_long_request_on_several_engines() -> None:
    """1,024 rows among short requests that want 0.4 of two engines: few are refused, none is late."""
    cpu = dataclasses.replace(SERVICES["ResNet-50 on a CPU"], curve=Curve(0.0, 0.020), seconds=40.0)
    short = poisson(cpu.curve.peak() * 2 * 0.4, cpu.seconds, lambda _: SimulatedRequest(cpu.deadline_s), Random(1))
    arrivals = itertools.chain([(0.0, SimulatedRequest(60.0, rows=1024))], short)
    batcher = Batcher(BatchPolicy(), cpu.curve.table(), 2)
    report = simulate(batcher, cpu.curve.sample, arrivals, 2 * cpu.seconds)
    assert report.late == report.dropped == 0
    assert report.refused <= 0.02 * report.offered
    assert max(report.latencies) <= 60.0


@pytest.mark.parametrize("scale", [0.05, 20.0, None])
@pytest.mark.parametrize("name", TWO)
def test_wrong_predictions_heal_under_load(name: str, scale: float | None) -> None:
    """A warm-up that measured a twentieth, or twenty times, of what runs take; or runs that took ten times as long for
    a while: no lock-up, though nothing is idle."""
    service = SERVICES[name]
    wrong = service.curve.table(scale=scale or 1.0)
    if scale is None:
        for rows in 40 * (1, 4, 32):
            wrong.observe(rows, 10 * service.curve.mean(rows))
    healed = service.under(2, latency=wrong, warm_up=0.75)
    assert healed.goodput >= 0.9 * service.under(2, warm_up=0.75).goodput


def test_requests_of_many_rows() -> None:
    gpu = SERVICES["a GPU: 32 rows in twice the time of one"]
    one, two, five = (
        gpu.under(load / 32.5, request=lambda rng: SimulatedRequest(0.2, rows=rng.randint(1, 64))) for load in (1, 2, 5)
    )
    assert min(two.goodput, five.goodput) >= 0.95 * one.goodput
    assert all(report.dropped <= 0.02 * report.offered for report in (one, two, five))


def test_series_of_all_lengths() -> None:
    """Under overload, batches of like lengths compute nearly as much as without any padding."""
    lstm, mean_cost = Service(Curve(0.004, 0.001, **NOISE), 1.0, 5.0), 0.525
    moderate, double = (
        lstm.under(load / mean_cost, request=lambda rng: SimulatedRequest(1.0, cost=rng.uniform(0.05, 1.0)))
        for load in (0.7, 2)
    )
    assert moderate.good >= 0.97 * moderate.offered
    assert double.goodput >= 0.75 * lstm.curve.peak() / mean_cost
    assert double.dropped <= 0.03 * double.offered


def test_a_lone_caller_does_not_wait() -> None:
    """Far below saturation the answer takes one run: batching adds nothing."""
    curve = Curve(0.0, 0.020)
    report = Service(curve, 0.5, 100.0).under(0.01)
    assert report.percentile(50) == pytest.approx(curve.mean(1))


WAIT_S = 0.2


def mixed(
    loads: dict[Priority, float], deadline_s: float = 0.1, curve: Curve = GPU, seconds: float = 2.0, seed: int = 1
) -> Report:
    """`loads`: offered rows over what the engine can do, by priority."""

    def request(rng: Random) -> SimulatedRequest:
        (priority,) = rng.choices(list(loads), list(loads.values()))
        return SimulatedRequest(deadline_s, priority=priority)

    service = Service(curve, deadline_s, seconds, policy=BatchPolicy(max_queue_wait_s=WAIT_S))
    return service.under(sum(loads.values()), request=request, seed=seed)


@pytest.mark.parametrize("deadline_s", [0.1, math.inf])
def test_a_flood_from_below_costs_those_above_little(deadline_s: float) -> None:
    alone = mixed({Priority.HIGH: 0.5}, deadline_s)
    flooded = mixed({Priority.HIGH: 0.5, Priority.NORMAL: 2.0, Priority.LOW: 2.0}, deadline_s)
    assert flooded.good_of[Priority.HIGH] >= 0.95 * alone.good_of[Priority.HIGH]
    # What is left goes to the next below, save what is set aside for the last.
    left = flooded.good_of[Priority.NORMAL] + flooded.good_of[Priority.LOW]
    assert left >= 0.8 * 0.5 * GPU.peak() * flooded.seconds
    assert flooded.good_of[Priority.NORMAL] > 2 * flooded.good_of[Priority.LOW]


@pytest.mark.parametrize("deadline_s", [0.1, math.inf])
def test_a_flood_from_above_leaves_a_share(deadline_s: float) -> None:
    """A tenth of what those above it get, for each."""
    flooded = mixed({Priority.HIGH: 5.0, Priority.NORMAL: 0.5, Priority.LOW: 0.5}, deadline_s)
    assert flooded.good_of[Priority.NORMAL] >= 0.08 * flooded.good_of[Priority.HIGH]
    assert flooded.good_of[Priority.LOW] >= 0.08 * flooded.good_of[Priority.HIGH]
    assert flooded.good_of[Priority.HIGH] >= 0.75 * flooded.good


@pytest.mark.parametrize(
    ("load", "deadline_s"),
    [(5, 0.1), *(pytest.param(*case, marks=NIGHTLY) for case in ((2, 0.1), (2, math.inf), (5, math.inf)))],
)
def test_goodput_holds_under_overload_of_all_priorities(load: float, deadline_s: float) -> None:
    peak = max(mixed({Priority.NORMAL: each}, deadline_s).goodput for each in (0.9, 1.0, 1.2))
    all_three = mixed(dict.fromkeys(Priority, load / 3), deadline_s)
    assert all_three.goodput >= 0.9 * peak
    assert all_three.wasted <= 0.03


def test_below_saturation_every_priority_is_served() -> None:
    report = mixed(dict.fromkeys(Priority, 0.25))
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
    report = mixed(loads, math.inf, curve, seconds=600 / curve.peak(), seed=seed)
    batches_s = 3 * curve.mean(32)
    for priority, longest_s in report.longest_s.items():
        assert longest_s <= (priority + 1) * WAIT_S + batches_s
