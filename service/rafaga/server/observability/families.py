"""The list of metrics: `Metrics` and docs/metrics.md are made from it, rules and dashboards are checked against it."""

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
    """One metric with all its labels. `buckets`: upper bounds, of histograms alone."""

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
    "code": "gRPC status, `OK` or for example `RESOURCE_EXHAUSTED`",
    "reason": "the reason that travels with the status, for example `QUEUE_FULL` or `DEADLINE_UNREACHABLE`",
    "model": "name of the model",
    "version": "version of the model, a number",
    "gpu": "number of the GPU, as the driver counts those that the process sees",
    "product": "name of the GPU, `NVIDIA H200`",
    "cause": "`deadline`: the answer would have come too late; `cancelled`: the caller went away",
}

REQUESTS = Family(Kind.COUNTER, "rafaga_requests", "Calls answered, by method and gRPC status.", ("method", "code"))
REFUSALS = Family(
    Kind.COUNTER,
    "rafaga_refusals",
    "Calls refused or failed, by the reason that travels with the status.",
    ("method", "reason"),
)
REQUEST_SECONDS = Family(
    Kind.HISTOGRAM,
    "rafaga_request_seconds",
    "From receiving a call to handing over its reply.",
    ("method",),
    _SECONDS,
)
IN_FLIGHT = Family(Kind.GAUGE, "rafaga_requests_in_flight", "Calls received, not answered.")
DROPPED = Family(Kind.COUNTER, "rafaga_dropped", "Jobs dropped from the queue, uncomputed.", ("model", "cause"))
FAILURES = Family(Kind.COUNTER, "rafaga_engine_failures", "Jobs that made the engine fail.", ("model",))
RESTARTS = Family(
    Kind.COUNTER,
    "rafaga_engine_restarts",
    "Engines that were brought up in the place of one that hung, failed on its own sample or died.",
    ("model",),
)
BATCH_SIZE = Family(Kind.HISTOGRAM, "rafaga_batch_size", "Rows per run of an engine.", ("model",), _ROWS)
PADDING_ROWS = Family(
    Kind.COUNTER,
    "rafaga_padding_rows",
    "Rows' worth of padding computed: series filled up to the longest of their batch, batches to a GPU's bucket.",
    ("model",),
)
QUEUE_SECONDS = Family(
    Kind.HISTOGRAM,
    "rafaga_queue_seconds",
    "From entering the queue to being taken into a batch.",
    ("model",),
    _SECONDS,
)
INFERENCE_SECONDS = Family(
    Kind.HISTOGRAM, "rafaga_inference_seconds", "One run of an engine over a batch.", ("model",), _SECONDS
)
PREPROCESS_SECONDS = Family(
    Kind.HISTOGRAM,
    "rafaga_preprocess_seconds",
    "Decoding and resizing the images of one call.",
    ("model",),
    _SECONDS,
)
QUEUE_ROWS = Family(Kind.GAUGE, "rafaga_queue_rows", "Rows waiting in the queue.", ("model",))
PREDICTED_WAIT = Family(
    Kind.GAUGE,
    "rafaga_queue_predicted_wait_seconds",
    "How long a request without a deadline would wait in the queue that came at the scrape.",
    ("model",),
)
CAPACITY = Family(
    Kind.GAUGE,
    "rafaga_model_capacity_rows_per_second",
    "Rows that the engine would answer per second in batches of the efficient size, as its runs so far predict.",
    ("model",),
)
READY = Family(Kind.GAUGE, "rafaga_model_ready", "1 while the model is served.", ("model", "version"))
LOAD_SECONDS = Family(
    Kind.GAUGE, "rafaga_model_load_seconds", "Reading, verifying and warming up a model.", ("model", "version")
)
SWAP_SECONDS = Family(
    Kind.GAUGE,
    "rafaga_model_swap_seconds",
    "How long what was replaced last took to end: its last answers, and its memory given back.",
    ("model",),
)
LOAD_FAILURES = Family(
    Kind.COUNTER,
    "rafaga_model_load_failures",
    "Models that were refused when they were loaded; what was served before still is.",
    ("model", "version"),
)

_GPU = ("gpu", "product")
GPU_UTILISATION = Family(
    Kind.GAUGE, "rafaga_gpu_utilisation_ratio", "Share of the time in which the GPU computed anything.", _GPU
)
GPU_MEMORY_USED = Family(Kind.GAUGE, "rafaga_gpu_memory_used_bytes", "Of the GPU's memory, by all processes.", _GPU)
GPU_MEMORY_TOTAL = Family(Kind.GAUGE, "rafaga_gpu_memory_total_bytes", "The GPU's memory.", _GPU)
GPU_POWER = Family(Kind.GAUGE, "rafaga_gpu_power_watts", "What the GPU draws.", _GPU)

FAMILIES = (
    REQUESTS,
    REFUSALS,
    REQUEST_SECONDS,
    IN_FLIGHT,
    QUEUE_ROWS,
    PREDICTED_WAIT,
    DROPPED,
    QUEUE_SECONDS,
    PREPROCESS_SECONDS,
    INFERENCE_SECONDS,
    BATCH_SIZE,
    PADDING_ROWS,
    CAPACITY,
    FAILURES,
    RESTARTS,
    READY,
    LOAD_SECONDS,
    SWAP_SECONDS,
    LOAD_FAILURES,
)

# Where there are GPUs.
GPU_FAMILIES = (GPU_UTILISATION, GPU_MEMORY_USED, GPU_MEMORY_TOTAL, GPU_POWER)
