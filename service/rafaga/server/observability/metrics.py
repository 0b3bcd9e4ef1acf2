"""Counts every metric of the server, which `families` lists.

A request appends to a deque, which takes no lock and no call in Python. Scrapes and statistics count what is there.
"""

from __future__ import annotations

import threading
from collections import Counter as Counted
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, RestrictedRegistry

from rafaga.server.observability import families
from rafaga.server.observability.families import Family, Kind

OK = grpc.StatusCode.OK.name

MAX_RECORDS = 1024
"""Records before the thread that appends one more counts them, if no scrape does it earlier."""


class BulkHistogram(Histogram):
    """Sorts thousands of values at once, which takes 0.05 µs for each. `observe` takes 3 µs."""

    def observe_all(self, values: Sequence[float]) -> None:
        # A value that equals a bucket's upper bound belongs to it.
        places = np.searchsorted(self._upper_bounds, values)
        counts = np.bincount(places, minlength=len(self._buckets)).tolist()
        for bucket, count in zip(self._buckets, counts, strict=True):
            bucket.inc(count)
        self._sum.inc(sum(values))


_KINDS: Mapping[Kind, Any] = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: BulkHistogram}


@dataclass
class Statistics:
    """Running totals of one model, as Triton's statistics extension defines them: for the Open Inference Protocol and
    Triton's metric names.

    requests, queue_s and inference_s count each answered request once. failed counts requests that failed in the engine
    or were too late. executions counts runs by the rows of the batch.
    """

    requests: int = 0
    failed: int = 0
    rows: int = 0
    queue_s: float = 0.0
    inference_s: float = 0.0
    last_unix_s: float = 0.0
    executions: dict[int, tuple[int, float]] = field(default_factory=dict)  # rows: (runs, seconds)


class CallRecord(NamedTuple):
    """A call that was settled. code: of its gRPC status. reason: of a failure, else empty."""

    method: str
    seconds: float
    code: str = OK
    reason: str = ""


class BatchRecord(NamedTuple):
    """One run of an engine.

    queue_s: one value for each request that this batch completes. earlier_s: the total time that other parts of these
    requests took in earlier batches. ended: Unix seconds.
    """

    rows: int
    inference_s: float
    queue_s: Sequence[float]
    earlier_s: float = 0.0
    ended: float = 0.0


class _Registry(CollectorRegistry):
    """Counts what is recorded before it is read."""

    def __init__(self, fold: Callable[[], None]) -> None:
        super().__init__()
        self._fold = fold

    def collect(self) -> Iterable[Metric]:
        self._fold()
        return super().collect()

    def restricted_registry(self, names: Iterable[str]) -> RestrictedRegistry:
        self._fold()
        return super().restricted_registry(names)


class Metrics:
    """Has its own registry, so that one process can hold several servers.

    gpus: the metrics of the GPUs, if there are any. served: what serves now, by name and version.
    """

    def __init__(self, gpus: Collector | None = None) -> None:
        self.registry = _Registry(self.fold)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.served: dict[tuple[str, int], ModelMetrics] = {}
        self.calls: deque[CallRecord] = deque()  # its methods are atomic, and a set's
        self.models: set[ModelMetrics] = set()
        self._lock = threading.Lock()
        self._of = {f: self._registered(f) for f in families.FAMILIES if f not in _Queues.JOINED}
        self.registry.register(_Queues(self.models))
        if gpus is not None:
            self.registry.register(gpus)

    def fold(self) -> None:
        """Counts what was recorded. From any thread."""
        with self._lock:
            calls = [self.calls.popleft() for _ in range(len(self.calls))]
            seconds_of = defaultdict[str, list[float]](list)
            for call in calls:
                seconds_of[call.method].append(call.seconds)
            for method, seconds in seconds_of.items():
                self.of(families.REQUEST_SECONDS, method).observe_all(seconds)
            for (method, code, reason), count in Counted((c.method, c.code, c.reason) for c in calls).items():
                self.of(families.REQUESTS, method, code).inc(count)
                if reason:
                    self.of(families.REFUSALS, method, reason).inc(count)
        for model in list(self.models):
            model.fold()

    def _registered(self, family: Family) -> Any:
        buckets: dict[str, Any] = {"buckets": family.buckets} if family.buckets else {}
        return _KINDS[family.kind](family.name, family.text, family.labels, registry=self.registry, **buckets)

    def of(self, family: Family, *labels: object) -> Any:
        """Its series with these labels: a Counter, a Gauge or a BulkHistogram."""
        return self._of[family].labels(*map(str, labels))

    def method(self, name: str) -> None:
        """Its series exist from now on, so that their first increase shows as one."""
        self.of(families.REQUESTS, name, OK)
        self.of(families.REQUEST_SECONDS, name)

    def model(self, name: str, engine: str = "", precision: str = "") -> ModelMetrics:
        return ModelMetrics(name, self, (engine, precision))

    def watch_in_flight(self, count: Callable[[], int]) -> None:
        """Calls `count` at every scrape."""
        self._of[families.IN_FLIGHT].set_function(count)

    def model_ready(self, name: str, version: int, ready: bool) -> None:
        self.of(families.READY, name, version).set(ready)

    def model_loaded(self, name: str, version: int, seconds: float, model: ModelMetrics) -> None:
        """It now serves under this name and version, and replaces what served there before."""
        self.of(families.LOAD_SECONDS, name, version).set(seconds)
        self._forget_info(name, version)
        self.served[name, version] = model
        self.of(families.INFO, name, version, *model.runtime).set(1)
        self.model_ready(name, version, True)

    def model_refused(self, name: str, version: int, *, still_served: bool) -> None:
        self.of(families.LOAD_FAILURES, name, version).inc()
        self.model_ready(name, version, still_served)

    def model_swapped(self, name: str, seconds: float) -> None:
        """The replaced version ended this long after it was taken out of service."""
        self.of(families.SWAP_SECONDS, name).set(seconds)

    def model_gone(self, name: str, version: int) -> None:
        """Its folder was removed or it was unloaded; without its series no alert fires."""
        self._forget_info(name, version)
        for family in (families.READY, families.LOAD_SECONDS, families.LOAD_FAILURES):
            self._of[family].remove(name, str(version))

    def _forget_info(self, name: str, version: int) -> None:
        if (model := self.served.pop((name, version), None)) is not None:
            self._of[families.INFO].remove(name, str(version), *model.runtime)

    def model_removed(self, name: str) -> None:
        """No version of it is served or known any more: removes all its series."""
        for family, metric in self._of.items():
            if "model" not in family.labels:
                continue
            samples = (sample.labels for collected in metric.collect() for sample in collected.samples)
            for labels in {tuple(map(own.__getitem__, family.labels)) for own in samples if own["model"] == name}:
                metric.remove(*labels)


