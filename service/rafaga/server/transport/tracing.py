"""One OpenTelemetry span per call, sent to a collector over OTLP/gRPC. Needs the `tracing` extra; off by default.

A span is made when its call is settled, from times measured anyway: the path of a request has no code for it.
It continues the caller's trace if the caller sent a W3C `traceparent`.
"""

from __future__ import annotations

import time

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rafaga.errors import RafagaError
from rafaga.server.transport.router import Call


class Tracer:
    """`ratio`: share of the traces begun here; a caller's own decision is followed."""

    def __init__(self, exporter: SpanExporter, ratio: float, version: str) -> None:
        resource = Resource.create({"service.name": "rafaga", "service.version": version})
        self._provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(ratio)))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rafaga.server")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, ratio: float, version: str) -> Tracer:
        """`endpoint`: "host:4317" of a collector; plaintext."""
        return cls(OTLPSpanExporter(endpoint=endpoint, insecure=True), ratio, version)

    def record(self, call: Call, error: RafagaError | None, seconds: float) -> None:
        """The span of a call that was settled just now, `seconds` after it was received."""
        _, service, method = call.method.split("/")
        headers = {key: value for key, value in call.metadata if isinstance(value, str)}
        end_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{service}/{method}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=end_ns - round(seconds * 1e9),
        )
        if span.is_recording():
            code = grpc.StatusCode.OK if error is None else error.code
            span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": method})
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            if error is not None:
                span.set_attribute("rafaga.reason", error.reason)
                span.set_status(Status(StatusCode.ERROR, error.message))
            if call.served is not None:
                model, timing = call.served
                span.set_attributes(
                    {
                        "rafaga.model": model,
                        "rafaga.queue_us": round(timing.queue_s * 1e6),
                        "rafaga.inference_us": round(timing.inference_s * 1e6),
                        "rafaga.batch_size": timing.batch_size,
                    }
                )
        span.end(end_ns)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
