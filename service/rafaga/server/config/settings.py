"""Every setting of the server, in groups: its default, how it is read and checked, and its help text.

Names are flat wherever users write them: `max_queue_wait_ms` is the flag `--max-queue-wait-ms`, the environment
variable `RAFAGA_MAX_QUEUE_WAIT_MS` and the key `max_queue_wait_ms` of the TOML file. `sources` reads these three.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rafaga.bundle import EngineName, Precision
from rafaga.server.config import device as devices
from rafaga.server.config.device import Device, DeviceFallback
from rafaga.server.config.model_versions import Versions, parse_versions
from rafaga.server.config.per_model import PerModel
from rafaga.server.config.readers import (
    boolean,
    choice,
    each,
    host,
    integer,
    not_negative,
    or_auto,
    path,
    per_model,
    positive,
    ratio,
    text,
    token_hashes,
    words,
)

_MIB = 2**20


class ConfigError(Exception):
    """A setting that cannot be used. The message says where it was set, what came, and what was expected."""


@dataclass(frozen=True)
class Setting:
    """read: raises ValueError. default: as users would write it; None: the help text explains it."""

    default: object
    read: Callable[[object], object]
    metavar: str
    help: str


def _setting(default: object, read: Callable[[object], object], metavar: str, help_text: str) -> Any:
    value = None if default is None else read(default)
    return field(default=value, metadata={"setting": Setting(default, read, metavar, help_text)})


class ModelControl(StrEnum):
    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class NetworkSettings:
    host: str = _setting(
        "127.0.0.1", host, "HOST", "address to listen on, for gRPC and HTTP; :: for all addresses, IPv4 and IPv6"
    )
    grpc_port: int = _setting(50051, integer(0, 65535), "PORT", "gRPC port; 0 picks a free one")
    grpc_socket: Path | None = _setting(
        None, path, "FILE", "Unix socket for gRPC instead of the port, for sidecars; clients connect to unix:FILE"
    )
    http_port: int = _setting(
        8080, integer(0, 65535), "PORT", "HTTP port of REST, /metrics, /healthz and /readyz; 0 picks a free one"
    )
    page: bool = _setting(
        "on", boolean, "on|off", "serve a web page at / of the HTTP port: models, trials, live figures"
    )
    drain_delay_s: float = _setting(
        0.0, not_negative, "SECONDS", "after SIGTERM, keep serving this long as NOT_SERVING, so that balancers notice"
    )
    drain_timeout_s: float = _setting(
        30.0, not_negative, "SECONDS", "after that delay, how long accepted requests may take to finish"
    )
    max_connection_age_s: float | None = _setting(
        None,
        positive,
        "SECONDS",
        "close each connection after this time, varied by a tenth, so that clients spread over new replicas; calls on "
        "it may finish for drain_timeout_s (default: never)",
    )
    max_connection_idle_s: float | None = _setting(
        None, positive, "SECONDS", "close connections without a call after this time (default: never)"
    )

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class ModelSettings:
    repository: Path = _setting(
        "repository", path, "PATH", "model repository, the folder of one model or of one version, or an ONNX file"
    )
    precision: PerModel[Precision | None] = _setting(
        "auto",
        per_model(or_auto(choice(Precision)), None),
        "auto|fp32|bf16|fp16|int8|NAME=fp32[,...]",
        "of each model; auto: the fastest that kept its accuracy; bf16 needs OpenVINO; per model: auto,NAME=int8",
    )
    model_versions: Versions = _setting(
        "latest",
        lambda value: parse_versions(words(value)),
        "RULE[,...]",
        "versions to serve: latest, latest:N or all; for one model NAME=latest:N, NAME=all or NAME=1,3",
    )
    model_control: ModelControl = _setting(
        "none",
        choice(ModelControl),
        "none|poll|explicit",
        "how models change after the start: not at all, by polling the repository, or by requests to the admin port",
    )
    poll_interval_s: float = _setting(
        5.0, positive, "SECONDS", "with model control poll, time between two scans of the repository"
    )
    load_models: tuple[str, ...] = _setting(
        "", each(text), "NAME[,...]", "with model control explicit, models to load at start; * for all"
    )
    admin_port: int | None = _setting(
        None,
        integer(0, 65535),
        "PORT",
        "with model control explicit, gRPC port for RepositoryModelLoad and RepositoryModelUnload; it listens on "
        "loopback only, unless bearer tokens are set",
    )

    def __post_init__(self) -> None:
        explicit = self.model_control is ModelControl.EXPLICIT
        if explicit != (self.admin_port is not None):
            raise ConfigError("admin_port and model_control explicit go together: set both or neither")
        if self.load_models and not explicit:
            raise ConfigError("load_models needs model_control explicit; otherwise every model is loaded")


@dataclass(frozen=True)
class EngineSettings:
    device: tuple[Device, ...] | None = _setting(
        devices.AUTO,
        lambda value: devices.parse(words(value)),
        "DEVICE[,...]",
        "auto, cpu, cuda[:N] or tensorrt[:N]; with several GPUs each model gets an engine on each",
    )
    device_fallback: DeviceFallback = _setting(
        "fail",
        choice(DeviceFallback),
        "fail|cpu",
        "what to do when the device, or a model on it, cannot be loaded: fail, or use the CPU",
    )
    engine: PerModel[EngineName | None] = _setting(
        "auto",
        per_model(or_auto(choice(EngineName)), None),
        "auto|onnxruntime|openvino|NAME=openvino[,...]",
        "what runs models on the CPU; auto: measured at load, if OpenVINO is installed; per model: auto,NAME=openvino",
    )
    instances: PerModel[int | None] = _setting(
        "1",
        per_model(or_auto(integer(1, 1024)), 1),
        "N|auto|NAME=N[,...]",
        "engines of each model on each device; on the CPU they share the cores; auto: as many as give the most rows/s, "
        "measured at load, although lone requests take longer; per model: 1,NAME=2",
    )
    threads: PerModel[int | None] = _setting(
        "auto",
        per_model(or_auto(integer(1, 1024)), None),
        "N|NAME=N[,...]",
        "threads of each engine on the CPU; auto: measured at load; per model: 2,NAME=1",
    )
    spinning: PerModel[bool | None] = _setting(
        "auto",
        per_model(or_auto(boolean), None),
        "on|off|NAME=on[,...]",
        "whether ONNX Runtime's threads spin while they wait; auto: measured if cores are left; per model: off,NAME=on",
    )
    engine_timeout_s: float = _setting(
        10.0,
        positive,
        "SECONDS",
        "a run counts as hung after this time, or after 20 times its predicted time if that is longer",
    )
    batch_buckets: tuple[int, ...] = _setting(
        "",
        each(integer(1)),
        "N[,...]",
        "batch sizes to run on a GPU; other batches are padded to the next one (default: powers of two)",
    )
    gpu_model_memory_mib: PerModel[int | None] = _setting(
        "",
        per_model(integer(1), None),
        "MIB|NAME=MIB[,...]",
        "memory of each GPU that one model may use; per model: 4096,NAME=2048 (default: no limit)",
    )
    tensorrt_cache: Path = _setting(
        "~/.cache/rafaga/tensorrt",
        path,
        "DIR",
        "cache of engines that TensorRT built; only the server's user may have write access",
    )


@dataclass(frozen=True)
class BatchingSettings:
    max_batch_size: int = _setting(32, integer(1), "ROWS", "largest batch; a model's own limit may be lower")
    max_queue_delay_us: int = _setting(
        0, integer(0), "MICROSECONDS", "how long to wait for more requests before running a batch"
    )
    max_queue_wait_ms: int = _setting(
        1000, integer(0), "MILLISECONDS", "requests without a deadline that are predicted to wait longer are refused"
    )
    max_queue_requests: int = _setting(
        4096, integer(1), "N", "queued requests per model; counts those of the same priority and above"
    )


@dataclass(frozen=True)
class LimitSettings:
    max_concurrent_calls: int = _setting(
        4096, integer(1), "N", "calls in flight; more are refused; a quarter of it is reserved for each priority"
    )
    max_bytes_in_flight: int = _setting(
        512 * _MIB,
        integer(1),
        "BYTES",
        "total size of the requests in flight; more are refused; a quarter of it is reserved for each priority",
    )
    # gRPC takes a limit of 31 bits.
    max_request_bytes: int = _setting(16 * _MIB, integer(1, 2**31 - 1), "BYTES", "size of one request")
    max_connections: int = _setting(4096, integer(1), "N", "open gRPC connections; more are closed at once")
    max_request_rows: int = _setting(1024, integer(1), "ROWS", "images, or rows of tensors, in one request")
    max_image_pixels: int = _setting(50_000_000, integer(1), "PIXELS", "size of an encoded image")
    max_free_pixels: int = _setting(
        2048 * 2048, integer(1), "PIXELS", "size of an image for models that take images of any size"
    )
    decode_threads: int | None = _setting(None, integer(1), "N", "threads that decode images (default: one per core)")

    def __post_init__(self) -> None:
        if self.max_bytes_in_flight < self.max_request_bytes:
            raise ConfigError(
                f"max_bytes_in_flight: {self.max_bytes_in_flight}: expected at least max_request_bytes, "
                f"which is {self.max_request_bytes}"
            )


@dataclass(frozen=True)
class SecuritySettings:
    bearer_token_sha256: tuple[str, ...] | None = _setting(
        None,
        token_hashes,
        "SHA256[,...]|none",
        "callers must send a bearer token with one of these sha256 hashes (hex); none: every caller is accepted, as "
        "without this setting, and also beyond loopback",
    )
    tls_key: Path | None = _setting(None, path, "FILE", "private key of the server (PEM); turns TLS on")
    tls_certificate: Path | None = _setting(None, path, "FILE", "certificate chain of the server (PEM)")
    tls_client_ca: Path | None = _setting(
        None, path, "FILE", "callers must present a certificate signed by this CA (PEM)"
    )

    def __post_init__(self) -> None:
        if (self.tls_key is None) != (self.tls_certificate is None):
            raise ConfigError("tls_key and tls_certificate go together: set both or neither")
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ConfigError("tls_client_ca needs tls_key and tls_certificate")


@dataclass(frozen=True)
class ObservabilitySettings:
    log_format: LogFormat | None = _setting(
        None,
        choice(LogFormat),
        "json|text",
        "json for log collectors, text for people (default: text on a terminal, else json)",
    )
    log_level: LogLevel = _setting("info", choice(LogLevel), "debug|info|warning|error", "lowest level to log")
    tracing_endpoint: str = _setting(
        "", text, "HOST:PORT", "OpenTelemetry collector that receives traces over OTLP/gRPC (default: no tracing)"
    )
    tracing_sample_ratio: float = _setting(
        0.01, ratio, "RATIO", "share of calls to trace; if the caller already decided, that decision is followed"
    )
    triton_metrics: bool = _setting(
        "off", boolean, "on|off", "export the counters under Triton's names as well: nv_inference_*"
    )


@dataclass(frozen=True)
class Config:
    network: NetworkSettings = NetworkSettings()
    models: ModelSettings = ModelSettings()
    engines: EngineSettings = EngineSettings()
    batching: BatchingSettings = BatchingSettings()
    limits: LimitSettings = LimitSettings()
    security: SecuritySettings = SecuritySettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    def __post_init__(self) -> None:
        unset = self.security.bearer_token_sha256 is None and self.security.tls_client_ca is None
        if unset and not self.network.loopback:
            raise ConfigError(
                f"host {self.network.host}: anyone who can reach the server could call it. Set bearer_token_sha256 to "
                "the hashes of tokens, or tls_client_ca for client certificates, or bearer_token_sha256 to none if "
                "every caller may call"
            )

    @property
    def named_models(self) -> set[str]:
        """Models with settings of their own."""
        settings = (*vars(self.models).values(), *vars(self.engines).values())
        return {name for setting in settings if isinstance(setting, PerModel) for name in setting.by_model}

    @classmethod
    def of(cls, **settings: object) -> Config:
        """By flat names, with values as a flag or a TOML file would have them. Raises ConfigError."""
        return cls.read({name: (name, value) for name, value in settings.items()})

    @classmethod
    def read(cls, given: Mapping[str, tuple[str, object]]) -> Config:
        """`given`: for each flat name where its value was set, for errors, and the value. Raises ConfigError."""
        values: dict[str, dict[str, object]] = {}
        for name, (source, value) in given.items():
            group = _GROUP_OF[name]
            try:
                values.setdefault(group, {})[name] = GROUPS[group][name].read(value)
            except ValueError as error:
                raise ConfigError(f"{source}: {error}") from None
        return cls(**{name: type(group)(**values.get(name, {})) for name, group in vars(cls()).items()})


GROUPS: Mapping[str, Mapping[str, Setting]] = {
    name: {f.name: f.metadata["setting"] for f in dataclasses.fields(group)} for name, group in vars(Config()).items()
}
_GROUP_OF = {name: group for group, settings in GROUPS.items() for name in settings}