_OF_MODELS = (
    families.PADDING_ROWS,
    families.FAILURES,
    families.REJECTED_INPUTS,
    families.NON_FINITE_OUTPUTS,
    families.RESTARTS,
)


class ModelMetrics:
    """Counts what happens in one version of a model. runtime: its engine and precision. batches,
    preprocess_seconds: that are not counted yet."""

    def __init__(self, name: str, metrics: Metrics, runtime: tuple[str, str]) -> None:
        self.name = name
        self.runtime = runtime
        self._metrics = metrics
        self._batch_size: BulkHistogram = metrics.of(families.BATCH_SIZE, name)
        self._queue_seconds: BulkHistogram = metrics.of(families.QUEUE_SECONDS, name)
        self._inference_seconds: BulkHistogram = metrics.of(families.INFERENCE_SECONDS, name)
        self._preprocess_seconds: BulkHistogram = metrics.of(families.PREPROCESS_SECONDS, name)
        # Each exists from the start, so that its first increase shows as one.
        self._counters: Mapping[Family, Counter] = {family: metrics.of(family, name) for family in _OF_MODELS}
        self.batches: deque[BatchRecord] = deque()
        self.preprocess_seconds: deque[float] = deque()
        self._totals = Statistics()
        self.pending: Callable[[], int] = lambda: 0
        self.gauges: Mapping[Family, Callable[[], float]] = {}
        self._lock = threading.Lock()
        metrics.models.add(self)

    def watch_queue(
        self,
        rows: Callable[[], int],
        requests: Callable[[], int],
        predicted_wait_s: Callable[[], float],
        capacity_rows_per_s: Callable[[], float],
    ) -> None:
        """Calls all at every scrape."""
        self.pending = requests
        self.gauges = {
            families.QUEUE_ROWS: rows,
            families.PREDICTED_WAIT: predicted_wait_s,
            families.CAPACITY: capacity_rows_per_s,
        }

    def watch_no_more(self) -> None:
        self.fold()
        self._metrics.models.discard(self)
        self.pending = lambda: 0

    @property
    def statistics(self) -> Statistics:
        self.fold()
        return self._totals

    def fold(self) -> None:
        """Counts the batches that were recorded. From any thread."""
        totals = self._totals
        with self._lock:
            batches = [self.batches.popleft() for _ in range(len(self.batches))]
            for rows, inference_s, queue_s, earlier_s, ended in batches:
                totals.requests += len(queue_s)
                totals.rows += rows
                totals.queue_s += sum(queue_s)
                totals.inference_s += inference_s * len(queue_s) + earlier_s
                totals.last_unix_s = ended
                runs, seconds = totals.executions.get(rows, (0, 0.0))
                totals.executions[rows] = (runs + 1, seconds + inference_s)
            self._queue_seconds.observe_all([seconds for batch in batches for seconds in batch.queue_s])
            self._batch_size.observe_all([batch.rows for batch in batches])
            self._inference_seconds.observe_all([batch.inference_s for batch in batches])
            decoded = [self.preprocess_seconds.popleft() for _ in range(len(self.preprocess_seconds))]
            self._preprocess_seconds.observe_all(decoded)

    def padded(self, rows: float) -> None:
        """This much of the batch was padding."""
        self._counters[families.PADDING_ROWS].inc(rows)

    def job_failed(self, cause: Family) -> None:
        """cause: the counter of such jobs."""
        self._failed(1)
        self._counters[cause].inc()

    def engine_restarted(self) -> None:
        self._counters[families.RESTARTS].inc()

    def dropped(self, cause: str, jobs: int) -> None:
        """cause: "deadline" or "cancelled"."""
        if cause == "deadline":
            self._failed(jobs)
        self._metrics.of(families.DROPPED, self.name, cause).inc(jobs)

    def _failed(self, jobs: int) -> None:
        with self._lock:
            self._totals.failed += jobs


class _Queues(Collector):
    """Gauges that are read at each scrape, not written at each change.

    Several versions of a model can serve at the same time: their queues are added up; otherwise the worst value counts.
    """

    JOINED: Mapping[Family, Callable[[list[float]], float]] = {
        families.QUEUE_ROWS: sum,
        families.PREDICTED_WAIT: max,
        families.CAPACITY: min,
    }

    def __init__(self, models: set[ModelMetrics]) -> None:
        self._models = models

    def collect(self) -> Iterable[GaugeMetricFamily]:
        watched = [model for model in list(self._models) if model.gauges]
        for family, join in self.JOINED.items():
            values: dict[str, list[float]] = defaultdict(list)
            for model in watched:
                values[model.name].append(model.gauges[family]())
            gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
            for name, of_versions in values.items():
                gauge.add_metric([name], join(of_versions))
            yield gauge
