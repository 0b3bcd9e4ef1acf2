"""Counts every metric of the server, which `families` lists."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rafaga.server.observability import families
from rafaga.server.observability.families import Family, Kind

OK = grpc.StatusCode.OK.name

# Buffered values before an observing thread sorts them, if no scrape does it earlier.
_MAX_BUFFERED = 4096


class Observations:
    """Values of one label set. `observe` from any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._buffer: deque[float] = deque()  # its methods are atomic
        self._sorting = threading.Lock()

    def observe(self, *values: float) -> None:
        self._buffer.extend(values)
        if len(self._buffer) >= _MAX_BUFFERED:
            self.read()

    def read(self) -> tuple[list[int], float]:
        """The number of values in each bucket (the last one has no upper bound), and the sum of all values."""
        with self._sorting:
            buffer = self._buffer
            values = np.array([buffer.popleft() for _ in range(len(buffer))])
            # A value that equals a bucket's upper bound belongs to it.
            self._counts += np.bincount(self._bounds.searchsorted(values), minlength=len(self._counts))
            self._sum += float(values.sum())
            return self._counts.tolist(), self._sum


class BufferedHistogram(Collector):
    """For values observed once per request: observing appends to a buffer, and reading sorts it into buckets. Takes the
    arguments that prometheus_client's Histogram takes.

    That one takes two locks and searches the buckets for each value, about 3 µs: a tenth of a small model's request.
    Appending takes 0.05 µs, and sorting thousands of values at once takes another 0.05 µs for each.
    """

    def __init__(
        self, name: str, text: str, labels: Sequence[str], *, registry: CollectorRegistry, buckets: Sequence[float]
    ) -> None:
        self._describe = partial(HistogramMetricFamily, name, text, labels=labels)
        self._bounds = buckets
        self._children: dict[tuple[str, ...], Observations] = {}
        self._adding = threading.Lock()
        registry.register(self)

    def labels(self, *values: str) -> Observations:
        with self._adding:
            return self._children.setdefault(values, Observations(self._bounds))

    def remove(self, *values: str) -> None:
        with self._adding:
            del self._children[values]

    def describe(self) -> Iterable[HistogramMetricFamily]:
        yield self._describe()

    def collect(self) -> Iterable[HistogramMetricFamily]:
        with self._adding:
            children = list(self._children.items())
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        metric = self._describe()
        for labels, observations in children:
            counts, total = observations.read()
            metric.add_metric(labels, list(zip(names, np.cumsum(counts).tolist(), strict=True)), total)
        yield metric


_KINDS: Mapping[Kind, Any] = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: BufferedHistogram}


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


class Metrics:
    """Has its own registry, so that one process can hold several servers.

    gpus: the metrics of the GPUs, if there are any. served: what serves now, by name and version.
    """

    def __init__(self, gpus: Collector | None = None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.served: dict[tuple[str, int], ModelMetrics] = {}
        self._of = {f: self._registered(f) for f in families.FAMILIES if f not in _Queues.JOINED}
        self.queues = _Queues()
        self.registry.register(self.queues)
        if gpus is not None:
            self.registry.register(gpus)

    def _registered(self, family: Family) -> Any:
        buckets: dict[str, Any] = {"buckets": family.buckets} if family.buckets else {}
        return _KINDS[family.kind](family.name, family.text, family.labels, registry=self.registry, **buckets)

    def of(self, family: Family, *labels: object) -> Any:
        """Its series with these labels: a Counter, a Gauge or Observations."""
        return self._of[family].labels(*map(str, labels))

    def method(self, name: str) -> MethodMetrics:
        return MethodMetrics(name, self)

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


class MethodMetrics:
    """Counts the calls of one gRPC method. Looks the labels up once, not at each call."""

    def __init__(self, name: str, metrics: Metrics) -> None:
        self._name = name
        self._metrics = metrics
        self._ok: Counter = metrics.of(families.REQUESTS, name, OK)
        self._seconds: Observations = metrics.of(families.REQUEST_SECONDS, name)

    def answered(self, seconds: float) -> None:
        self._ok.inc()
        self._seconds.observe(seconds)

    def failed(self, code: grpc.StatusCode, reason: str, seconds: float) -> None:
        self._metrics.of(families.REQUESTS, self._name, code.name).inc()
        self._metrics.of(families.REFUSALS, self._name, reason).inc()
        self._seconds.observe(seconds)


_OF_MODELS = (
    families.PADDING_ROWS,
    families.FAILURES,
    families.REJECTED_INPUTS,
    families.NON_FINITE_OUTPUTS,
    families.RESTARTS,
)


class ModelMetrics:
    """Counts what happens in one version of a model. runtime: its engine and precision."""

    def __init__(self, name: str, metrics: Metrics, runtime: tuple[str, str]) -> None:
        self.name = name
        self.runtime = runtime
        self._metrics = metrics
        self._batch_size: Observations = metrics.of(families.BATCH_SIZE, name)
        self._queue_seconds: Observations = metrics.of(families.QUEUE_SECONDS, name)
        self._inference_seconds: Observations = metrics.of(families.INFERENCE_SECONDS, name)
        self._preprocess_seconds: Observations = metrics.of(families.PREPROCESS_SECONDS, name)
        # Each exists from the start, so that its first increase shows as one.
        self._counters: Mapping[Family, Counter] = {family: metrics.of(family, name) for family in _OF_MODELS}
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
        self._metrics.queues.watched.add(self)

    def watch_no_more(self) -> None:
        self._metrics.queues.watched.discard(self)
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
        self._counters[families.PADDING_ROWS].inc(rows)

    def preprocessed(self, seconds: float) -> None:
        self._preprocess_seconds.observe(seconds)

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
            self.statistics.failed += jobs


class _Queues(Collector):
    """Gauges that are read at each scrape, not written at each change.

    Several versions of a model can serve at the same time: their queues are added up; otherwise the worst value counts.
    """

    JOINED: Mapping[Family, Callable[[list[float]], float]] = {
        families.QUEUE_ROWS: sum,
        families.PREDICTED_WAIT: max,
        families.CAPACITY: min,
    }

    def __init__(self) -> None:
        self.watched: set[ModelMetrics] = set()  # its methods are atomic

    def collect(self) -> Iterable[GaugeMetricFamily]:
        watched = list(self.watched)
        for family, join in self.JOINED.items():
            values: dict[str, list[float]] = defaultdict(list)
            for model in watched:
                values[model.name].append(model.gauges[family]())
            gauge = GaugeMetricFamily(family.name, family.text, labels=family.labels)
            for name, of_versions in values.items():
                gauge.add_metric([name], join(of_versions))
            yield gauge
