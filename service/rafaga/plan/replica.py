"""One replica of a profile in simulated time: calls arrive, the real batcher queues them, a simulated engine runs.

The transport is modelled before the batcher, by a station that serves one call after the other, at the highest measured
rate, and by a delay without a limit on concurrency. How much the station varies, and hence how long calls wait for each
other, is fitted to the profile's random arrivals by the mean wait of an M/G/1 queue (Pollaczek-Khinchine).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from rafaga.plan.profile import LEVELS, Profile
from rafaga.plan.simulation import SimulatedRequest, simulate
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.latency import DISPATCH_S, LatencyTable, buckets_up_to

# The share of a simulation that fills the queues and is not counted.
_WARM_UP = 0.1
# Largest squared coefficient of variation of the station: the rest of the wait is modelled as delay.
_MAX_VARIATION = 4.0


@dataclass(frozen=True)
class BatchSettings:
    """Settings of `rafaga serve`, under the same names."""

    max_batch_size: int
    max_queue_delay_us: int = 0
    max_queue_wait_ms: int = 1000


@dataclass(frozen=True)
class ReplicaOutcome:
    """What the callers of one replica see. rate: offered requests per second. Latencies are those of answers.

    within: share of all requests that were answered within the objective. mean_batch_rows: per run. engine_busy and
    transport_busy: shares of the time.
    """

    rate: float
    p50_ms: float
    p99_ms: float
    within: float
    refused: float
    mean_batch_rows: float
    engine_busy: float
    transport_busy: float

    @property
    def met(self) -> bool:
        return self.within >= 0.99


class Replica:
    """slo_p99_ms: 99 of 100 requests answered within. requests: how many each simulation sends."""

    def __init__(self, profile: Profile, slo_p99_ms: float, seed: int = 0) -> None:
        self._profile = profile
        self._slo_p99_ms = slo_p99_ms
        self._seed = seed
        self._station_s = min(profile.call_ms / 1e3, 1 / profile.crowded_rate)
        busy = min(0.99, profile.shared_rate * self._station_s)
        constant_wait_s = busy * self._station_s / (2 * (1 - busy))
        beside_s = max(0.0, profile.shared_call_ms / 1e3 - self._station_s)
        waits_s = beside_s - (profile.call_ms / 1e3 - self._station_s)
        self._variation = min(max(waits_s / constant_wait_s - 1, 0.0), _MAX_VARIATION)
        self._delay_s = max(0.0, beside_s - constant_wait_s * (1 + self._variation))

    def buckets(self, max_batch_size: int) -> tuple[int, ...]:
        """At most the largest observed batch: the server found larger ones no better, with any number of callers."""
        return buckets_up_to(min(max_batch_size, self._profile.largest_batch))

    def queue_wait_ms(self, max_batch_size: int) -> int:
        """The longest wait that leaves time for the answer: requests that would wait longer are refused at once."""
        left_s = (
            self._slo_p99_ms / 1e3
            - self._profile.run_s(self.buckets(max_batch_size)[-1])
            - self._station_s
            - self._delay_s
        )
        return max(1, round(left_s * 1e3))

    def under(self, rate: float, settings: BatchSettings, requests: int) -> ReplicaOutcome:
        """`requests` Poisson arrivals at `rate` per second."""
        rng = np.random.default_rng(self._seed)
        count = round(requests * (1 + _WARM_UP))
        due_s = np.cumsum(rng.exponential(1 / rate, count))
        served_s = np.full(count, self._station_s)
        if self._variation:
            served_s = rng.gamma(1 / self._variation, self._station_s * self._variation, count)
        delay_s = self._delay_s * np.interp(rng.uniform(0, 100, count), LEVELS, self._profile.call_spread)
        # One after the other (Lindley's recursion): a call starts when it has arrived and the one before has left.
        done_s = np.cumsum(served_s)
        through_s = done_s + np.maximum.accumulate(due_s - (done_s - served_s))
        before_s = through_s - due_s + delay_s
        end_s = float(through_s[-1])
        warm_up_s = float(through_s[count - requests])
        profile = self._profile

        def calls() -> Iterator[tuple[float, SimulatedRequest]]:
            for at_s, waited_s in zip(through_s.tolist(), before_s.tolist(), strict=True):
                yield at_s, SimulatedRequest(float("inf"), profile.request_rows, waited_s=waited_s)

        def sample(rows: int, cost: float, random: Random) -> float:
            return profile.run_s(rows) * float(np.interp(random.uniform(0, 100), LEVELS, profile.run_spread))

        buckets = self.buckets(settings.max_batch_size)
        policy = BatchPolicy(settings.max_queue_delay_us / 1e6, settings.max_queue_wait_ms / 1e3)
        latency = LatencyTable(buckets, [profile.run_s(b) + DISPATCH_S for b in buckets])
        batcher = Batcher(policy, latency, profile.instances)
        report = simulate(batcher, sample, calls(), end_s, seed=self._seed, warm_up_s=warm_up_s)
        latencies_ms = 1e3 * np.asarray(report.latencies or [np.inf])
        offered = report.offered / profile.request_rows
        p50_ms, p99_ms = np.percentile(latencies_ms, (50, 99)).tolist() if report.latencies else (np.inf, np.inf)
        return ReplicaOutcome(
            rate=rate,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            within=float((latencies_ms <= self._slo_p99_ms).sum() / max(1.0, offered)),
            refused=report.refused / max(1, report.offered),
            mean_batch_rows=report.run / max(1, report.batches),
            engine_busy=min(1.0, report.busy_s / report.seconds / profile.instances),
            transport_busy=min(1.0, rate * self._station_s),
        )
