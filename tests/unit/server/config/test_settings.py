"""Settings: file < environment < flags; each has a flag and a help text; each error says where the value was set."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rafaga.bundle import EngineName, Precision
from rafaga.server.config.device import Device, DeviceFallback, DeviceKind
from rafaga.server.config.model_versions import VersionPolicy, Versions
from rafaga.server.config.per_model import PerModel
from rafaga.server.config.settings import GROUPS, Config, ConfigError, LogFormat, LogLevel, ModelControl
from rafaga.server.config.sources import SETTINGS, add_arguments, flag, from_arguments, service_links

HASH = "a" * 64


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def config(*flags: str, **environ: str) -> Config:
    return from_arguments(parser().parse_args(flags), environ)


def of_file(folder: Path, text: str, *flags: str, **environ: str) -> Config:
    path = folder / "server.toml"
    path.write_text(text)
    return config("--config", str(path), *flags, **environ)


def value(config: Config, name: str) -> object:
    (group,) = (group for group, settings in GROUPS.items() if name in settings)
    return getattr(getattr(config, group), name)


def test_defaults() -> None:
    assert config() == Config() == Config.of()
    assert len(SETTINGS) == sum(map(len, GROUPS.values())), "names are unique over all groups"
    assert config().network.loopback, "nothing outside this machine can call unless configured"


def test_help_lists_each_setting_in_its_group() -> None:
    by_title = {group.title: group._group_actions for group in parser()._action_groups}
    for title, settings in GROUPS.items():
        found = {action.dest: action for action in by_title[title]}
        assert found.keys() == settings.keys()
        assert all((action.help or "").startswith(settings[name].help) for name, action in found.items())
    assert "gRPC port; 0 picks a free one (default: 50051)" in " ".join(parser().format_help().split())


# For each setting whose value is not a plain number: a text, and the value that it gives, other than the default.
OTHER: dict[str, tuple[str, object]] = {
    "repository": ("/models", Path("/models")),
    "host": ("0.0.0.0", "0.0.0.0"),
    "grpc_socket": ("rafaga.sock", Path("rafaga.sock")),
    "model_versions": ("all", Versions(VersionPolicy(newest=None))),
    "model_control": ("poll", ModelControl.POLL),
    "load_models": ("a,b", ("a", "b")),
    "precision": ("int8,a=bf16", PerModel(Precision.INT8, {"a": Precision.BF16})),
    "engine": ("openvino,a=onnxruntime", PerModel(EngineName.OPENVINO, {"a": EngineName.ONNXRUNTIME})),
    "instances": ("2,a=auto", PerModel(2, {"a": None})),
    "threads": ("2", PerModel(2)),
    "spinning": ("true", PerModel(True)),
    "gpu_model_memory_mib": ("a=2048", PerModel(None, {"a": 2048})),
    "device": ("cuda:1,cuda:2", (Device(DeviceKind.CUDA, 1), Device(DeviceKind.CUDA, 2))),
    "device_fallback": ("cpu", DeviceFallback.CPU),
    "batch_buckets": ("1,8,32", (1, 8, 32)),
    "tensorrt_cache": ("/cache", Path("/cache")),
    "max_bytes_in_flight": ("33554432", 2**25),
    "bearer_token_sha256": (f"{HASH},{'b' * 64}", (HASH, "b" * 64)),
    "tls_key": ("key.pem", Path("key.pem")),
    "tls_certificate": ("cert.pem", Path("cert.pem")),
    "tls_client_ca": ("ca.pem", Path("ca.pem")),
    "tracing_endpoint": ("localhost:4317", "localhost:4317"),
    "tracing_sample_ratio": ("0.5", 0.5),
    "triton_metrics": ("true", True),
    "page": ("false", False),
    "log_format": ("text", LogFormat.TEXT),
    "log_level": ("debug", LogLevel.DEBUG),
    "transport": ("old", "old"),
}
TOGETHER = {
    "host": {"bearer_token_sha256": "none"},
    "tls_key": {"tls_certificate": "cert.pem"},
    "tls_certificate": {"tls_key": "key.pem"},
    "tls_client_ca": {"tls_key": "key.pem", "tls_certificate": "cert.pem"},
    "load_models": {"model_control": "explicit", "admin_port": "0"},
    "admin_port": {"model_control": "explicit"},
}


def toml(text: str) -> str:
    """With TOML's own numbers, booleans and lists."""
    if re.fullmatch(r"[\d.]+|true|false", text) and text != "0.0.0.0":
        return text
    return json.dumps(text.split(",") if "," in text else text)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_set_in_each_way(tmp_path: Path, name: str) -> None:
    text, expected = OTHER.get(name, ("7", 7))
    settings = {name: text, **TOGETHER.get(name, {})}
    by_flag = config(*(part for name, text in settings.items() for part in (flag(name), text)))
    assert by_flag == config(**{"RAFAGA_" + name.upper(): text for name, text in settings.items()})
    assert by_flag == of_file(tmp_path, "\n".join(f"{name} = {toml(text)}" for name, text in settings.items()))
    assert by_flag == Config.of(**settings)
    assert value(by_flag, name) == expected != value(Config(), name)


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = 'grpc_port = 1\nhttp_port = 1\nmax_batch_size = 1\nbatch_buckets = "1, 8"\n'
    got = of_file(tmp_path, file, "--grpc-port", "3", RAFAGA_GRPC_PORT="2", RAFAGA_HTTP_PORT="2", RAFAGA_OTHER="x")
    assert (got.network.grpc_port, got.network.http_port, got.batching.max_batch_size) == (3, 2, 1)
    assert got.engines.batch_buckets == (1, 8), "a list may be written as text"


