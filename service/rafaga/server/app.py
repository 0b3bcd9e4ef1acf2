"""Builds the object graph and runs it: what depends on what is all here, and how the server lives is in `serve`."""

from __future__ import annotations

import gc
import logging
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pythonjsonlogger.json import JsonFormatter

from rafaga.errors import DeviceError
from rafaga.server.config.model_versions import Versions
from rafaga.server.config.settings import Config, ConfigError, LogFormat, ModelControl
from rafaga.server.engines import devices
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.memory_budget import MIB
from rafaga.server.engines.selection import GpuSettings, Placement
from rafaga.server.execution.supervisor import WatchPolicy
from rafaga.server.lifecycle import Server, ShutdownSignals
from rafaga.server.observability.metrics import Metrics
from rafaga.server.observability.nvml import GpuFigures
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.poller import Poller
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.services.catalog import Catalog
from rafaga.server.services.decoding import DecodePool, RequestLimits
from rafaga.server.services.forecasting import Forecasting
from rafaga.server.services.open_inference.admin import RepositoryAdmin
from rafaga.server.services.open_inference.service import OpenInference
from rafaga.server.services.open_inference.stream import Streams
from rafaga.server.services.sequences import Sequences
from rafaga.server.services.vision import Vision
from rafaga.server.transport.expiry import Expiry
from rafaga.server.transport.grpc import GrpcTransport, Limits, Tls
from rafaga.server.transport.health import Health, add_reflection
from rafaga.server.transport.http import HttpServer
from rafaga.server.transport.router import Authenticator, InFlight, Router

if TYPE_CHECKING:  # an extra of its own
    from rafaga.server.transport.tracing import Tracer

_LOG = logging.getLogger(__name__)

# The admin listener takes names alone, one load at a time; the others wait.
_ADMIN_REQUEST_BYTES = 64 * 1024
_ADMIN_CALLS = 64


def serve(config: Config) -> int:
    """Serves until SIGTERM or SIGINT; gives the exit code. Raises ConfigError."""
    configure_logging(config)
    if config.transport:
        _LOG.warning("transport has no effect: grpcio is the only transport; remove the setting")
    server = build(config)
    signals = ShutdownSignals()
    with signals:
        server.start()
        for name in config.engines.by_model.keys() - {name for name, _ in server.repository.on_disk()}:
            _LOG.warning("instances, threads or spinning are set for a model that is not there", extra={"model": name})
        # What is there now stays: full collections, which stop every thread, need not walk through it for ever.
        gc.collect()
        gc.freeze()
        # Serving happens in other threads: this one only waits, so that a signal is always heard.
        signals.wait()
        _LOG.info("draining: finishing what was accepted, a second signal stops at once")
        clean = server.drain_and_stop(hurry=signals.second)
    return 0 if clean else 1


def build(config: Config) -> Server:
    """A server that is not started. Raises ConfigError."""
    metrics, health = Metrics(triton=config.triton_metrics, gpus=GpuFigures.find()), Health()
    policy = BatchPolicy(
        max_queue_delay_s=config.max_queue_delay_us / 1e6,
        max_queue_wait_s=config.max_queue_wait_ms / 1e3,
        max_queue_jobs=config.max_queue_requests,
    )
    watch = WatchPolicy(timeout_s=config.engine_timeout_s)
    loader = Loader(policy, config.max_batch_size, config.precision.precision, _placement(config), metrics, watch)

    def tell(model: str) -> None:
        health.model(model, lambda: repository.serves(model))
        health.server(lambda: repository.ready)
        health.process(lambda: repository.alive)

    explicit = config.model_control is ModelControl.EXPLICIT
    repository = Repository(config.repository, loader, metrics, tell, Versions.parse(config.model_versions), explicit)
    workers = DecodePool(config.decode_threads or available_cores(), config.max_pending_decodes)
    limits = RequestLimits(config.max_request_rows, config.max_image_pixels, config.max_free_pixels)
    expiry = Expiry()
    services = (
        Vision(repository, workers, limits),
        Forecasting(repository),
        Sequences(repository),
        Catalog(repository),
        OpenInference(repository, workers, limits, expiry, version("rafaga")),
    )
    handlers = {path: handler for service in services for path, handler in service.handlers().items()}
    authenticator = Authenticator(config.bearer_token_sha256)
    tracer = _tracer(config)
    router = Router(
        handlers,
        authenticator,
        metrics,
        config.max_request_bytes,
        InFlight(config.max_concurrent_calls, config.max_bytes_in_flight),
        tracer.record if tracer else None,
    )
    streams = Streams(router)
    metrics.watch_in_flight(lambda: router.in_flight.count)
    return Server(
        config,
        repository=repository,
        health=health,
        router=router,
        workers=workers,
        streams=streams,
        expiry=expiry,
        transport=_transport(config, router, authenticator, health, streams),
        admin=_admin(config, repository, authenticator, metrics),
        poller=Poller(repository, config.poll_interval_s) if config.model_control is ModelControl.POLL else None,
        http=HttpServer(
            config.host, config.http_port, metrics.registry, lambda: repository.unready_because, lambda: health.alive
        ),
        tracer=tracer,
    )


