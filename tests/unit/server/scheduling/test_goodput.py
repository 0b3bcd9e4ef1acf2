"""How much of the engine's time becomes answers in time, below and far above what it can do, in simulated time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest

from rafaga.plan.simulation import Curve, Report, SimulatedRequest, poisson, simulate
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.latency import LatencyTable

NOISE = {"noise": 0.1, "stall": 3.0, "stall_probability": 0.005}


@dataclass(frozen=True)
class Service:
    """A model, the time its callers have, and for how long it is watched. ahead: see `simulate`."""

    curve: Curve
    deadline_s: float
    seconds: float
    ahead: bool = False

    def under(
        self,
        load: float,
        *,
        latency: LatencyTable | None = None,
        request: Callable[[Random], SimulatedRequest] | None = None,
        warm_up: float = 0.25,
        engines: int = 1,
    ) -> Report:
        """`load`: offered rows over what the engines can do. `warm_up`: the share of the time that is not counted."""
        batcher = Batcher(BatchPolicy(), latency or self.curve.table(), engines)
        request = request or (lambda _: SimulatedRequest(self.deadline_s))
        arrivals = poisson(self.curve.peak() * engines * load, self.seconds, request, Random(1))
        warm_up_s = self.seconds * warm_up
        return simulate(batcher, self.curve.sample, arrivals, self.seconds, 2, warm_up_s, self.ahead)


SERVICES = {
    "ResNet-50 on a CPU": Service(Curve(0.0, 0.020, **NOISE), 0.5, 40.0),
    "ResNet-50 on a CPU, better in batches": Service(Curve(0.008, 0.018, **NOISE), 0.5, 40.0),
    "a GPU: 32 rows in twice the time of one": Service(Curve(0.00387, 0.000129, **NOISE), 0.1, 1.0),
    "a GPU, three batches of time": Service(Curve(0.00387, 0.000129, **NOISE), 0.025, 2.0),
    "LeNet-5": Service(Curve(60e-6, 10e-6, **NOISE), 0.02, 0.05),
}


TWO = ["ResNet-50 on a CPU", "a GPU, three batches of time"]


@pytest.mark.parametrize(
    ("name", "ahead"),
    [
        *((name, False) for name in SERVICES),
        *(pytest.param(name, True, marks=[] if name in TWO else pytest.mark.nightly) for name in SERVICES),
    ],
)
def test_goodput_holds_under_overload(name: str, ahead: bool) -> None:
    """ahead: the batches run one by one, or one is taken ahead."""
    service = dataclasses.replace(SERVICES[name], ahead=ahead)
    moderate, double, fivefold = (service.under(load) for load in (0.8, 2, 5))
    peak = max(service.under(load).goodput for load in (0.9, 1.0, 1.2))
    assert moderate.good >= 0.97 * moderate.offered
    # Otherwise a batcher that never gets far would pass: its peak would be low too.
    assert peak >= 0.95 * service.curve.peak()
    assert double.goodput >= 0.95 * peak
    assert fivefold.goodput >= 0.9 * peak
    # Overload is refused on arrival: few requests are dropped in the queue or answered too late.
    for report in (double, fivefold):
        assert report.dropped <= 0.03 * report.offered
        # A run that stalls makes what was taken ahead late as well.
        assert report.wasted <= (0.025 if ahead else 0.01)


@pytest.mark.parametrize("engines", [2, pytest.param(4, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", TWO)
def test_goodput_of_several_engines(name: str, engines: int) -> None:
    """So many times that of one, with as little waste."""
    service = dataclasses.replace(SERVICES[name], seconds=SERVICES[name].seconds / engines)
    one = SERVICES[name].under(1.2)
    moderate, double, fivefold = (service.under(load, engines=engines) for load in (0.8, 2, 5))
    assert moderate.good >= 0.97 * moderate.offered
    for report in (double, fivefold):
        assert report.goodput >= 0.95 * engines * one.goodput
        assert report.dropped <= 0.03 * report.offered
        assert report.wasted <= 0.01


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


@pytest.mark.parametrize("scale", [0.05, 20.0])
@pytest.mark.parametrize("name", TWO)
def test_wrong_predictions_heal_under_load(name: str, scale: float) -> None:
    """A warm-up that measured a twentieth, or twenty times, of what runs take: no lock-up, though nothing is idle."""
    service = SERVICES[name]
    wrong = service.under(2, latency=service.curve.table(scale=scale), warm_up=0.75)
    assert wrong.goodput >= 0.9 * service.under(2, warm_up=0.75).goodput


@pytest.mark.parametrize("name", TWO)
def test_a_bad_spell_is_forgotten(name: str) -> None:
    """Every run takes ten times as long for a while; then goodput is again what it was."""
    service = SERVICES[name]
    latency = service.curve.table()
    for _ in range(40):
        for rows in (1, 4, 32):
            latency.observe(rows, 10 * service.curve.mean(rows))
    after = service.under(2, latency=latency, warm_up=0.75)
    assert after.goodput >= 0.9 * service.under(2, warm_up=0.75).goodput


def test_requests_of_many_rows() -> None:
    gpu = SERVICES["a GPU: 32 rows in twice the time of one"]

    def request(rng: Random) -> SimulatedRequest:
        return SimulatedRequest(0.2, rows=rng.randint(1, 64))

    reports = [gpu.under(load / 32.5, request=request) for load in (1, 2, 5)]
    assert min(r.goodput for r in reports[1:]) >= 0.95 * reports[0].goodput
    assert max(r.dropped / r.offered for r in reports) <= 0.02


def test_series_of_all_lengths() -> None:
    """Under overload, batches of like lengths compute nearly as much as without any padding."""
    lstm = Service(Curve(0.004, 0.001, **NOISE), 1.0, 5.0)

    def request(rng: Random) -> SimulatedRequest:
        return SimulatedRequest(lstm.deadline_s, cost=rng.uniform(0.05, 1.0))

    mean_cost = 0.525
    moderate, double = (lstm.under(load / mean_cost, request=request) for load in (0.7, 2))
    assert moderate.good >= 0.97 * moderate.offered
    assert double.goodput >= 0.75 * lstm.curve.peak() / mean_cost
    assert double.dropped <= 0.03 * double.offered


def test_a_lone_caller_does_not_wait() -> None:
    """Far below saturation the answer takes one run: batching adds nothing."""
    curve = Curve(0.0, 0.020)
    report = Service(curve, 0.5, 100.0).under(0.01)
    assert report.percentile(50) == pytest.approx(curve.mean(1))
