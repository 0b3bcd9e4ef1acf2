"""The rows of the dashboard and their queries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """`expression` may use the dashboard's $job and Grafana's $__rate_interval."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """`unit`: one of Grafana's names."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rows() -> tuple[Row, ...]:
    return (_traffic(), _batching(), _models(), _processes(), _gpus())


def _traffic() -> Row:
    return Row(
        "Traffic",
        (
            Panel("Calls", "Answered per second, by gRPC status.", "reqps", _rate("rafaga_requests_total", "code")),
            Panel(
                "Refusals",
                "Refused or failed per second, by reason.",
                "reqps",
                _rate("rafaga_refusals_total", "reason"),
            ),
            Panel(
                "Latency",
                "From receiving a call to sending its reply.",
                "s",
                _quantile(0.5, "rafaga_request_seconds", "method")
                + _quantile(0.99, "rafaga_request_seconds", "method"),
            ),
            Panel(
                "Calls in flight",
                "Received, not yet answered.",
                "short",
                _of("sum", "rafaga_requests_in_flight", "job"),
            ),
            Panel(
                "Deadlines missed",
                "Calls per second that missed their deadline, or were refused because they would miss it.",
                "reqps",
                _rate("rafaga_requests_total", "method", only='code="DEADLINE_EXCEEDED"'),
            ),
        ),
    )


def _batching() -> Row:
    return Row(
        "Queue and batches",
        (
            Panel(
                "Predicted wait",
                "Time that a request arriving now would wait. The autoscaler adds pods from 0.1 s.",
                "s",
                _each("rafaga:predicted_wait_seconds"),
            ),
            Panel(
                "Utilisation",
                "Throughput as a share of the engines' capacity. The autoscaler adds pods from 0.7.",
                "percentunit",
                _each("rafaga:utilisation_ratio"),
            ),
            Panel(
                "Rows per batch",
                "Mean. It grows with the load: batches form while the engine runs.",
                "short",
                _mean("rafaga_batch_size", "model"),
            ),
            Panel(
                "Padding",
                "Padding rows computed for each requested row.",
                "percentunit",
                _ratio("rafaga_padding_rows_total", "rafaga_batch_size_sum", "model"),
            ),
            Panel("Rows queued", "Sum of all servers.", "short", _of("sum", "rafaga_queue_rows", "model")),
            Panel(
                "Time in the queue",
                "From entering the queue to joining a batch.",
                "s",
                _quantile(0.99, "rafaga_queue_seconds", "model"),
            ),
            Panel(
                "Time in the engine",
                "One run of a batch.",
                "s",
                _quantile(0.99, "rafaga_inference_seconds", "model"),
            ),
            Panel(
                "Time decoding images",
                "Decoding and resizing the images of one call.",
                "s",
                _quantile(0.99, "rafaga_preprocess_seconds", "model"),
            ),
            Panel(
                "Dropped from the queue",
                "Per second, late or cancelled, without being computed.",
                "ops",
                _rate("rafaga_dropped_total", "model", "cause"),
            ),
        ),
    )


def _models() -> Row:
    return Row(
        "Models",
        (
            Panel("Served by", "Number of servers.", "short", _of("sum", "rafaga_model_ready", "model", "version")),
            Panel(
                "Load time",
                "Reading, verifying and warming up.",
                "s",
                _of("max", "rafaga_model_load_seconds", "model", "version"),
            ),
            Panel(
                "Swap time",
                "From the switch to a new version of the model to the end of the old one.",
                "s",
                _of("max", "rafaga_model_swap_seconds", "model"),
            ),
            Panel(
                "Refused at load",
                "Models refused since the server started.",
                "short",
                _of("sum", "rafaga_model_load_failures_total", "model", "version"),
            ),
            Panel(
                "Capacity",
                "Rows per second and server, predicted from past runs.",
                "short",
                _of("avg", "rafaga_model_capacity_rows_per_second", "model"),
            ),
            Panel(
                "Engine failures",
                "Requests per second that failed because of the engine or its device.",
                "ops",
                _rate("rafaga_engine_failures_total", "model"),
            ),
            Panel(
                "Rejected inputs",
                "Requests per second whose own input made the model fail: errors of callers.",
                "ops",
                _rate("rafaga_rejected_inputs_total", "model"),
            ),
            Panel(
                "Non-finite outputs",
                "Requests per second for whose input the model gave NaN or infinity.",
                "ops",
                _rate("rafaga_non_finite_outputs_total", "model"),
            ),
            Panel(
                "Engine restarts",
                "Engines started to replace a lost one, since the server started.",
                "short",
                _of("sum", "rafaga_engine_restarts_total", "model"),
            ),
        ),
    )


def _processes() -> Row:
    return Row(
        "Processes",
        (
            Panel("Cores in use", "CPU seconds per second.", "short", _rate("process_cpu_seconds_total", "instance")),
            Panel("Memory", "Resident.", "bytes", _each("process_resident_memory_bytes")),
            Panel("Open files", "Includes sockets: about one per connection.", "short", _each("process_open_fds")),
        ),
    )


def _gpus() -> Row:
    return Row(
        "GPUs",
        (
            Panel("GPU in use", "Share of time.", "percentunit", _gpu("rafaga_gpu_utilisation_ratio")),
            Panel("GPU memory", "Used by all processes.", "bytes", _gpu("rafaga_gpu_memory_used_bytes")),
            Panel("GPU power", "Current draw.", "watt", _gpu("rafaga_gpu_power_watts")),
        ),
    )


_JOB = '{job=~"$job"}'


def _each(series: str) -> tuple[Query, ...]:
    return (Query(series + _JOB, "{{instance}}"),)


def _gpu(series: str) -> tuple[Query, ...]:
    return (Query(series + _JOB, "{{instance}} {{gpu}}"),)


def _of(operator: str, series: str, *by: str) -> tuple[Query, ...]:
    return (Query(f"{operator} by ({', '.join(by)}) ({series}{_JOB})", _legend(by)),)


def _rate(counter: str, *by: str, only: str = "") -> tuple[Query, ...]:
    chosen = _JOB.replace("}", f",{only}}}") if only else _JOB
    return (Query(f"sum by ({', '.join(by)}) (rate({counter}{chosen}[$__rate_interval]))", _legend(by)),)


def _mean(histogram: str, by: str) -> tuple[Query, ...]:
    return _ratio(f"{histogram}_sum", f"{histogram}_count", by)


def _ratio(part: str, whole: str, by: str) -> tuple[Query, ...]:
    (over,), (under,) = _rate(part, by), _rate(whole, by)
    return (Query(f"{over.expression} / {under.expression}", over.legend),)


def _quantile(q: float, histogram: str, by: str) -> tuple[Query, ...]:
    (buckets,) = _rate(f"{histogram}_bucket", "le", by)
    return (Query(f"histogram_quantile({q:g}, {buckets.expression})", f"p{100 * q:g} {_legend((by,))}"),)


def _legend(labels: tuple[str, ...]) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in labels)
