"""Spans of calls: what they contain, whose trace they continue, and that errors carry their reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the tracing extra is not installed")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from rafaga.server import app
from rafaga.server.transport.tracing import Tracer
from rafaga.v1 import forecasting_pb2 as pb
from tests.integration.serving import Serve, Served, refusal

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C


@pytest.fixture
def traced(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], tuple[Served, Callable[[], list[Any]]]]:
    """A server that starts this share of traces, and a function that gives its spans in order."""

    def start(ratio: float) -> tuple[Served, Callable[[], list[Any]]]:
        exporter = InMemorySpanExporter()
        tracer = Tracer(exporter, ratio, "test")
        monkeypatch.setattr(app, "_tracer", lambda _: tracer)

        def spans() -> list[Any]:
            tracer._provider.force_flush()
            return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

        return serve(), spans

    return start


def test_a_span_shows_where_the_time_went(traced: Callable[..., Any]) -> None:
    served, spans = traced(1.0)
    served.forecasting.Forecast(pb.ForecastRequest(model="series", history=[1, 2, 3]))
    refused = refusal(lambda: served.forecasting.Forecast(pb.ForecastRequest(model="series", history=[1])))
    good, bad = spans()
    assert good.name == "rafaga.v1.Forecasting/Forecast"
    assert (good.attributes["rafaga.model"], good.attributes["rafaga.batch_size"]) == ("series", 1)
    assert (good.attributes["rpc.grpc.status_code"], good.status.status_code) == (0, StatusCode.UNSET)
    assert good.end_time > good.start_time
    assert (bad.attributes["rafaga.reason"], bad.status.status_code) == (refused.reason, StatusCode.ERROR)


def test_a_callers_trace_is_continued_and_its_decision_followed(traced: Callable[..., Any]) -> None:
    served, spans = traced(0.0)
    request = pb.ForecastRequest(model="series", history=[1, 2, 3])
    served.forecasting.Forecast(request)  # the caller sent no decision, and no trace begins here
    for flag in ("00", "01"):
        parent = f"00-{TRACE_ID:032x}-b7ad6b7169203331-{flag}"
        served.forecasting.Forecast(request, metadata=(("traceparent", parent),))
    (span,) = spans()
    assert span.context.trace_id == TRACE_ID