def test_models_with_settings_of_their_own() -> None:
    whole = config("--threads", "2,lenet5=1", "--precision", "auto,vgg16=bf16", RAFAGA_SPINNING="true,big=off")
    assert whole.named_models == {"lenet5", "big", "vgg16"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("grpc_port", "70000", "70000: expected 0 to 65535"),
        ("grpc_port", "banana", "'banana' is not an integer"),
        ("grpc_port", "9" * 5000, f"'{'9' * 56}… is not an integer"),
        ("grpc_port", "1.5", "'1.5' is not an integer"),
        ("max_batch_size", "0", "0: expected at least 1"),
        ("max_request_bytes", "2147483648", "2147483648: expected 1 to 2147483647"),
        ("threads", "0", "0: expected 1 to 1024 (or auto)"),
        ("threads", "2,a=b", "'b' is not an integer (or auto)"),
        ("instances", "1,2", "'2': expected only one value for all models"),
        ("instances", "many", "'many' is not an integer (or auto)"),
        ("spinning", "a=often", "'often': expected on or off (or auto)"),
        ("batch_buckets", "4,0", "0: expected at least 1"),
        ("max_queue_wait_ms", "-1", "-1: expected at least 0"),
        ("drain_timeout_s", "nan", "nan: expected zero or more"),
        ("drain_delay_s", "inf", "inf: expected zero or more"),
        ("drain_delay_s", "long", "'long' is not a number"),
        ("poll_interval_s", "0", "0: expected more than zero"),
        ("tracing_sample_ratio", "2", "2: expected 0 to 1"),
        ("triton_metrics", "maybe", "'maybe': expected on or off"),
        ("precision", "fp8", "'fp8': expected one of fp32, bf16, fp16, int8 (or auto)"),
        ("model_versions", "newest", "'newest': expected latest, latest:N, all, or NAME= before version numbers"),
        ("device", "", "expected auto, cpu, cuda[:N] or tensorrt[:N], got nothing"),
        (
            "bearer_token_sha256",
            hashlib.sha256(b"").hexdigest(),
            "this is the sha256 of an empty token: check how the hash was made",
        ),
        ("bearer_token_sha256", "", "expected hashes, or none"),
        ("bearer_token_sha256", " , ", "expected hashes, or none"),
        ("bearer_token_sha256", f"none,{HASH}", "expected 64 lower-case hex digits (the sha256 of a token) each"),
        # The value is not repeated: it may be the token itself.
        ("bearer_token_sha256", HASH.upper(), "expected 64 lower-case hex digits (the sha256 of a token) each"),
    ],
)
def test_an_invalid_value_and_where_it_was_set(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as by_flag:
        config(flag(name), text)
    assert str(by_flag.value) == f"{flag(name)}: {message}"
    variable = "RAFAGA_" + name.upper()
    with pytest.raises(ConfigError) as by_environment:
        config(**{variable: text})
    assert str(by_environment.value) == f"{variable}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batchsize = 3\ngrpcport = 1", "server.toml: unknown settings: grpcport, max_batchsize"),
        ("grpc_port = ", "server.toml: Invalid value"),
        ('grpc_port = "many"', "server.toml: grpc_port: 'many' is not an integer"),
        ("grpc_port = true", "server.toml: grpc_port: True is not an integer"),
        ("max_batch_size = [1]", r"server.toml: max_batch_size: \[1\] is not an integer"),
        ("drain_delay_s = true", "server.toml: drain_delay_s: True is not a number"),
        ("repository = 3", "server.toml: repository: 3: expected a path"),
        ("host = 3", "server.toml: host: 3: expected text"),
        ("log_format = 3", "server.toml: log_format: 3: expected one of json, text"),
        ("bearer_token_sha256 = []", "server.toml: bearer_token_sha256: expected hashes, or none"),
    ],
)
def test_errors_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_file(tmp_path, text)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: .*No such file"):
        config("--config", "nowhere.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_control": "explicit"}, "admin_port and model_control explicit go together"),
        ({"admin_port": 1}, "admin_port and model_control explicit go together"),
        ({"load_models": ("a",)}, "load_models needs model_control explicit"),
        ({"tls_key": "key.pem"}, "tls_key and tls_certificate go together"),
        ({"tls_client_ca": "ca.pem"}, "tls_client_ca needs tls_key and tls_certificate"),
        ({"max_bytes_in_flight": 1}, "max_bytes_in_flight: 1: expected at least max_request_bytes"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.of(**settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert config("--host", host).network.loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_beyond_loopback_callers_are_checked_or_none_is_said_out_loud(host: str) -> None:
    by_certificate = {"tls_client_ca": "ca.pem", **TOGETHER["tls_client_ca"]}
    for settings in ({"bearer_token_sha256": "none"}, {"bearer_token_sha256": HASH}, by_certificate):
        assert not Config.of(host=host, **settings).network.loopback
    with pytest.raises(ConfigError, match=rf"^host {host}: .* bearer_token_sha256 .* tls_client_ca .* to none"):
        Config.of(host=host, tls_key="key.pem", tls_certificate="cert.pem")


@pytest.mark.parametrize("host", ["", "10.0.0.1/8", "a,b", "unix:/run/rafaga.sock", "http://localhost"])
def test_invalid_hosts(host: str) -> None:
    with pytest.raises(ConfigError, match="expected a host name or an IP address, without a port"):
        config("--host", host)


def test_ports_that_kubernetes_sets_for_services_are_ignored() -> None:
    """RAFAGA_GRPC_PORT=tcp://… comes from a Service named rafaga-grpc; its other variables are not settings."""
    link = "tcp://10.0.0.1:50051"
    links = {"RAFAGA_GRPC_PORT": link, "RAFAGA_HTTP_PORT": "udp://10.0.0.1:80"}
    assert config(**links, RAFAGA_GRPC_PORT_50051_TCP=link, RAFAGA_GRPC_SERVICE_HOST="10.0.0.1") == Config()
    assert config("--grpc-port", "7", **links).network.grpc_port == 7
    assert service_links({**links, "RAFAGA_ADMIN_PORT": "1", "RAFAGA_HOST": "tcp://a"}) == links


def test_settings_are_read_without_onnxruntime() -> None:
    code = "import sys, rafaga.server.config.sources; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
