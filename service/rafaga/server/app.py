"""Builds the server's object graph. How the server starts, serves and stops is in `lifecycle`."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from rafaga.addresses import UNIX, joined
from rafaga.bundle import EngineName
from rafaga.errors import DeviceError
from rafaga.server.config.settings import (
    Config,
    ConfigError,
    EngineSettings,
    ModelControl,
    ObservabilitySettings,
    SecuritySettings,
)
from rafaga.server.engines import devices, openvino
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.selection import EngineFactory, Placement
from rafaga.server.execution.supervisor import SupervisorPolicy
from rafaga.server.lifecycle import Server, run
from rafaga.server.observability.metrics import Metrics
from rafaga.server.observability.nvml import GpuFigures
from rafaga.server.observability.triton import TritonMetrics
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.repository import Poller, Repository
from rafaga.server.repository.trial_process import TrialProcess, Trials
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.services import page
from rafaga.server.services.catalog import Catalog
from rafaga.server.services.decoding import DecodePool
from rafaga.server.services.forecasting.service import Forecasting
from rafaga.server.services.open_inference.admin import RepositoryAdmin
from rafaga.server.services.open_inference.service import OpenInference
from rafaga.server.services.open_inference.stream import Streams
from rafaga.server.services.rest import ask, openapi, probes, timeseries
from rafaga.server.services.rest import open_inference as rest_open_inference
from rafaga.server.services.sequences import Sequences
from rafaga.server.services.submission import RequestLimits
from rafaga.server.services.vision import Vision
from rafaga.server.transport.expiry import Expiry
from rafaga.server.transport.grpc import GrpcTransport, Limits
from rafaga.server.transport.health import Health, add_reflection
from rafaga.server.transport.http import MAX_CONNECTIONS, HttpServer
from rafaga.server.transport.http_calls import HttpCalls
from rafaga.server.transport.router import Authenticator, InFlight, Router
from rafaga.server.transport.tls import Tls

if TYPE_CHECKING:  # needs the extra `tracing`
    from rafaga.server.transport.tracing import Tracer

_LOG = logging.getLogger(__name__)

# Requests to the admin port hold only a name. Loads run one at a time, and the other calls wait.
_ADMIN_REQUEST_BYTES = 64 * 1024
_ADMIN_CALLS = 64

# Files that connections leave free, for models and logs, and for those that asyncio accepts before it closes others.
_OTHER_FILES = 256

# gRPC's settings have 31 bits.
_MAX_MS = 2**31 - 1


def serve(config: Config, serving: Callable[[Server], None] | None = None) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP; returns the exit code. `serving` is called once all models are loaded.
    Raises ConfigError."""
    return run(build(config), serving)


def build(config: Config, engine_factory: EngineFactory = Placement.load, trials: Trials | None = None) -> Server:
    """A server that is not started. Raises ConfigError."""
    metrics = Metrics(GpuFigures.find())
    if config.observability.triton_metrics:
        metrics.registry.register(TritonMetrics(metrics))
    health = Health(
        lambda: repository.unready_because, lambda model: repository.serves(model), lambda: repository.alive
    )
    policy = BatchPolicy(
        max_queue_delay_s=config.batching.max_queue_delay_us / 1e6,
        max_queue_wait_s=config.batching.max_queue_wait_ms / 1e3,
        max_queue_jobs=config.batching.max_queue_requests,
    )
    loader = Loader(
        policy,
        config.batching.max_batch_size,
        config.models.precision,
        _placement(config.engines),
        metrics,
        SupervisorPolicy(timeout_s=config.engines.engine_timeout_s),
        engine_factory,
        trials or TrialProcess(),
    )

    control = config.models.model_control
    repository = Repository(
        config.models.repository,
        loader,
        metrics,
        health.changed,
        config.models.model_versions,
        control is ModelControl.EXPLICIT,
    )
    workers = DecodePool(config.limits.decode_threads or available_cores())
    limits = RequestLimits(
        config.limits.max_request_rows, config.limits.max_image_pixels, config.limits.max_free_pixels
    )
    expiry = Expiry()
    services = (
        Vision(repository, workers, limits),
        Forecasting(repository, workers, limits),
        Sequences(repository, limits),
        Catalog(repository),
        OpenInference(repository, workers, limits, expiry, health, version("rafaga")),
    )
    handlers = {path: handler for service in services for path, handler in service.handlers().items()}
    authenticator = Authenticator(config.security.bearer_token_sha256 or ())
    tracer = _tracer(config.observability)
    router = Router(
        handlers,
        authenticator,
        metrics,
        config.limits.max_request_bytes,
        InFlight(config.limits.max_concurrent_calls, config.limits.max_bytes_in_flight),
        tracer.record if tracer else None,
    )
    streams = Streams(router)
    metrics.watch_in_flight(lambda: router.in_flight.count)
    return Server(
        config=config,
        repository=repository,
        health=health,
        router=router,
        workers=workers,
        streams=streams,
        expiry=expiry,
        transport=_transport(config, router, authenticator, health, streams),
        admin=_admin(config, repository, authenticator, metrics),
        poller=Poller(repository, config.models.poll_interval_s) if control is ModelControl.POLL else None,
        http=_http(config, router, health, metrics),
        tracer=tracer,
    )


