"""Counts every metric of the server. `families` lists them; callers use the methods here and never name a metric."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rafaga.server.observability import families
from rafaga.server.observability.families import Family
from rafaga.server.observability.histogram import BufferedHistogram
from rafaga.server.observability.statistics import Statistics
from rafaga.server.observability.triton import Totals, TritonMetrics

OK = grpc.StatusCode.OK.name

M = TypeVar("M", Counter, Gauge, Histogram, BufferedHistogram)


class _Instruments:
    """What counts the metrics of `families`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._by_model: dict[Family, Counter | Gauge | Histogram | BufferedHistogram] = {}
        self.requests = self._add(Counter, families.REQUESTS)
        self.refusals = self._add(Counter, families.REFUSALS)
        self.request_seconds = self._add(BufferedHistogram, families.REQUEST_SECONDS)
        self.in_flight = self._add(Gauge, families.IN_FLIGHT)
        self.dropped = self._add(Counter, families.DROPPED)
        self.failures = self._add(Counter, families.FAILURES)
        self.rejected_inputs = self._add(Counter, families.REJECTED_INPUTS)
        self.restarts = self._add(Counter, families.RESTARTS)
        self.batch_size = self._add(Histogram, families.BATCH_SIZE)
        self.queue_seconds = self._add(BufferedHistogram, families.QUEUE_SECONDS)
        self.padding_rows = self._add(Counter, families.PADDING_ROWS)
        self.inference_seconds = self._add(Histogram, families.INFERENCE_SECONDS)
        self.preprocess_seconds = self._add(Histogram, families.PREPROCESS_SECONDS)
        self.ready = self._add(Gauge, families.READY)
        self.load_seconds = self._add(Gauge, families.LOAD_SECONDS)
        self.swap_seconds = self._add(Gauge, families.SWAP_SECONDS)
        self.load_failures = self._add(Counter, families.LOAD_FAILURES)
        self.queues = _Queues()
        registry.register(self.queues)

    def remove_model(self, name: str) -> None:
        for family, metric in self._by_model.items():
            samples = (sample.labels for collected in metric.collect() for sample in collected.samples)
            for labels in {tuple(map(own.__getitem__, family.labels)) for own in samples if own["model"] == name}:
                metric.remove(*labels)

    def _add(self, kind: type[M], family: Family) -> M:
        buckets: dict[str, Any] = {"buckets": family.buckets} if family.buckets else {}
        metric = kind(family.name, family.text, family.labels, registry=self._registry, **buckets)
        if "model" in family.labels:
            self._by_model[family] = metric
        return metric


