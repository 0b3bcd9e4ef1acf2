"""The same values under Triton's names (`--triton-metrics`): dashboards and autoscalers made for Triton keep working.

Triton measures copying inputs and outputs separately. Here these times are part of the engine's time and exported as 0,
as in ModelStatistics: queries that add up all times give the right sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rafaga.server.observability.metrics import Metrics, Statistics


class Alias(NamedTuple):
    name: str
    text: str
    value: Callable[[Statistics, int], float]
    """From the totals of a model and the number of requests in its queue."""


ALIASES = (
    Alias("nv_inference_request_success", "Requests answered.", lambda s, _: s.requests),
    Alias(
        "nv_inference_request_failure", "Requests that failed in the engine or were too late.", lambda s, _: s.failed
    ),
    Alias("nv_inference_count", "Rows computed.", lambda s, _: s.rows),
    Alias("nv_inference_exec_count", "Batches computed.", lambda s, _: sum(r for r, _ in list(s.executions.values()))),
    Alias("nv_inference_pending_request_count", "Requests in the queue.", lambda _, pending: pending),
    Alias(
        "nv_inference_request_duration_us",
        "Time in the queue and the engine.",
        lambda s, _: 1e6 * (s.queue_s + s.inference_s),
    ),
    Alias("nv_inference_queue_duration_us", "Time in the queue.", lambda s, _: 1e6 * s.queue_s),
    Alias("nv_inference_compute_input_duration_us", "Always 0: part of the time in the engine.", lambda _, __: 0.0),
    Alias("nv_inference_compute_infer_duration_us", "Time in the engine.", lambda s, _: 1e6 * s.inference_s),
    Alias("nv_inference_compute_output_duration_us", "Always 0: part of the time in the engine.", lambda _, __: 0.0),
)


class TritonMetrics(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        served = list(self._metrics.served.items())
        for alias in ALIASES:
            # Type unknown: names of counters must end in _total, and Triton's do not.
            metric = Metric(alias.name, alias.text, "unknown")
            for (name, version), model in served:
                labels = {"model": name, "version": str(version)}
                metric.add_sample(alias.name, labels, alias.value(model.statistics, model.pending()))
            yield metric
