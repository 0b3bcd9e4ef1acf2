"""Settings: file < environment < flags; each has a flag and a help text; each error says where the value was set."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from rafaga.bundle import EngineName, Precision
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.config.per_model import PerModel
from rafaga.server.config.settings import (
    GROUPS,
    Config,
    ConfigError,
    LogFormat,
    ModelControl,
)
from rafaga.server.config.sources import SETTINGS, add_arguments, flag, from_arguments, service_links

HASH = "a" * 64
CUDA_0, CUDA_1 = (Device(DeviceKind.CUDA, index) for index in range(2))


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
    assert config().network.loopback, "nothing outside this machine can call unless configured"


def test_names_are_unique_over_all_groups() -> None:
    assert len(SETTINGS) == sum(map(len, GROUPS.values()))


def test_help_lists_each_setting_in_its_group() -> None:
    by_title = {group.title: group._group_actions for group in parser()._action_groups}
    for title, settings in GROUPS.items():
        found = {action.dest: action for action in by_title[title]}
        assert found.keys() == settings.keys()
        assert all((action.help or "").startswith(settings[name].help) for name, action in found.items())
    assert "gRPC port; 0 picks a free one (default: 50051)" in " ".join(parser().format_help().split())


# A value other than the default for each setting whose value is not a number.
OTHER = {
    "repository": "/models",
    "host": "0.0.0.0",
    "model_versions": "all",
    "model_control": "poll",
    "precision": "int8",
    "engine": "openvino",
    "device": "cuda:1,cuda:2",
    "device_fallback": "cpu",
    "batch_buckets": "1,8,32",
    "tensorrt_cache": "/cache",
    "bearer_token_sha256": f"{HASH}, {'b' * 64}",
    "tls_key": "key.pem",
    "tls_certificate": "cert.pem",
    "tls_client_ca": "ca.pem",
    "tracing_endpoint": "localhost:4317",
    "tracing_sample_ratio": "0.5",
    "spinning": "true",
    "triton_metrics": "true",
    "page": "false",
    "load_models": "a,b",
    "log_format": "text",
    "log_level": "debug",
    "max_bytes_in_flight": "33554432",
}
TOGETHER = {
    "host": {"bearer_token_sha256": "none"},
    "tls_key": {"tls_certificate": "cert.pem"},
    "tls_certificate": {"tls_key": "key.pem"},
    "tls_client_ca": {"tls_key": "key.pem", "tls_certificate": "cert.pem"},
    "load_models": {"model_control": "explicit", "admin_port": "0"},
    "admin_port": {"model_control": "explicit"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_set_in_each_way(name: str) -> None:
    settings = {name: OTHER.get(name, "7"), **TOGETHER.get(name, {})}
    by_flag = config(*(part for name, text in settings.items() for part in (flag(name), text)))
    assert by_flag == config(**{"RAFAGA_" + name.upper(): text for name, text in settings.items()})
    assert by_flag == Config.of(**settings)
    assert value(by_flag, name) != value(Config(), name)


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = "grpc_port = 1\nhttp_port = 1\nmax_batch_size = 1\n"
    got = of_file(tmp_path, file, "--grpc-port", "3", RAFAGA_GRPC_PORT="2", RAFAGA_HTTP_PORT="2", RAFAGA_OTHER="x")
    assert (got.network.grpc_port, got.network.http_port, got.batching.max_batch_size) == (3, 2, 1)


def test_types_of_a_file(tmp_path: Path) -> None:
    got = of_file(
        tmp_path,
        f"""
        repository = "/models"
        precision = "fp16"
        model_control = "explicit"
        model_versions = "all"
        admin_port = 0
        load_models = ["one", "two"]
        threads = 2
        spinning = true
        instances = ["1", "a=2"]
        gpu_model_memory_mib = 64
        batch_buckets = [1, 8]
        bearer_token_sha256 = ["{HASH}"]
        drain_delay_s = 1.5
        drain_timeout_s = 2
        log_format = "text"
        triton_metrics = true
        """,
    )
    assert (got.models.repository, got.models.precision) == (Path("/models"), PerModel(Precision.FP16))
    assert (got.models.model_control, got.models.admin_port) == (ModelControl.EXPLICIT, 0)
    assert (got.models.load_models, got.models.model_versions.default.newest) == (("one", "two"), None)
    assert (got.engines.threads, got.engines.spinning) == (PerModel(2), PerModel(True))
    assert got.engines.instances == PerModel(1, {"a": 2})
    assert (got.engines.gpu_model_memory_mib, got.engines.batch_buckets) == (PerModel(64), (1, 8))
    assert got.security.bearer_token_sha256 == (HASH,)
    assert (got.network.drain_delay_s, got.network.drain_timeout_s) == (1.5, 2.0)
    assert (got.observability.log_format, got.observability.triton_metrics) == (LogFormat.TEXT, True)


@pytest.mark.parametrize("text", ['"cuda:0, cuda:1"', '["cuda:0", "cuda:1"]'])
def test_a_list_in_a_file_may_be_text(tmp_path: Path, text: str) -> None:
    assert of_file(tmp_path, f"device = {text}").engines.device == (CUDA_0, CUDA_1)


def test_settings_of_single_models() -> None:
    flags = ("--threads", "2,lenet5=1", "--precision", "auto,vgg16=bf16", "--engine", "openvino,lstm=onnxruntime")
    whole = config(*flags, RAFAGA_INSTANCES="lenet5=3", RAFAGA_SPINNING="true,big=off")
    assert whole.models.precision == PerModel(None, {"vgg16": Precision.BF16})
    assert whole.named_models == {"lenet5", "big", "vgg16", "lstm"}
    got = whole.engines
    assert got.engine == PerModel(EngineName.OPENVINO, {"lstm": EngineName.ONNXRUNTIME})
    assert (got.threads, got.instances) == (PerModel(2, {"lenet5": 1}), PerModel(1, {"lenet5": 3}))
    assert got.spinning == PerModel(True, {"big": False})
    assert config("--instances", "1,vgg16=auto").engines.instances == PerModel(1, {"vgg16": None})
    got = config("--gpu-model-memory-mib", "4096,vgg16=2048").engines
    assert got.gpu_model_memory_mib == PerModel(4096, {"vgg16": 2048})
    assert config().engines.gpu_model_memory_mib == PerModel(None)


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
        ("device", "gpu", "'gpu': expected auto, cpu, cuda[:N] or tensorrt[:N]"),
        ("device", "", "expected auto, cpu, cuda[:N] or tensorrt[:N], got nothing"),
        (
            "bearer_token_sha256",
            hashlib.sha256(b"").hexdigest(),
            "this is the sha256 of an empty token: check how the hash was made",
        ),
        ("bearer_token_sha256", "", "expected hashes, or none"),
        ("bearer_token_sha256", " , ", "expected hashes, or none"),
        ("bearer_token_sha256", f"none,{HASH}", "expected 64 lower-case hex digits (the sha256 of a token) each"),
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


def test_an_error_does_not_repeat_a_token() -> None:
    with pytest.raises(ConfigError) as error:
        config("--bearer-token-sha256", "my-secret-token")
    assert "my-secret-token" not in str(error.value)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::1]", True),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Config.of(host=host, bearer_token_sha256="none").network.loopback is loopback


@pytest.mark.parametrize(
    "settings",
    [
        {"bearer_token_sha256": "none"},
        {"bearer_token_sha256": HASH},
        TOGETHER["tls_client_ca"] | {"tls_client_ca": "ca.pem"},
    ],
)
def test_beyond_loopback_callers_are_checked_or_none_is_said_out_loud(settings: dict[str, str]) -> None:
    assert not Config.of(host="::", **settings).network.loopback


def test_an_open_server_is_refused_with_the_three_ways_out() -> None:
    with pytest.raises(ConfigError, match=r"^host ::: .* bearer_token_sha256 .* tls_client_ca .* to none"):
        Config.of(host="::", tls_key="key.pem", tls_certificate="cert.pem")


def test_an_empty_list_of_tokens_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.toml: bearer_token_sha256: expected hashes, or none"):
        of_file(tmp_path, "bearer_token_sha256 = []")


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
