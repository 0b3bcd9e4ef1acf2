"""A simulated replica against queueing theory, where theory has an answer."""

from __future__ import annotations

import math

import pytest

from rafaga.plan.replica import BatchSettings, Replica
from tests.unit.plan.profiles import EXPONENTIAL, profile

ALONE = BatchSettings(max_batch_size=1, max_queue_wait_ms=60_000)
REQUESTS = 20_000


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_an_engine_without_batches_is_an_m_m_1_queue(load: float) -> None:
    """Exponential runs of 10 ms on average, one at a time: the time in the system is exponential too."""
    outcome = Replica(profile([10], run_spread=EXPONENTIAL), 1000).under(100 * load, ALONE, REQUESTS)
    left = 100 * (1 - load)
    assert outcome.p50_ms == pytest.approx(1e3 * math.log(2) / left, rel=0.1)
    assert outcome.p99_ms == pytest.approx(1e3 * math.log(100) / left, rel=0.15)
    assert outcome.engine_busy == pytest.approx(load, rel=0.05)
    assert outcome.mean_batch_rows == 1


def test_a_transport_that_varies_is_one_too() -> None:
    """Fitted to a mean wait that an exponential station has at half its rate, it is that station at any other."""
    calls = {"crowded_rate": 100.0, "shared_rate": 50.0, "call_ms": 10.0, "shared_call_ms": 20.0}
    outcome = Replica(profile([1e-3], **calls), 1000).under(70, ALONE, REQUESTS)
    assert outcome.p50_ms == pytest.approx(1e3 * math.log(2) / 30, rel=0.1)
    assert outcome.p99_ms == pytest.approx(1e3 * math.log(100) / 30, rel=0.15)
    assert outcome.transport_busy == pytest.approx(0.7)


def test_what_waiting_does_not_explain_is_delay() -> None:
    """A station that is hardly used cannot make calls wait; a lone caller's time over it is delay as well."""
    calls = {"crowded_rate": 1000.0, "shared_rate": 1.0, "call_ms": 3.0, "shared_call_ms": 8.0}
    outcome = Replica(profile([1e-3], **calls), 1000).under(1, ALONE, 2000)
    assert outcome.p50_ms == pytest.approx(8, rel=0.2)


def test_batches_grow_with_the_load() -> None:
    gpu = profile([4 + 0.13 * (1 << k) for k in range(6)])
    settings = BatchSettings(32)
    low, high = (Replica(gpu, 50).under(rate, settings, 20_000) for rate in (20, 3000))
    assert low.mean_batch_rows < 1.2
    assert 10 < high.mean_batch_rows <= 32
    assert low.met is high.met is True
    assert low.p50_ms == pytest.approx(4.13, rel=0.05)


def test_several_instances_run_at_once() -> None:
    """With one, a load of 1.4 runs would be refused."""
    outcome = Replica(profile([10], instances=2), 1000).under(140, ALONE, REQUESTS)
    assert outcome.met
    assert outcome.engine_busy == pytest.approx(0.7, rel=0.05)


def test_under_overload_accepted_requests_are_answered_in_time() -> None:
    """The wait that is recommended leaves time for the answer: twice the load, half of the requests, all in time."""
    replica = Replica(profile([10]), 200)
    settings = BatchSettings(1, max_queue_wait_ms=replica.queue_wait_ms(1))
    outcome = replica.under(200, settings, 10_000)
    assert not outcome.met
    assert outcome.within == pytest.approx(0.5, abs=0.05)
    assert outcome.refused == pytest.approx(0.5, abs=0.05)
    assert outcome.p99_ms <= 200
