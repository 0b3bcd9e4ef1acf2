"""What the servers counted during the window: the difference of two scrapes of their /metrics."""

from __future__ import annotations

import ssl
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

from rafaga.addresses import metrics_url

_TIMEOUT_S = 5.0

Samples: TypeAlias = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and labels."""


class MetricsError(Exception):
    """/metrics cannot be read, or is not that of a Rafaga server."""


@dataclass(frozen=True)
class BatchBucket:
    """Runs of an engine over more rows than the bucket before has, up to `up_to`; None is without bound."""

    up_to: int | None
    runs: int


@dataclass(frozen=True)
class ServerWindow:
    """Of all models in the mix and all servers together, other callers' requests included. seconds: between the two
    scrapes.

    Means are microseconds: queue and preprocess per request, inference per run of an engine. worst_queue_us: the mean
    of the server whose requests waited longest.
    """

    seconds: float
    cpu_s: float
    batches: tuple[BatchBucket, ...]
    mean_batch_size: float
    mean_queue_us: float
    mean_preprocess_us: float
    mean_inference_us: float
    requests: dict[str, int]
    refusals: dict[str, int]
    dropped: dict[str, int]
    servers: int = 1
    worst_queue_us: float = 0.0


def scrape(address: str, roots: bytes | None = None) -> Samples:
    """address: see `metrics_url`. roots: certificates to trust (PEM), for https; None: the system's.

    Raises MetricsError.
    """
    url = address
    try:
        url = metrics_url(address)
        trust = ssl.create_default_context(cadata=roots.decode()) if roots else None
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S, context=trust) as answer:
            text = answer.read().decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)  # URLError wraps the OSError that says why
        if isinstance(cause, ConnectionRefusedError):
            raise MetricsError(f"No server at {url} (connection refused)") from None
        raise MetricsError(f"{url}: {cause}") from None
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    if not any(name.startswith("rafaga_") for name, _ in samples):
        raise MetricsError(f"{url}: no metrics of Rafaga there")
    return samples


def between(
    before: Sequence[Samples], after: Sequence[Samples], models: Collection[str], seconds: float
) -> ServerWindow:
    """What happened between two scrapes of the same servers."""
    each = [difference(*pair, models, seconds) for pair in zip(before, after, strict=True)]
    whole = difference(_sum(before), _sum(after), models, seconds)
    return replace(whole, servers=len(each), worst_queue_us=max(window.mean_queue_us for window in each))


def _sum(servers: Iterable[Samples]) -> Samples:
    total: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for samples in servers:
        for key, value in samples.items():
            total[key] += value
    return total


def difference(before: Samples, after: Samples, models: Collection[str], seconds: float) -> ServerWindow:
    """What happened between two scrapes of one server, or of the sums of several."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}

    def by(
        name: str, label: str, chosen: Callable[[Mapping[str, str]], bool] = lambda labels: True
    ) -> dict[str, float]:
        totals: defaultdict[str, float] = defaultdict(float)
        for (sample, pairs), value in grown.items():
            labels = dict(pairs)
            if sample == name and chosen(labels):
                totals[labels.get(label, "")] += value
        return totals

    def of_mix(labels: Mapping[str, str]) -> bool:
        return labels.get("model") in models

    def total(name: str) -> float:
        return sum(by(name, "model", of_mix).values())

    def mean(name: str) -> float:
        count = total(f"{name}_count")
        return total(f"{name}_sum") / count if count else 0.0

    def counts(values: Mapping[str, float]) -> dict[str, int]:
        return {name: round(value) for name, value in values.items() if value > 0}

    return ServerWindow(
        seconds=seconds,
        cpu_s=sum(by("process_cpu_seconds_total", "").values()),
        batches=_buckets(by("rafaga_batch_size_bucket", "le", of_mix)),
        mean_batch_size=mean("rafaga_batch_size"),
        mean_queue_us=mean("rafaga_queue_seconds") * 1e6,
        mean_preprocess_us=mean("rafaga_preprocess_seconds") * 1e6,
        mean_inference_us=mean("rafaga_inference_seconds") * 1e6,
        requests=counts(by("rafaga_requests_total", "code")),
        refusals=counts(by("rafaga_refusals_total", "reason")),
        dropped=counts(by("rafaga_dropped_total", "cause", of_mix)),
    )


def _buckets(cumulative: Mapping[str, float]) -> tuple[BatchBucket, ...]:
    """Prometheus' buckets are cumulative."""
    buckets, below = [], 0.0
    for bound in sorted(cumulative, key=float):
        up_to = None if bound == "+Inf" else int(float(bound))
        buckets.append(BatchBucket(up_to, round(cumulative[bound] - below)))
        below = cumulative[bound]
    return tuple(buckets)
