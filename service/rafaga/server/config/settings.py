"""Every setting of the server, once: defaults < TOML file < environment < flags. The only reader of the environment.

A field `max_queue_wait_ms` is `--max-queue-wait-ms`, `RAFAGA_MAX_QUEUE_WAIT_MS`, and `max_queue_wait_ms = 500` in the
file that `--config` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from rafaga.bundle import Precision
from rafaga.server.config.model_versions import Versions
from rafaga.server.config.per_model import (
    EngineSettings,
    PerModel,
    T,
    at_least_one,
    at_least_one_or_auto,
    on_off_or_auto,
)
from rafaga.server.engines import devices
from rafaga.server.engines.devices import DeviceFallback
from rafaga.server.engines.memory_budget import MIB

PREFIX = "RAFAGA_"


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what was expected."""


class ModelControl(StrEnum):
    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class PrecisionChoice(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def precision(self) -> Precision | None:
        """None: chosen per model."""
        return None if self is PrecisionChoice.AUTO else Precision(self.value)


class GpuChoice(StrEnum):
    """An option of the GPU that helps some models and slows others down: measured at load, or told."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    repository: Path = _setting(Path("repository"), "folder of published bundles")
    host: str = _setting("127.0.0.1", "address to listen on, for gRPC and HTTP")
    grpc_port: int = _setting(50051, "gRPC port; 0 takes a free one")
    http_port: int = _setting(8080, "port of /metrics, /healthz and /readyz; 0 takes a free one")
    transport: str = _setting("", "no effect: grpcio is the only transport; will be removed in the next version")

    model_versions: tuple[str, ...] = _setting(
        ("latest",), "latest, latest:N or all; for one model NAME=latest:N, NAME=all or NAME=1,3"
    )
    model_control: ModelControl = _setting(
        ModelControl.NONE, "after the start: none, poll the repository for changes, or explicit requests to admin_port"
    )
    poll_interval_s: float = _setting(5.0, "time between two looks at the repository, with model_control poll")
    load_models: tuple[str, ...] = _setting((), "models to start with, with model_control explicit; * for all")
    admin_port: int | None = _setting(
        None, "gRPC port for RepositoryModelLoad and -Unload; on loopback alone unless there are bearer tokens"
    )

    device: tuple[str, ...] = _setting(
        (devices.AUTO,), "auto, cpu, cuda[:N] or tensorrt[:N]; several GPUs, comma-separated, get an engine each"
    )
    device_fallback: DeviceFallback = _setting(
        DeviceFallback.FAIL, "when the device or a model on it fails to load: fail, or fall back to the cpu"
    )
    batch_buckets: tuple[int, ...] = _setting(
        (), "batch sizes that a GPU runs, comma-separated; others are padded (default: powers of two)"
    )
    gpu_memory_mib: int | None = _setting(
        None, "memory of each GPU that models may take together; default: what is free, but 512 MiB"
    )
    gpu_model_memory_mib: tuple[str, ...] = _setting(
        (), "memory that each model may take on a GPU; by model: 4096,NAME=2048; default: no limit"
    )
    gpu_nhwc: GpuChoice = _setting(GpuChoice.AUTO, "channels last on the GPU: auto (measured at load), on or off")
    gpu_graphs: GpuChoice = _setting(GpuChoice.AUTO, "CUDA graphs: auto (measured at load, per batch size), on or off")
    tensorrt_cache: Path = _setting(
        Path("~/.cache/rafaga/tensorrt"), "folder of TensorRT's built engines; nobody else may write to it"
    )

    precision: PrecisionChoice = _setting(
        PrecisionChoice.AUTO, "variant to serve: auto (the fastest that kept its accuracy), fp32, fp16 or int8"
    )
    threads: tuple[str, ...] = _setting(
        ("auto",), "ONNX Runtime threads of an engine on the CPU, or auto: by a timed run; by model: 2,NAME=1"
    )
    spinning: tuple[str, ...] = _setting(
        ("auto",),
        "whether those threads spin while they wait: on, off, or auto: with cores to spare; by model: off,NAME=on",
    )
    instances: tuple[str, ...] = _setting(
        ("1",), "engines of each model on each device; on the CPU they share the cores; by model: 1,NAME=2"
    )
    max_batch_size: int = _setting(32, "rows per batch, where the bundle allows as many")
    max_queue_delay_us: int = _setting(0, "how long an idle engine waits for company")
    max_queue_wait_ms: int = _setting(1000, "requests predicted to wait longer are refused")
    max_queue_requests: int = _setting(
        4096, "queued requests per model, of one priority and those above it, whatever is predicted"
    )
    engine_timeout_s: float = _setting(10.0, "a run is never given up sooner, nor before 20 times its prediction")

    max_concurrent_calls: int = _setting(
        4096, "calls in flight; more are refused; a quarter of it is kept for each priority"
    )
    max_bytes_in_flight: int = _setting(
        512 * 2**20, "bytes of requests in flight; more are refused; a quarter is kept for each priority"
    )
    max_request_bytes: int = _setting(16 * 2**20, "size of one request")
    max_request_rows: int = _setting(1024, "images, or rows of tensors, in one request")
    max_image_pixels: int = _setting(50_000_000, "pixels of an encoded image")
    max_free_pixels: int = _setting(2048 * 2048, "pixels of an image for models that take any size")
    decode_threads: int | None = _setting(None, "image decoders; default: one per core")
    max_pending_decodes: int = _setting(256, "requests waiting for a decoder; more are refused")

    bearer_token_sha256: tuple[str, ...] = _setting((), "sha256 in hex of tokens that may call, comma-separated")
    tls_key: Path | None = _setting(None, "PEM file of the server's private key")
    tls_certificate: Path | None = _setting(None, "PEM file of the server's certificate chain")
    tls_client_ca: Path | None = _setting(None, "PEM file; clients must show a certificate signed by it")

    drain_delay_s: float = _setting(0.0, "on SIGTERM, how long to go on serving as NOT_SERVING: time for balancers")
    drain_timeout_s: float = _setting(30.0, "on SIGTERM, how long accepted requests may take to finish")
    tracing_endpoint: str = _setting("", "host:port of an OpenTelemetry collector (OTLP/gRPC); empty: no tracing")
    tracing_sample_ratio: float = _setting(0.01, "share of traces begun here; callers' own decisions are followed")
    triton_metrics: bool = _setting(False, "count under Triton's names too: nv_inference_*")
    log_format: LogFormat = _setting(LogFormat.JSON, "text is for people")
    log_level: str = _setting("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size",
            "max_queue_requests",
            "max_concurrent_calls",
            "max_request_bytes",
            "max_request_rows",
            "max_image_pixels",
            "max_free_pixels",
            "max_pending_decodes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_queue_delay_us", "max_queue_wait_ms", "drain_delay_s", "drain_timeout_s"):
            if not 0 <= getattr(self, name) < math.inf:  # so that NaN fails too
                raise ConfigError(f"{name}: expected zero or more, got {getattr(self, name)}")
        if not 0 <= self.tracing_sample_ratio <= 1:
            raise ConfigError(f"tracing_sample_ratio: expected 0 to 1, got {self.tracing_sample_ratio}")
        try:
            devices.parse(self.device)
        except ValueError as error:
            raise ConfigError(f"device: {error}") from None
        if any(rows < 1 for rows in self.batch_buckets):
            raise ConfigError(f"batch_buckets: expected at least 1 each, got {min(self.batch_buckets)}")
        if self.max_bytes_in_flight < self.max_request_bytes:
            raise ConfigError(
                f"max_bytes_in_flight: expected at least max_request_bytes ({self.max_request_bytes}), "
                f"got {self.max_bytes_in_flight}"
            )
        for name in ("decode_threads", "gpu_memory_mib"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("grpc_port", "http_port", "admin_port"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name}: expected 0 to 65535, got {getattr(self, name)}")
        for name in ("poll_interval_s", "engine_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected more than zero, got {getattr(self, name)}")
        try:
            Versions.parse(self.model_versions)
        except ValueError as error:
            raise ConfigError(f"model_versions: {error}") from None
        _ = self.engines, self.gpu_model_memory
        explicit = self.model_control is ModelControl.EXPLICIT
        if explicit != (self.admin_port is not None):
            raise ConfigError("admin_port and model_control explicit go together")
        if self.load_models and not explicit:
            raise ConfigError("load_models is for model_control explicit: otherwise every model is loaded")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log_level: expected debug, info, warning or error, got {self.log_level!r}")
        for digest in self.bearer_token_sha256:
            if len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest):
                raise ConfigError("bearer_token_sha256: expected 64 lower-case hex digits (sha256 of the token) each")
        if (self.tls_key is None) != (self.tls_certificate is None):
            raise ConfigError("tls_key and tls_certificate go together")
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ConfigError("tls_client_ca needs tls_key and tls_certificate")

    @property
    def engines(self) -> PerModel[EngineSettings]:
        """Raises ConfigError."""
        instances = _per_model("instances", self.instances, at_least_one, 1)
        threads = _per_model("threads", self.threads, at_least_one_or_auto, None)
        spinning = _per_model("spinning", self.spinning, on_off_or_auto, None)
        names = {*instances.by_model, *threads.by_model, *spinning.by_model}
        return PerModel(
            EngineSettings(instances.default, threads.default, spinning.default),
            {name: EngineSettings(instances.of(name), threads.of(name), spinning.of(name)) for name in sorted(names)},
        )

    @property
    def gpu_model_memory(self) -> PerModel[int | None]:
        """Bytes; None: no limit. Raises ConfigError."""
        return _per_model(
            "gpu_model_memory_mib", self.gpu_model_memory_mib, lambda text: at_least_one(text) * MIB, None
        )

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


# Settings that a model can have a value of its own for.
_BY_MODEL = ("threads", "spinning", "instances", "gpu_model_memory_mib")

_FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting, and --config."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    for name, setting in _FIELDS.items():
        default = setting.default
        shown = "" if default in (None, ()) else f" (default: {_shown(default)})"
        # No default and no type here: a flag that was not given must not hide the file or the environment.
        parser.add_argument(_flag(name), dest=name, default=None, metavar="X", help=setting.metadata["help"] + shown)


def from_arguments(namespace: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Raises ConfigError."""
    settings: dict[str, Any] = {}
    if namespace.config is not None:
        settings |= _from_file(namespace.config)
    for name in _FIELDS:
        if (value := environ.get(PREFIX + name.upper())) is not None:
            settings[name] = _split(name, value)
        if (value := getattr(namespace, name)) is not None:
            settings[name] = _split(name, value)
    try:
        # Not strict: what comes from the environment or a flag is text.
        return msgspec.convert(settings, Config, strict=False, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None


def _path(kind: type, value: object) -> Path:
    """The one type of a setting that msgspec does not know."""
    if kind is not Path:
        raise NotImplementedError(f"no setting is a {kind}")
    if not isinstance(value, str):
        raise ValueError(f"expected a path, got {value!r}")  # msgspec adds which setting it was
    return Path(value)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if unknown := sorted(settings.keys() - _FIELDS.keys()):
        raise ConfigError(f"{path}: unknown settings: {', '.join(unknown)}")
    return {name: _split(name, value) for name, value in settings.items()}


def _split(name: str, value: Any) -> Any:
    """One text, or one number of a file, where several are expected."""
    if name in _BY_MODEL and isinstance(value, bool | int):
        value = str(value).lower()
    if isinstance(value, str) and isinstance(_FIELDS[name].default, tuple):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _per_model(name: str, rules: Sequence[str], value: Callable[[str], T], default: T) -> PerModel[T]:
    try:
        return PerModel.parse(rules, value, default)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _shown(default: object) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