def _placement(engines: EngineSettings) -> Placement:
    try:
        choice = devices.choose(engines.device, engines.device_fallback, devices.Nvidia())
        level = logging.WARNING if choice.degraded else logging.INFO
        _LOG.log(level, "device chosen: %s", choice.why, extra={"devices": [str(d) for d in choice.devices]})
        placement = Placement.on(choice, engines)
    except DeviceError as error:
        raise ConfigError(f"device: {error} (to use the CPU instead, set --device-fallback cpu)") from None
    if EngineName.OPENVINO in (engines.engine.default, *engines.engine.by_model.values()):
        try:
            openvino.runtime()
        except DeviceError as error:
            raise ConfigError(f"engine: {error}") from None
    return placement


def _transport(
    config: Config, router: Router, authenticator: Authenticator, health: Health, streams: Streams
) -> GrpcTransport:
    network = config.network
    address = joined(network.host, network.grpc_port) if network.grpc_socket is None else f"{UNIX}{network.grpc_socket}"
    limits = Limits(
        config.limits.max_request_bytes,
        max_connections=min(config.limits.max_connections, _free_files() - _http_connections()),
        max_connection_age_ms=_milliseconds(network.max_connection_age_s),
        max_connection_age_grace_ms=_milliseconds(network.drain_timeout_s),
        max_connection_idle_ms=_milliseconds(network.max_connection_idle_s),
    )
    names = tuple(sorted({path.split("/")[1] for path in router.methods}))
    services = (health.add_to, streams.add_to, partial(add_reflection, services=names))
    return GrpcTransport(address, router, authenticator, limits, _tls(config.security), services, on_death=health.die)


def _http(config: Config, router: Router, health: Health, metrics: Metrics) -> HttpServer:
    limits, security = config.limits, config.security
    mutual = security.tls_client_ca is not None
    calls = HttpCalls(router, limits.max_request_bytes, limits.max_bytes_in_flight, certificates=mutual)
    routes = [*probes.routes(health, metrics.registry), *ask.routes(calls), *timeseries.routes(calls)]
    routes += rest_open_inference.routes(calls)
    routes.append(openapi.route(routes, version("rafaga"), secured=bool(security.bearer_token_sha256)))
    if config.network.page:
        routes += page.routes()
    network = config.network
    return HttpServer(network.host, network.http_port, routes, _tls(security), _http_connections())


def _admin(
    config: Config, repository: Repository, authenticator: Authenticator, metrics: Metrics
) -> GrpcTransport | None:
    """Its callers decide which models are served. Without bearer tokens it therefore listens on loopback only."""
    if config.models.admin_port is None:
        return None
    host = config.network.host if authenticator.required or config.network.loopback else "127.0.0.1"
    handlers = RepositoryAdmin(repository).handlers()
    router = Router(handlers, authenticator, metrics, _ADMIN_REQUEST_BYTES, InFlight(_ADMIN_CALLS))
    limits = Limits(_ADMIN_REQUEST_BYTES)
    address = joined(host, config.models.admin_port)
    return GrpcTransport(address, router, authenticator, limits, _tls(config.security), blocking=True)


def _http_connections() -> int:
    """At most a quarter of the free files: a flood on one port leaves files for health checks on the other."""
    return min(MAX_CONNECTIONS, _free_files() // 4)


def _free_files() -> int:
    """How many connections the process may hold, after raising its limit of files as far as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return sys.maxsize if most == resource.RLIM_INFINITY else max(8, most - _OTHER_FILES)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else min(round(seconds * 1000), _MAX_MS)


def _tracer(settings: ObservabilitySettings) -> Tracer | None:
    if not settings.tracing_endpoint:
        return None
    try:
        from rafaga.server.transport.tracing import Tracer
    except ImportError:
        raise ConfigError("tracing_endpoint: tracing is not installed: pip install 'rafaga[tracing]'") from None
    return Tracer.to(settings.tracing_endpoint, settings.tracing_sample_ratio, version("rafaga"))


def _tls(security: SecuritySettings) -> Tls | None:
    if security.tls_key is None or security.tls_certificate is None:
        return None
    try:
        return Tls(security.tls_key, security.tls_certificate, security.tls_client_ca)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"{where}{error.strerror}") from None