def _placement(config: Config) -> Placement:
    settings = GpuSettings(
        config.batch_buckets,
        None if config.gpu_memory_mib is None else config.gpu_memory_mib * MIB,
        config.gpu_model_memory,
        config.gpu_nhwc,
        config.gpu_graphs,
        config.tensorrt_cache,
    )
    try:
        choice = devices.choose(devices.parse(config.device), config.device_fallback, devices.Nvidia())
        level = logging.WARNING if choice.degraded else logging.INFO
        _LOG.log(level, "device chosen: %s", choice.why, extra={"devices": [str(d) for d in choice.devices]})
        return Placement.on(choice, config.device_fallback, settings, config.engines)
    except DeviceError as error:
        raise ConfigError(f"device: {error} (or say --device-fallback cpu)") from None


def configure_logging(config: Config) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if config.log_format is LogFormat.JSON:
        fields = "{asctime}{levelname}{name}{message}"
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(fields, style="{", rename_fields=names))
    else:
        handler.setFormatter(_TextFormatter("{asctime} {levelname:7} {message}", style="{"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)


def _transport(
    config: Config,
    router: Router,
    authenticator: Authenticator,
    health: Health,
    streams: Streams,
) -> GrpcTransport:
    address = f"{config.host}:{config.grpc_port}"
    limits = Limits(config.max_request_bytes)
    names = tuple(sorted({path.split("/")[1] for path in router.methods}))
    services = (
        health.add_to,
        streams.add_to,
        partial(add_reflection, services=names),
    )
    secured = authenticator.required or config.tls_client_ca is not None
    if not config.loopback and not secured:
        _LOG.warning("listening on %s without a bearer token or client certificates: anybody may call", config.host)
    return GrpcTransport(address, router, authenticator, limits, _tls(config), services, on_death=health.die)


def _admin(
    config: Config, repository: Repository, authenticator: Authenticator, metrics: Metrics
) -> GrpcTransport | None:
    """Whoever can reach it decides what is served: nobody from outside, unless callers must show a token."""
    if config.admin_port is None:
        return None
    host = config.host if authenticator.required else "127.0.0.1"
    handlers = RepositoryAdmin(repository).handlers()
    router = Router(handlers, authenticator, metrics, _ADMIN_REQUEST_BYTES, InFlight(_ADMIN_CALLS))
    limits = Limits(_ADMIN_REQUEST_BYTES)
    address = f"{host}:{config.admin_port}"
    return GrpcTransport(address, router, authenticator, limits, _tls(config), blocking=True)


def _tracer(config: Config) -> Tracer | None:
    if not config.tracing_endpoint:
        return None
    try:
        from rafaga.server.transport.tracing import Tracer
    except ImportError:
        raise ConfigError("tracing_endpoint: tracing is not installed: pip install 'rafaga[tracing]'") from None
    return Tracer.to(config.tracing_endpoint, config.tracing_sample_ratio, version("rafaga"))


def _tls(config: Config) -> Tls | None:
    if config.tls_key is None or config.tls_certificate is None:
        return None
    ca = config.tls_client_ca
    return Tls(_read(config.tls_key), _read(config.tls_certificate), None if ca is None else _read(ca))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None


class _TextFormatter(logging.Formatter):
    """A line for people: the message, then the fields that JSON would carry."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        return super().format(record) + "".join(f"  {k}={v}" for k, v in fields.items())
