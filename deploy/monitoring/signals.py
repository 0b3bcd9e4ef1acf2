"""Recorded series and alerts. Queries of the dashboard are in `panels`.

Expressions keep the labels that distinguish scraped servers (`without`, not `by`): they work with Kubernetes' pod and
namespace as with a plain list of addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Pace:
    """Time windows of the rules. Tests use shorter ones.

    window: for rates, at least four scrapes. recording_window: for the rates of autoscalers, which must react faster.
    restart_window: long enough to contain several restarts of a container in back-off. pending: how long a condition
    must hold.
    """

    window: str = "5m"
    recording_window: str = "1m"
    restart_window: str = "30m"
    pending: str = "5m"


class Severity(StrEnum):
    """page: users are not served, wake someone. ticket: look at it today."""

    PAGE = "page"
    TICKET = "ticket"


@dataclass(frozen=True)
class Recording:
    """A series that autoscalers query."""

    name: str
    expression: str


@dataclass(frozen=True)
class Alert:
    """docs/operating.md says under its name what to do. at_once: fires without a pending time."""

    name: str
    severity: Severity
    expression: str
    summary: str
    at_once: bool = False


def recordings(pace: Pace) -> tuple[Recording, ...]:
    window = pace.recording_window
    return (
        # The longest wait of all models.
        Recording(
            "rafaga:predicted_wait_seconds",
            f"max without (model) (avg_over_time(rafaga_queue_predicted_wait_seconds[{window}]))",
        ),
        # The sum over models, because they share the cores or the GPU. Grows with the load from 0 to 1. The share of
        # time that engines run does not: an engine is busy with small batches long before it reaches its capacity.
        Recording(
            "rafaga:utilisation_ratio",
            f"sum without (model) (rate(rafaga_batch_size_sum[{window}]) / rafaga_model_capacity_rows_per_second)",
        ),
    )


def alerts(pace: Pace) -> tuple[Alert, ...]:
    window = pace.window
    calls = f"sum without (method, code) (rate(rafaga_requests_total[{window}]))"
    return (
        Alert(
            "RafagaAbsent",
            Severity.PAGE,
            "absent(rafaga_requests_in_flight)",
            "No server is scraped: none is running, or Prometheus cannot reach them.",
        ),
        Alert(
            "RafagaModelNotReady",
            Severity.PAGE,
            # A refused new version while an older one is served: RafagaModelRefused.
            "max without (version) (rafaga_model_ready) == 0",
            "Model {{ $labels.model }} is in the repository but not served.",
        ),
        Alert(
            "RafagaFailing",
            Severity.PAGE,
            f'sum without (method, code) (rate(rafaga_requests_total{{code=~"INTERNAL|UNKNOWN"}}[{window}])) '
            f"/ {calls} > 0.001",
            "{{ $value | humanizePercentage }} of the calls fail with an error of the server or a model.",
        ),
        Alert(
            "RafagaOverloaded",
            Severity.PAGE,
            "sum without (method, reason) (rate("
            f'rafaga_refusals_total{{reason=~"QUEUE_FULL|DEADLINE_UNREACHABLE"}}[{window}])) / {calls} > 0.05',
            "{{ $value | humanizePercentage }} of the calls are refused: not enough capacity.",
        ),
        Alert(
            "RafagaLate",
            Severity.TICKET,
            f'sum without (model, cause) (rate(rafaga_dropped_total{{cause="deadline"}}[{window}])) / {calls} > 0.01',
            "{{ $value | humanizePercentage }} of the calls are accepted and then miss their deadline in the queue.",
        ),
        Alert(
            "RafagaQueueing",
            Severity.TICKET,
            "rafaga:predicted_wait_seconds > 0.5",
            "The predicted wait is {{ $value | humanizeDuration }}: the autoscaler does not keep up.",
        ),
        Alert(
            "RafagaEngineFailing",
            Severity.TICKET,
            f"rate(rafaga_engine_failures_total[{window}]) > 0",
            "Requests fail because of the engine of model {{ $labels.model }} or its device.",
        ),
        Alert(
            "RafagaEngineLost",
            Severity.TICKET,
            f"increase(rafaga_engine_restarts_total[{pace.restart_window}]) > 0",
            "The engine of model {{ $labels.model }} hung or died, and was restarted.",
            at_once=True,
        ),
        Alert(
            "RafagaModelRefused",
            Severity.TICKET,
            # The series appears with the first refusal: `increase` alone would miss it.
            f"rafaga_model_load_failures_total unless rafaga_model_load_failures_total offset {window} "
            f"or increase(rafaga_model_load_failures_total[{window}]) > 0",
            "Version {{ $labels.version }} of model {{ $labels.model }} was refused at load.",
            at_once=True,
        ),
        Alert(
            "RafagaRestarting",
            Severity.TICKET,
            f"changes(process_start_time_seconds[{pace.restart_window}]) > 2 "
            "and on (instance, job) rafaga_requests_in_flight",
            "The server restarted {{ $value }} times in half an hour.",
            at_once=True,
        ),
    )