class Metrics:
    """Has its own registry, so that one process can hold several servers.

    triton: export the values under Triton's names too. gpus: the metrics of the GPUs, if there are any.
    """

    def __init__(self, *, triton: bool = False, gpus: Collector | None = None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._instruments = _Instruments(self.registry)
        self._served: dict[tuple[str, int], ModelMetrics] = {}
        if gpus is not None:
            self.registry.register(gpus)
        if triton:
            self.registry.register(TritonMetrics(self._totals))

    def method(self, name: str) -> MethodMetrics:
        return MethodMetrics(name, self._instruments)

    def model(self, name: str) -> ModelMetrics:
        return ModelMetrics(name, self._instruments)

    def watch_in_flight(self, count: Callable[[], int]) -> None:
        """Calls `count` at every scrape."""
        self._instruments.in_flight.set_function(count)

    def model_ready(self, name: str, version: int, ready: bool) -> None:
        self._instruments.ready.labels(name, str(version)).set(ready)

    def model_loaded(self, name: str, version: int, seconds: float, model: ModelMetrics) -> None:
        """It now serves under this name and version, and replaces what served there before."""
        self._instruments.load_seconds.labels(name, str(version)).set(seconds)
        self._served[name, version] = model
        self.model_ready(name, version, True)

    def model_refused(self, name: str, version: int, *, still_served: bool) -> None:
        self._instruments.load_failures.labels(name, str(version)).inc()
        self.model_ready(name, version, still_served)

    def model_swapped(self, name: str, seconds: float) -> None:
        """The replaced version ended this long after it was taken out of service."""
        self._instruments.swap_seconds.labels(name).set(seconds)

    def model_gone(self, name: str, version: int) -> None:
        """Its folder was removed or it was unloaded; without its series no alert fires."""
        self._served.pop((name, version), None)
        own = self._instruments
        for metric in (own.ready, own.load_seconds, own.load_failures):
            metric.remove(name, str(version))

    def model_removed(self, name: str) -> None:
        """No version of it is served or known any more: removes all its series."""
        self._instruments.remove_model(name)

    def _totals(self) -> Iterable[Totals]:
        for (name, version), model in list(self._served.items()):
            yield Totals(name, version, model.statistics, model.pending())


class MethodMetrics:
    """Counts the calls of one gRPC method. Looks the labels up once, not at each call."""

    def __init__(self, name: str, instruments: _Instruments) -> None:
        self._name = name
        self._requests = instruments.requests
        self._refusals = instruments.refusals
        self._ok = instruments.requests.labels(name, OK)
        self._seconds = instruments.request_seconds.labels(name)

    def answered(self, seconds: float) -> None:
        self._ok.inc()
        self._seconds.observe(seconds)

    def failed(self, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        self._requests.labels(self._name, code.name).inc()
        self._refusals.labels(self._name, reason).inc()
        self._seconds.observe(seconds)


class ModelMetrics:
    """Counts what happens in one version of a model."""

    def __init__(self, name: str, instruments: _Instruments) -> None:
        self.name = name
        self._batch_size = instruments.batch_size.labels(name)
        self._padding_rows = instruments.padding_rows.labels(name)
        self._queue_seconds = instruments.queue_seconds.labels(name)
        self._inference_seconds = instruments.inference_seconds.labels(name)
        self._preprocess_seconds = instruments.preprocess_seconds.labels(name)
        self._failures = instruments.failures.labels(name)
        self._rejected_inputs = instruments.rejected_inputs.labels(name)
        self._restarts = instruments.restarts.labels(name)
        self._dropped = instruments.dropped
        self._queues = instruments.queues
        self.statistics = Statistics()
        self.pending: Callable[[], int] = lambda: 0
        self.gauges: Mapping[Family, Callable[[], float]] = {}
        # Each engine's thread writes the totals, and so do threads that drop late requests.
        self._lock = threading.Lock()

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
        self._queues.watched.add(self)

    def watch_no_more(self) -> None:
        self._queues.watched.discard(self)
        self.pending = lambda: 0

    def batch_done(self, rows: int, inference_s: float, queue_s: Sequence[float], earlier_s: float = 0.0) -> None:
        """queue_s: one value for each request that this batch completes. earlier_s: the total time that other parts of
        these requests took in earlier batches."""
        totals = self.statistics
        with self._lock:
            totals.requests += len(queue_s)
            totals.rows += rows
            totals.queue_s += sum(queue_s)
            totals.inference_s += inference_s * len(queue_s) + earlier_s
            totals.last_unix_s = time.time()
            runs, seconds = totals.executions.get(rows, (0, 0.0))
            totals.executions[rows] = (runs + 1, seconds + inference_s)
        self._batch_size.observe(rows)
        self._inference_seconds.observe(inference_s)
        self._queue_seconds.observe(*queue_s)

    def padded(self, rows: float) -> None:
        """This much of the batch was padding."""
        self._padding_rows.inc(rows)

    def preprocessed(self, seconds: float) -> None:
        self._preprocess_seconds.observe(seconds)

    def engine_failed(self) -> None:
        self._failed(1)
        self._failures.inc()

    def input_rejected(self) -> None:
        self._failed(1)
        self._rejected_inputs.inc()

    def engine_restarted(self) -> None:
        self._restarts.inc()

    def dropped(self, cause: str, jobs: int) -> None:
        """cause: "deadline" or "cancelled"."""
        if cause == "deadline":
            self._failed(jobs)
        self._dropped.labels(self.name, cause).inc(jobs)

    def _failed(self, jobs: int) -> None:
        with self._lock:
            self.statistics.failed += jobs


class _Queues(Collector):
    """Gauges that are read at each scrape, not written at each change.

    Several versions of a model can serve at the same time: their queues are added up; otherwise the worst value counts.
    """

    _JOINED: Mapping[Family, Callable[[list[float]], float]] = {
        families.QUEUE_ROWS: sum,
        families.PREDICTED_WAIT: max,
        families.CAPACITY: min,
    }

    def __init__(self) -> None:
        self.watched: set[ModelMetrics] = set()  # its methods are atomic

    def collect(self) -> Iterable[GaugeMetricFamily]:
        watched = list(self.watched)
        for family, join in self._JOINED.items():
            values: dict[str, list[float]] = defaultdict(list)
            for model in watched:
                values[model.name].append(model.gauges[family]())
            gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
            for name, of_versions in values.items():
                gauge.add_metric([name], join(of_versions))
            yield gauge
