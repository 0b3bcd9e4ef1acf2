"""What is watched of a running server: recorded series and alerts. What is only looked at is in `panels`.

Expressions keep the labels that tell one scraped server from another (`without`, not `by`): they mean the same with
Kubernetes' pod and namespace as with a plain list of addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Pace:
    """How fast alerts follow. Tests hurry.

    window: over which rates are taken, of at least four scrapes; recording_window: the same for autoscalers, which must
    be quicker; restart_window: so long that a container whose restarts are put off shows several of them. pending: how
    long a condition must hold.
    """

    window: str = "5m"
    recording_window: str = "1m"
    restart_window: str = "30m"
    pending: str = "5m"


class Severity(StrEnum):
    """page: somebody is not served, wake a person. ticket: somebody should look today."""

    PAGE = "page"
    TICKET = "ticket"


@dataclass(frozen=True)
class Recording:
    """A series that autoscalers ask for, so that its expression is written once."""

    name: str
    expression: str


@dataclass(frozen=True)
class Alert:
    """What to do on each is in docs/operating.md, under its name. at_once: fires without having to hold for a while."""

    name: str
    severity: Severity
    expression: str
    summary: str
    at_once: bool = False


def recordings(pace: Pace) -> tuple[Recording, ...]:
    window = pace.recording_window
    return (
        # Of the model that waits longest: whoever asks for that one waits.
        Recording(
            "rafaga:predicted_wait_seconds",
            f"max without (model) (avg_over_time(rafaga_queue_predicted_wait_seconds[{window}]))",
        ),
        # The sum over models, for they share the cores or the GPU. Grows with the load from 0 to 1, unlike the share of
        # time that engines run: an engine is busy with small batches long before it is full.
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
            "No server is scraped: none runs, or Prometheus does not reach them.",
        ),
        Alert(
            "RafagaModelNotReady",
            Severity.PAGE,
            # A new version that was refused while an older one serves on is RafagaModelRefused's.
            "max without (version) (rafaga_model_ready) == 0",
            "Model {{ $labels.model }} is there and not served.",
        ),
        Alert(
            "RafagaFailing",
            Severity.PAGE,
            f'sum without (method, code) (rate(rafaga_requests_total{{code=~"INTERNAL|UNKNOWN"}}[{window}])) '
            f"/ {calls} > 0.001",
            "{{ $value | humanizePercentage }} of the calls fail on a defect of the server or a model.",
        ),
        Alert(
            "RafagaOverloaded",
            Severity.PAGE,
            "sum without (method, reason) (rate("
            f'rafaga_refusals_total{{reason=~"QUEUE_FULL|DEADLINE_UNREACHABLE"}}[{window}])) / {calls} > 0.05',
            "{{ $value | humanizePercentage }} of the calls are refused for want of capacity.",
        ),
        Alert(
            "RafagaLate",
            Severity.TICKET,
            f'sum without (model, cause) (rate(rafaga_dropped_total{{cause="deadline"}}[{window}])) / {calls} > 0.01',
            "{{ $value | humanizePercentage }} of the calls are accepted and then run out of time in the queue.",
        ),
        Alert(
            "RafagaQueueing",
            Severity.TICKET,
            "rafaga:predicted_wait_seconds > 0.5",
            "Requests are predicted to wait {{ $value | humanizeDuration }}: the autoscaler does not keep up.",
        ),
        Alert(
            "RafagaEngineFailing",
            Severity.TICKET,
            f"rate(rafaga_engine_failures_total[{window}]) > 0",
            "The engine of model {{ $labels.model }} fails on inputs that were valid.",
        ),
        Alert(
            "RafagaEngineLost",
            Severity.TICKET,
            f"increase(rafaga_engine_restarts_total[{pace.restart_window}]) > 0",
            "The engine of model {{ $labels.model }} hung or died, and a new one was brought up.",
            at_once=True,
        ),
        Alert(
            "RafagaModelRefused",
            Severity.TICKET,
            # The series is born with the first refusal, so there is nothing before it to take an increase from.
            f"rafaga_model_load_failures_total unless rafaga_model_load_failures_total offset {window} "
            f"or increase(rafaga_model_load_failures_total[{window}]) > 0",
            "Version {{ $labels.version }} of model {{ $labels.model }} was refused when it was loaded.",
            at_once=True,
        ),
        Alert(
            "RafagaRestarting",
            Severity.TICKET,
            f"changes(process_start_time_seconds[{pace.restart_window}]) > 2 "
            "and on (instance, job) rafaga_requests_in_flight",
            "The server was restarted {{ $value }} times in half an hour.",
            at_once=True,
        ),
    )
