"""Settings: file < environment < flags, every one with a flag and a word of help, every mistake named."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from rafaga.server.config.per_model import EngineSettings, PerModel
from rafaga.server.config.settings import (
    Config,
    ConfigError,
    LogFormat,
    ModelControl,
    add_arguments,
    from_arguments,
)

FIELDS = dataclasses.fields(Config)
HASH = "a" * 64


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def config(
    *flags: str, env: dict[str, str] | None = None, file: str | None = None, folder: Path | None = None
) -> Config:
    if file is not None:
        assert folder is not None
        path = folder / "rafaga.toml"
        path.write_text(file)
        flags = ("--config", str(path), *flags)
    return from_arguments(parser().parse_args(flags), env or {})


def test_defaults() -> None:
    assert config() == Config()
    assert config().loopback, "nobody else is let in unless told"


@pytest.mark.parametrize("setting", FIELDS, ids=lambda f: f.name)
def test_every_setting_has_a_flag_and_a_word_of_help(setting: dataclasses.Field[object]) -> None:
    flag = "--" + setting.name.replace("_", "-")
    action = next(a for a in parser()._actions if flag in a.option_strings)
    assert action.help
    assert setting.metadata["help"] in action.help


def test_help_can_be_printed() -> None:
    assert "--max-queue-wait-ms" in parser().format_help()


# One value that differs from the default for each setting, as text.
OTHER = {
    "repository": "/models",
    "host": "0.0.0.0",
    "transport": "any",
    "model_versions": "all",
    "model_control": "poll",
    "precision": "int8",
    "device": "cuda:1,cuda:2",
    "device_fallback": "cpu",
    "batch_buckets": "1,8,32",
    "gpu_nhwc": "on",
    "gpu_graphs": "off",
    "tensorrt_cache": "/cache",
    "bearer_token_sha256": f"{HASH}, {'b' * 64}",
    "tls_key": "key.pem",
    "tls_certificate": "cert.pem",
    "tls_client_ca": "ca.pem",
    "tracing_endpoint": "localhost:4317",
    "tracing_sample_ratio": "0.5",
    "spinning": "true",
    "triton_metrics": "true",
    "load_models": "a,b",
    "log_format": "text",
    "log_level": "debug",
    "max_bytes_in_flight": "33554432",
}
TOGETHER = {
    "tls_key": {"tls_certificate": "cert.pem"},
    "tls_certificate": {"tls_key": "key.pem"},
    "tls_client_ca": {"tls_key": "key.pem", "tls_certificate": "cert.pem"},
    "load_models": {"model_control": "explicit", "admin_port": "0"},
    "admin_port": {"model_control": "explicit"},
}


@pytest.mark.parametrize("setting", FIELDS, ids=lambda f: f.name)
def test_every_setting_can_be_set_by_flag_and_environment(setting: dataclasses.Field[object]) -> None:
    text = OTHER.get(setting.name, "7")
    others = TOGETHER.get(setting.name, {})
    settings = {setting.name: text, **others}
    by_flag = config(*(part for name, v in settings.items() for part in ("--" + name.replace("_", "-"), v)))
    by_environment = config(env={"RAFAGA_" + name.upper(): v for name, v in settings.items()})
    assert by_flag == by_environment
    value = getattr(by_flag, setting.name)
    assert value != setting.default
    assert type(value) is type(setting.default) or setting.default is None


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = "grpc_port = 1\nhttp_port = 1\nmax_batch_size = 1\n"
    got = config("--grpc-port", "3", env={"RAFAGA_GRPC_PORT": "2", "RAFAGA_HTTP_PORT": "2"}, file=file, folder=tmp_path)
    assert (got.grpc_port, got.http_port, got.max_batch_size) == (3, 2, 1)


def test_types_of_a_file(tmp_path: Path) -> None:
    file = f"""
        repository = "/models"
        precision = "fp16"
        model_control = "explicit"
        model_versions = "all"
        admin_port = 0
        load_models = ["one", "two"]
        threads = 2
        bearer_token_sha256 = ["{HASH}"]
        drain_delay_s = 1.5
        log_format = "text"
    """
    got = config(file=file, folder=tmp_path)
    assert got.repository == Path("/models")
    assert got.precision == "fp16"
    assert got.model_control is ModelControl.EXPLICIT
    assert (got.load_models, got.threads, got.drain_delay_s) == (("one", "two"), ("2",), 1.5)
    assert got.bearer_token_sha256 == (HASH,)
    assert got.log_format is LogFormat.TEXT
    assert got.model_versions == ("all",)  # a list of one needs no brackets


@pytest.mark.parametrize("text", ['"cuda:0, cuda:1"', '["cuda:0", "cuda:1"]'])
def test_a_list_in_a_file_may_be_text(tmp_path: Path, text: str) -> None:
    assert config(file=f"device = {text}", folder=tmp_path).device == ("cuda:0", "cuda:1")


def test_settings_of_single_models() -> None:
    got = config("--threads", "2,lenet5=1", env={"RAFAGA_INSTANCES": "lenet5=3", "RAFAGA_SPINNING": "true,big=off"})
    assert got.engines.default == EngineSettings(1, 2, True)
    assert got.engines.of("lenet5") == EngineSettings(3, 1, True)
    assert got.engines.of("big") == EngineSettings(1, 2, False)
    assert config().engines == PerModel(EngineSettings(1, None, None))
    memory = config("--gpu-model-memory-mib", "4096,vgg16=2048").gpu_model_memory
    assert (memory.of("vgg16"), memory.of("lenet5")) == (2048 * 2**20, 4096 * 2**20)
    assert config().gpu_model_memory == PerModel(None)


@pytest.mark.parametrize(("text", "value"), [("true", True), ('"auto"', None), ('"on"', True), ("false", False)])
def test_settings_of_all_models_in_a_file(tmp_path: Path, text: str, value: bool | None) -> None:
    got = config(
        file=f'spinning = {text}\nthreads = 2\ngpu_model_memory_mib = 64\ninstances = ["1", "a=2"]', folder=tmp_path
    )
    assert got.gpu_model_memory == PerModel(64 * 2**20)
    assert got.engines.default == EngineSettings(1, 2, value)
    assert got.engines.of("a") == EngineSettings(2, 2, value)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", r"device: expected auto, cpu, cuda\[:N\] or tensorrt\[:N\], got 'gpu'"),
        ("cuda:0,cpu", "device: expected devices of one kind"),
        ("", "device: .* got nothing"),
    ],
)
def test_devices_that_are_none(device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config("--device", device)


def test_lists_of_text_are_split_at_commas() -> None:
    got = config("--bearer-token-sha256", f" {HASH},{'b' * 64}, ")
    assert got.bearer_token_sha256 == (HASH, "b" * 64)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--grpc-port", "70000"], "grpc_port: expected 0 to 65535, got 70000"),
        (["--grpc-port", "many"], "grpc_port"),
        (["--max-batch-size", "0"], "max_batch_size: expected at least 1, got 0"),
        (["--threads", "0"], "threads: expected a whole number from 1 on, got '0'"),
        (["--threads", "2,a=b"], "threads: expected a whole number from 1 on, got 'b'"),
        (["--instances", "1,2"], "instances: expected one value for all models, got another: '2'"),
        (["--instances", "auto"], "instances: expected a whole number from 1 on, got 'auto'"),
        (["--spinning", "a=often"], "spinning: expected auto, on or off, got 'often'"),
        (["--batch-buckets", "4,0"], "batch_buckets: expected at least 1 each, got 0"),
        (["--gpu-model-memory-mib", "a=0"], "gpu_model_memory_mib: expected a whole number from 1 on, got '0'"),
        (["--gpu-memory-mib", "0"], "gpu_memory_mib: expected at least 1, got 0"),
        (["--max-queue-wait-ms", "-1"], "max_queue_wait_ms: expected zero or more"),
        (["--drain-timeout-s", "nan"], "drain_timeout_s"),
        (["--drain-delay-s", "inf"], "drain_delay_s"),
        (["--poll-interval-s", "0"], "poll_interval_s: expected more than zero"),
        (["--poll-interval-s", "nan"], "poll_interval_s"),
        (["--tracing-sample-ratio", "2"], "tracing_sample_ratio: expected 0 to 1"),
        (["--precision", "fp8"], "fp8"),
        (["--log-level", "loud"], "log_level: expected debug, info, warning or error, got 'loud'"),
        (["--bearer-token-sha256", "secret"], "64 lower-case hex digits"),
        (["--bearer-token-sha256", HASH.upper()], "64 lower-case hex digits"),
        (["--tls-key", "key.pem"], "tls_key and tls_certificate go together"),
        (["--tls-client-ca", "ca.pem"], "tls_client_ca needs"),
        (["--model-versions", "newest"], "expected latest, latest:N, all"),
        (["--model-control", "explicit"], "admin_port and model_control explicit go together"),
        (["--load-models", "a"], "load_models is for model_control explicit"),
    ],
)
def test_mistakes_are_named(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        config(*flags)


def test_a_token_is_not_repeated_to_whoever_reads_the_error() -> None:
    with pytest.raises(ConfigError) as error:
        config("--bearer-token-sha256", "my-secret-token")
    assert "my-secret-token" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("max_batchsize = 3\ngrpcport = 1", "unknown settings: grpcport, max_batchsize"),
        ("grpc_port = ", "rafaga.toml"),
        ('grpc_port = "many"', "grpc_port"),
        ("max_batch_size = [1]", "max_batch_size"),
        ("repository = 3", "repository"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, file: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(file=file, folder=tmp_path)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        config("--config", "nowhere.toml")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Config(host=host).loopback is loopback


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().host = "0.0.0.0"  # type: ignore[misc]
