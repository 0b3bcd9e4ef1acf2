"""Counts every metric of the server. `families` lists them; callers use the methods here and never name a metric."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rafaga.server.observability import families
from rafaga.server.observability.families import Family
from rafaga.server.observability.histogram import BufferedHistogram, Observations
from rafaga.server.observability.statistics import Statistics
from rafaga.server.observability.triton import Totals, TritonMetrics

OK = grpc.StatusCode.OK.name

M = TypeVar("M", Counter, Gauge, Histogram, BufferedHistogram)


class Metrics:
    """Has its own registry, so that one process can hold several servers.

    triton: export the values under Triton's names too. gpus: the metrics of the GPUs, if there are any.
    """

    def __init__(self, *, triton: bool = False, gpus: Collector | None = None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._by_model: dict[Family, Counter | Gauge | Histogram | BufferedHistogram] = {}
        self._requests = self._counter(families.REQUESTS)
        self._refusals = self._counter(families.REFUSALS)
        self._request_seconds = self._buffered(families.REQUEST_SECONDS)
        self._in_flight = self._gauge(families.IN_FLIGHT)
        self._dropped = self._counter(families.DROPPED)
        self._failures = self._counter(families.FAILURES)
        self._rejected_inputs = self._counter(families.REJECTED_INPUTS)
        self._restarts = self._counter(families.RESTARTS)
        self._batch_size = self._histogram(families.BATCH_SIZE)
        self._queue_seconds = self._buffered(families.QUEUE_SECONDS)
        self._padding_rows = self._counter(families.PADDING_ROWS)
        self._inference_seconds = self._histogram(families.INFERENCE_SECONDS)
        self._preprocess_seconds = self._histogram(families.PREPROCESS_SECONDS)
        self._ready = self._gauge(families.READY)
        self._load_seconds = self._gauge(families.LOAD_SECONDS)
        self._swap_seconds = self._gauge(families.SWAP_SECONDS)
        self._load_failures = self._counter(families.LOAD_FAILURES)
        self._queues = _Queues()
        self.registry.register(self._queues)
        self._served: dict[tuple[str, int], ModelMetrics] = {}
        if gpus is not None:
            self.registry.register(gpus)
        if triton:
            self.registry.register(TritonMetrics(self._totals))

    def _counter(self, family: Family) -> Counter:
        return self._kept(family, Counter(family.name, family.text, family.labels, registry=self.registry))

    def _gauge(self, family: Family) -> Gauge:
        return self._kept(family, Gauge(family.name, family.text, family.labels, registry=self.registry))

    def _histogram(self, family: Family) -> Histogram:
        histogram = Histogram(family.name, family.text, family.labels, buckets=family.buckets, registry=self.registry)
        return self._kept(family, histogram)

    def _buffered(self, family: Family) -> BufferedHistogram:
        histogram = BufferedHistogram(family)
        self.registry.register(histogram)
        return self._kept(family, histogram)

    def _kept(self, family: Family, metric: M) -> M:
        if "model" in family.labels:
            self._by_model[family] = metric
        return metric

    def method(self, name: str) -> MethodMetrics:
        return MethodMetrics(name, self._requests, self._refusals, self._request_seconds)

    def model(self, name: str) -> ModelMetrics:
        return ModelMetrics(
            name,
            batch_size=self._batch_size.labels(name),
            padding_rows=self._padding_rows.labels(name),
            queue_seconds=self._queue_seconds.labels(name),
            inference_seconds=self._inference_seconds.labels(name),
            preprocess_seconds=self._preprocess_seconds.labels(name),
            failures=self._failures.labels(name),
            rejected_inputs=self._rejected_inputs.labels(name),
            restarts=self._restarts.labels(name),
            dropped=self._dropped,
            queues=self._queues,
        )

    def watch_in_flight(self, count: Callable[[], int]) -> None:
        """Calls `count` at every scrape."""
        self._in_flight.set_function(count)

    def model_ready(self, name: str, version: int, ready: bool) -> None:
        self._ready.labels(name, str(version)).set(ready)

    def model_loaded(self, name: str, version: int, seconds: float, model: ModelMetrics) -> None:
        """It now serves under this name and version, and replaces what served there before."""
        self._load_seconds.labels(name, str(version)).set(seconds)
        self._served[name, version] = model
        self.model_ready(name, version, True)

    def model_refused(self, name: str, version: int, *, still_served: bool) -> None:
        self._load_failures.labels(name, str(version)).inc()
        self.model_ready(name, version, still_served)

    def model_swapped(self, name: str, seconds: float) -> None:
        """The replaced version ended this long after it was taken out of service."""
        self._swap_seconds.labels(name).set(seconds)

    def model_gone(self, name: str, version: int) -> None:
        """Its folder was removed or it was unloaded; without its series no alert fires."""
        self._served.pop((name, version), None)
        for metric in (self._ready, self._load_seconds, self._load_failures):
            metric.remove(name, str(version))

    def model_removed(self, name: str) -> None:
        """No version of it is served or known any more: removes all its series."""
        for family, metric in self._by_model.items():
            samples = (sample.labels for collected in metric.collect() for sample in collected.samples)
            for labels in {tuple(map(own.__getitem__, family.labels)) for own in samples if own["model"] == name}:
                metric.remove(*labels)

    def _totals(self) -> Iterable[Totals]:
        for (name, version), model in list(self._served.items()):
            yield Totals(name, version, model.statistics, model.pending())


class MethodMetrics:
    """Counts the calls of one gRPC method. Looks the labels up once, not at each call."""

    def __init__(self, name: str, requests: Counter, refusals: Counter, request_seconds: BufferedHistogram) -> None:
        self._name = name
        self._requests = requests
        self._refusals = refusals
        self._ok = requests.labels(name, OK)
        self._seconds = request_seconds.labels(name)

    def answered(self, seconds: float) -> None:
        self._ok.inc()
        self._seconds.observe(seconds)

    def failed(self, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        self._requests.labels(self._name, code.name).inc()
        self._refusals.labels(self._name, reason).inc()
        self._seconds.observe(seconds)


class ModelMetrics:
    """Counts what happens in one version of a model."""

    def __init__(
        self,
        name: str,
        *,
        batch_size: Histogram,
        padding_rows: Counter,
        queue_seconds: Observations,
        inference_seconds: Histogram,
        preprocess_seconds: Histogram,
        failures: Counter,
        rejected_inputs: Counter,
        restarts: Counter,
        dropped: Counter,
        queues: _Queues,
    ) -> None:
        self._name = name
        self._batch_size = batch_size
        self._padding_rows = padding_rows
        self._queue_seconds = queue_seconds
        self._inference_seconds = inference_seconds
        self._preprocess_seconds = preprocess_seconds
        self._failures = failures
        self._rejected_inputs = rejected_inputs
        self._restarts = restarts
        self._dropped = dropped
        self._queues = queues
        self.statistics = Statistics()
        self.pending: Callable[[], int] = lambda: 0
        # Each engine's thread writes the totals, and so do threads that drop late requests.
        self._lock = threading.Lock()

    def watch_queue(self, depth: Callable[[], int], requests: Callable[[], int] | None = None) -> None:
        """Calls `depth`, in rows, and `requests` at every scrape."""
        self._queues.watch(families.QUEUE_ROWS, self._name, self, depth)
        self.pending = requests or depth

    def watch_load(self, predicted_wait_s: Callable[[], float], capacity_rows_per_s: Callable[[], float]) -> None:
        """Calls both at every scrape."""
        self._queues.watch(families.PREDICTED_WAIT, self._name, self, predicted_wait_s)
        self._queues.watch(families.CAPACITY, self._name, self, capacity_rows_per_s)

    def watch_no_more(self) -> None:
        self._queues.forget(self._name, self)
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
        self._queue_seconds.observe_all(queue_s)

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
        self._dropped.labels(self._name, cause).inc(jobs)

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
        self._lock = threading.Lock()
        self._watched: dict[Family, dict[str, dict[ModelMetrics, Callable[[], float]]]] = {f: {} for f in self._JOINED}

    def watch(self, family: Family, model: str, version: ModelMetrics, value: Callable[[], float]) -> None:
        with self._lock:
            self._watched[family].setdefault(model, {})[version] = value

    def forget(self, model: str, version: ModelMetrics) -> None:
        with self._lock:
            for models in self._watched.values():
                versions = models.get(model, {})
                versions.pop(version, None)
                if not versions:
                    models.pop(model, None)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for family, join in self._JOINED.items():
            with self._lock:
                watched = {model: list(versions.values()) for model, versions in self._watched[family].items()}
            gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
            for model, values in watched.items():
                gauge.add_metric([model], join([value() for value in values]))
            yield gauge
