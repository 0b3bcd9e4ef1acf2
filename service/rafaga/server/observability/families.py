"""The list of metrics. `Metrics` and docs/metrics.md are made from it; tests check rules and dashboards against it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Family:
    """One metric with all its labels. buckets: upper bounds, for histograms only."""

    kind: Kind
    name: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus stores it."""
        match self.kind:
            case Kind.COUNTER:
                return (f"{self.name}_total",)
            case Kind.HISTOGRAM:
                return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
            case Kind.GAUGE:
                return (self.name,)


LABELS = {
    "method": "full name of the gRPC method, `/rafaga.v1.Vision/Classify`",
    "code": "gRPC status, for example `OK` or `RESOURCE_EXHAUSTED`",
    "reason": "reason in the details of the status, for example `QUEUE_FULL` or `DEADLINE_UNREACHABLE`",
    "model": "name of the model",
    "version": "version of the model, a number",
    "engine": "`onnxruntime` or `openvino`",
    "precision": "`fp32`, `bf16`, `fp16` or `int8`; empty for plain ONNX",
    "gpu": "index of the GPU among those that the process sees",
    "product": "name of the GPU, for example `NVIDIA H200`",
    "cause": "`deadline`: the answer would be too late; `cancelled`: the caller cancelled or disconnected",
}


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(Kind.COUNTER, name, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(Kind.GAUGE, name, text, labels)


def _histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Family:
    return Family(Kind.HISTOGRAM, name, text, labels, buckets)


REQUESTS = _counter("rafaga_requests", "Calls answered, by method and gRPC status.", "method", "code")
REFUSALS = _counter(
    "rafaga_refusals", "Calls refused or failed, by the reason in the status details.", "method", "reason"
)
REQUEST_SECONDS = _histogram(
    "rafaga_request_seconds", "Time from receiving a call to passing its reply to the transport.", "method"
)
IN_FLIGHT = _gauge("rafaga_requests_in_flight", "Calls received and not answered yet.")
QUEUE_ROWS = _gauge("rafaga_queue_rows", "Rows waiting in the queue.", "model")
PREDICTED_WAIT = _gauge(
    "rafaga_queue_predicted_wait_seconds",
    "Predicted queue time of a request without a deadline that arrives at the time of the scrape.",
    "model",
)
DROPPED = _counter("rafaga_dropped", "Jobs dropped from the queue before they ran.", "model", "cause")
QUEUE_SECONDS = _histogram("rafaga_queue_seconds", "Time from entering the queue to joining a batch.", "model")
PREPROCESS_SECONDS = _histogram(
    "rafaga_preprocess_seconds", "Time to decode and resize the images of one call.", "model"
)
INFERENCE_SECONDS = _histogram("rafaga_inference_seconds", "Time of one run of an engine on a batch.", "model")
BATCH_SIZE = _histogram("rafaga_batch_size", "Rows per run of an engine.", "model", buckets=_ROWS)
PADDING_ROWS = _counter(
    "rafaga_padding_rows",
    "Padding computed, in rows: series padded to the longest in their batch (up to a fifth of it), batches padded to a "
    "GPU bucket.",
    "model",
)
CAPACITY = _gauge(
    "rafaga_model_capacity_rows_per_second",
    "Rows per second that the engine can compute in batches of the efficient size, predicted from its runs so far.",
    "model",
)
FAILURES = _counter("rafaga_engine_failures", "Jobs whose run failed because of the engine or its device.", "model")
REJECTED_INPUTS = _counter(
    "rafaga_rejected_inputs",
    "Jobs whose input alone made a run fail, on an engine that runs its own sample. They are errors of the caller.",
    "model",
)
NON_FINITE_OUTPUTS = _counter(
    "rafaga_non_finite_outputs",
    "Jobs refused because the model gave NaN or infinity for their input; not counted if the model may give these.",
    "model",
)
RESTARTS = _counter(
    "rafaga_engine_restarts", "Engines started to replace one that hung, failed on its own sample, or died.", "model"
)
INFO = _gauge(
    "rafaga_model_info",
    "1, for what runs a served version of a model.",
    "model",
    "version",
    "engine",
    "precision",
)
READY = _gauge("rafaga_model_ready", "1 while the model is served.", "model", "version")
LOAD_SECONDS = _gauge("rafaga_model_load_seconds", "Time to read, verify and warm up a model.", "model", "version")
SWAP_SECONDS = _gauge(
    "rafaga_model_swap_seconds",
    "Time for the version that was last replaced to finish its requests and free its memory.",
    "model",
)
LOAD_FAILURES = _counter(
    "rafaga_model_load_failures",
    "Models refused at load; the version served before stays in service.",
    "model",
    "version",
)

GPU_UTILISATION = _gauge("rafaga_gpu_utilisation_ratio", "Share of time in which the GPU was busy.", "gpu", "product")
GPU_MEMORY_USED = _gauge("rafaga_gpu_memory_used_bytes", "GPU memory used by all processes.", "gpu", "product")
GPU_MEMORY_TOTAL = _gauge("rafaga_gpu_memory_total_bytes", "Total GPU memory.", "gpu", "product")
GPU_POWER = _gauge("rafaga_gpu_power_watts", "Power draw of the GPU.", "gpu", "product")

_ALL = [value for value in globals().values() if isinstance(value, Family)]
FAMILIES = tuple(family for family in _ALL if "gpu" not in family.labels)
# Exported only if there are GPUs.
GPU_FAMILIES = tuple(family for family in _ALL if "gpu" in family.labels)
