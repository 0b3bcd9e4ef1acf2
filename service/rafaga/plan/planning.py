"""From the capacity of one replica to the number of replicas, and their batching settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rafaga.load.search import search
from rafaga.plan.profile import Profile
from rafaga.plan.replica import BatchSettings, Replica, ReplicaOutcome
from rafaga.server.scheduling.latency import buckets_up_to

# Requests per simulation: during the search, and for reported figures, whose p99 depends on a hundredth of them.
_SEARCH_REQUESTS = 5_000
_TOLD_REQUESTS = 30_000
# How far the highest rate may lie below one that missed, and by how much other settings must be better to be chosen.
_PRECISION = 0.03
_WORTH_IT = 1.03
# A measured p99 above this multiple of the simulated one is more than noise: the model is incomplete.
_FAR_APART = 1.5
# If halving the batch size costs this much, halving it again is not tried.
_HOPELESS = 0.6


class Unreachable(Exception):
    """No number of replicas meets the objective."""


@dataclass(frozen=True)
class Considered:
    """Settings, and the highest rate in requests per second at which one replica with them meets the objective."""

    settings: BatchSettings
    max_rate: float


@dataclass(frozen=True)
class Check:
    """A load under which the replica was measured, and the simulation's figures for it."""

    rate: float
    measured_p50_ms: float
    measured_p99_ms: float
    simulated_p50_ms: float
    simulated_p99_ms: float

    @property
    def failed(self) -> bool:
        """Callers waited far longer than in the simulation. The opposite only makes plans conservative."""
        return self.measured_p99_ms > _FAR_APART * self.simulated_p99_ms


@dataclass(frozen=True)
class Plan:
    """Rates are requests per second.

    headroom_asked and headroom: shares by which the rate may grow, as requested and as planned. with_all: a replica
    while all are up; with_one_lost: a replica after the loss of one, None if none is left. replicas_to_lose_one: how
    many meet the objective, without headroom, after the loss of one.
    """

    model: str
    engine: str
    instances: int
    rate: float
    slo_p99_ms: float
    headroom_asked: float
    replicas: int
    settings: BatchSettings
    max_rate_per_replica: float
    headroom: float
    with_all: ReplicaOutcome
    with_one_lost: ReplicaOutcome | None
    replicas_to_lose_one: int
    considered: tuple[Considered, ...]
    check: Check | None
    measured: str
    server: str
    warnings: tuple[str, ...]


def plan(
    profile: Profile,
    rate: float,
    slo_p99_ms: float,
    headroom: float = 0.0,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Raises Unreachable. note: called with one line per setting that was tried."""
    replica = Replica(profile, slo_p99_ms, seed)
    considered: list[Considered] = []

    def consider(settings: BatchSettings) -> Considered:
        considered.append(Considered(settings, _max_rate(profile, replica, settings)))
        note(
            f"batches of up to {settings.max_batch_size}, delay {settings.max_queue_delay_us} µs: "
            f"{considered[-1].max_rate:,.1f} requests/s per replica"
        )
        return considered[-1]

    # The largest is a server's default.
    sizes = (size for size in reversed(buckets_up_to(profile.largest_batch)) if size < profile.largest_batch)
    chosen = consider(BatchSettings(profile.max_batch_size, 0, replica.queue_wait_ms(profile.max_batch_size)))
    for size in sizes:
        tried = consider(BatchSettings(size, 0, replica.queue_wait_ms(size)))
        if tried.max_rate < _HOPELESS * chosen.max_rate:
            break
        chosen = _better(chosen, tried)
    if profile.largest_batch > 1:
        # At most the shortest run: a request that waits longer could have been answered already.
        delayed = replace(chosen.settings, max_queue_delay_us=round(profile.run_s(1) * 1e6))
        chosen = _better(chosen, consider(delayed))
    if not chosen.max_rate:
        alone = replica.under(0.05 / (profile.run_s(1) + 1 / profile.crowded_rate), chosen.settings, _SEARCH_REQUESTS)
        raise Unreachable(
            f"no number of replicas answers 99 of 100 requests within {slo_p99_ms:g} ms: "
            f"an almost idle replica takes {alone.p99_ms:.2f} ms at p99"
        )
    replicas = math.ceil(rate * (1 + headroom) / chosen.max_rate)
    lost = None
    if replicas > 1:
        lost = replica.under(rate / (replicas - 1), chosen.settings, _TOLD_REQUESTS)
    check = _check(profile, replica)
    return Plan(
        model=profile.model,
        engine=profile.engine,
        instances=profile.instances,
        rate=rate,
        slo_p99_ms=slo_p99_ms,
        headroom_asked=headroom,
        replicas=replicas,
        settings=chosen.settings,
        max_rate_per_replica=chosen.max_rate,
        headroom=replicas * chosen.max_rate / rate - 1,
        with_all=replica.under(rate / replicas, chosen.settings, _TOLD_REQUESTS),
        with_one_lost=lost,
        replicas_to_lose_one=math.ceil(rate / chosen.max_rate) + 1,
        considered=tuple(considered),
        check=check,
        measured=profile.measured,
        server=profile.server,
        warnings=(*profile.warnings, *_doubts(check)),
    )


def _check(profile: Profile, replica: Replica) -> Check | None:
    """At the highest measured rate of random arrivals, which was not used for fitting."""
    measured = max((each for each in profile.steps if each.offered), key=lambda each: each.offered, default=None)
    if measured is None:
        return None
    simulated = replica.under(measured.offered, BatchSettings(profile.max_batch_size), _TOLD_REQUESTS)
    return Check(measured.offered, measured.p50_ms, measured.p99_ms, simulated.p50_ms, simulated.p99_ms)


def _doubts(check: Check | None) -> Iterator[str]:
    if check is not None and check.failed:
        yield (
            f"the profile does not hold at {check.rate:,.1f} requests/s: measured, the p99 is more than "
            f"{_FAR_APART:g} times the simulated one. The simulation leaves out the interpreter's time per request, "
            "which matters for models that are faster than their calls. Keep replicas well below this rate, or find "
            "their limit with rafaga load --find-max"
        )


def _better(chosen: Considered, tried: Considered) -> Considered:
    return tried if tried.max_rate > _WORTH_IT * chosen.max_rate else chosen


def _max_rate(profile: Profile, replica: Replica, settings: BatchSettings) -> float:
    """0 if even a very low rate misses."""
    best_s = min(profile.run_s(b) / b for b in replica.buckets(settings.max_batch_size))
    engines = 0.8 * profile.instances / best_s / profile.request_rows
    searching = search(min(0.8 * profile.crowded_rate, engines), _PRECISION)
    rate = next(searching)
    while True:
        try:
            rate = searching.send(replica.under(rate, settings, _SEARCH_REQUESTS).met)
        except StopIteration as done:
            return float(done.value)
