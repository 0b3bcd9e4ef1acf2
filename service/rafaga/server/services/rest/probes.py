"""The open paths: metrics for Prometheus, and health for probes. They need no token and are never refused."""

from __future__ import annotations

from typing import cast

from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from rafaga.server.transport.health import RESTART, Health
from rafaga.server.transport.http_calls import json_response


def routes(health: Health, registry: CollectorRegistry) -> list[Route]:
    exposition = cast("Response", make_asgi_app(registry))  # an ASGI application, as every Response is

    async def metrics(_: Request) -> Response:
        return exposition

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("alive\n") if health.alive else PlainTextResponse(f"{RESTART}\n", 503)

    async def readyz(_: Request) -> Response:
        why = health.unready_because
        return PlainTextResponse(f"not ready: {why}\n", 503) if why else PlainTextResponse("ready\n")

    async def live(_: Request) -> Response:
        return json_response({"live": True}) if health.alive else json_response({"live": False, "error": RESTART}, 503)

    async def ready(_: Request) -> Response:
        why = health.unready_because
        return (
            json_response({"ready": False, "error": f"not ready: {why}"}, 503)
            if why
            else json_response({"ready": True})
        )

    return [
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
    ]
