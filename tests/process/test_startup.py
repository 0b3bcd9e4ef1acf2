"""The start of a server: it serves what is whole, says clearly what is not, and ends where it cannot serve at all."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from rafaga import Client
from rafaga.cli._main import main
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, eventually, get, refusal
from tests.process.running import Running, has_ipv6, process, running

IMAGE = messages.random_digits(0)


def health(served: Running, service: str) -> str:
    response = served.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_a_port_that_is_taken_is_named(repository: Path, taken_port: int, which: str) -> None:
    ports = {"grpc": "0", "http": "0"} | {which: str(taken_port)}
    settings = ("--grpc-port", ports["grpc"], "--http-port", ports["http"])
    with process("--repository", str(repository), *settings) as started:
        assert started.exit_code() != 0
        last = started.log[-1].text
    assert f"127.0.0.1:{taken_port}" in last
    assert "in use" in last
    assert not any("Traceback" in line.text for line in started.log)


def test_a_repository_that_is_missing_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with process("--repository", str(missing), "--grpc-port", "0", "--http-port", "0") as started:
        assert started.exit_code() != 0
        last = started.log[-1].text
    assert f"no model repository at {missing}" in last
    assert "python -m export" in last
    assert not any("Traceback" in line.text for line in started.log)


def test_an_invalid_setting_is_named() -> None:
    with process("--max-batch-size", "0") as started:
        assert started.exit_code() == 2
        assert started.log[-1].text == "rafaga: --max-batch-size: 0: expected at least 1"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_named(repository: Path) -> None:
    with process("--repository", str(repository), "--device", "tensorrt:0") as started:
        assert started.exit_code() == 2
        last = started.log[-1].text
    assert "device: " in last
    assert "libcuda.so.1" in last or "ExecutionProvider" in last
    assert "--device-fallback cpu" in last
    assert not any("Traceback" in line.text for line in started.log)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_falling_back_is_allowed_and_logged(repository: Path) -> None:
    with running(repository, "--device", "cuda", "--device-fallback", "cpu") as served:
        (told,) = (line for line in served.process.log if "fallen back to the CPU" in line.text)
        assert "WARNING" in told.text
        assert health(served, "") == "SERVING"


def test_every_line_of_the_log_is_json(repository: Path) -> None:
    with running(repository) as served:
        served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
        refusal(lambda: served.vision.Classify(messages.classify(IMAGE, "unknown"), timeout=PATIENCE_S))
        served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 0
        log = served.process.log
    assert all(line.fields.keys() >= {"time", "level", "logger", "message"} for line in log)
    ready = [line.fields for line in log if line.fields["message"] == "model ready"]
    assert [(line["model"], line["version"], line["precision"]) for line in ready] == [
        ("digits", 1, "fp32"),
        ("series", 1, "fp32"),
    ]
    serving = served.process.wait_for("serving")
    assert (serving["ready"], serving["host"]) == (True, "127.0.0.1")


def test_bad_calls_do_not_fill_the_log(tmp_path: Path) -> None:
    """ONNX Runtime prints an error for each run that fails. 1. 500 calls make it fail. 2. The log has a few lines, all
    JSON, and those that are repeated are summed up at the end."""
    bundles.publish_fragile(tmp_path)
    bad = np.full((1, 1, 1, 1), bundles.CLASSES, np.uint8)
    with running(tmp_path) as served:
        for _ in range(500):
            refusal(lambda: served.vision.Classify(messages.classify(bad, "fragile"), timeout=PATIENCE_S))
        served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 0
        log = served.process.log
    assert all(line.fields for line in log)
    native = [line.fields for line in log if line.fields["logger"] == "native"]
    assert "ExecuteKernel" in native[0]["message"]
    assert {line["level"] for line in native} == {"WARNING"}, "the caller is the cause"
    assert sum(line.get("repeated", 0) for line in native) > 400
    assert len(log) < 40
    assert sum(len(line.text) for line in log) < 40_000


def test_a_port_of_a_service_is_ignored(repository: Path) -> None:
    """Kubernetes sets RAFAGA_GRPC_PORT=tcp://… for a Service named rafaga-grpc."""
    link = {"RAFAGA_GRPC_PORT": "tcp://10.0.0.1:50051"}
    with process("--repository", str(repository), "--http-port", "0", environ=link) as started:
        warning = started.wait_for(
            "RAFAGA_GRPC_PORT=tcp://10.0.0.1:50051 is ignored: Kubernetes set it for a Service; "
            "enableServiceLinks: false prevents it"
        )
        assert warning["level"] == "WARNING"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "reached"), [("::1", ["[::1]"]), ("[::]", ["[::1]", "127.0.0.1"])])
def test_ipv6(repository: Path, host: str, reached: list[str]) -> None:
    """Of both ports; :: is every address, of IPv4 too."""
    arguments = ("--repository", str(repository), "--grpc-port", "0", "--http-port", "0", "--threads", "1")
    with process(*arguments, "--host", host, "--bearer-token-sha256", "none") as started:
        ports = started.wait_for("serving")
        for address in reached:
            assert get(f"http://{address}:{ports['http_port']}/readyz")[0] == 200
            with Client(f"{address}:{ports['grpc_port']}") as client:
                assert client.models()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("which", ["grpc", "http"])
def test_an_ipv6_port_that_is_taken_is_named(repository: Path, which: str) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        taken = listener.getsockname()[1]
        ports = {"grpc": "0", "http": "0"} | {which: str(taken)}
        arguments = ("--host", "::1", "--grpc-port", ports["grpc"], "--http-port", ports["http"])
        with process("--repository", str(repository), *arguments) as started:
            assert started.exit_code() == 2
            last = started.log[-1]
    assert last.fields["level"] == "CRITICAL"
    assert last.fields["message"] == f"the server cannot start: [::1]:{taken}: Address already in use"


def test_a_unix_socket(repository: Path, tmp_path: Path) -> None:
    """1. A sidecar listens on a socket, and only there. 2. The command line and the SDK reach it. 3. A second server
    does not take it over. 4. One that was killed leaves its file, which does not stop the next."""
    path = tmp_path / "rafaga.sock"
    arguments = ("--repository", str(repository), "--http-port", "0", "--threads", "1", "--grpc-socket", str(path))
    with process(*arguments) as started:
        fields = started.wait_for("serving")
        assert (fields["grpc_socket"], fields["ready"]) == (str(path), True)
        with Client(f"unix:{path}") as client:
            assert client.models()
        assert main(["models", "--server", f"unix:{path}"]) == 0
        with process(*arguments) as second:
            assert second.exit_code() == 2
            assert second.log[-1].fields["message"] == f"the server cannot start: unix:{path}: Address already in use"
        with Client(f"unix:{path}") as client:
            assert client.models()
        started.send(signal.SIGKILL)
        started.exit_code()
    with process(*arguments) as again:
        again.wait_for("serving")
        with Client(f"unix:{path}") as client:
            assert client.models()


def test_a_log_for_people(repository: Path) -> None:
    free = ("--grpc-port", "0", "--http-port", "0")
    arguments = ("--threads", "1", "--log-format", "text")
    with process("--repository", str(repository / "digits"), *free, *arguments) as started:
        eventually(lambda: any("serving" in line.text for line in started.log), "it serves")
        assert any("INFO" in line.text and "ready=True" in line.text for line in started.log)


@pytest.mark.parametrize(
    "environ", [{}, {"RAFAGA_BEARER_TOKEN_SHA256": ""}], ids=["nothing is set", "the Secret is empty"]
)
def test_it_does_not_serve_beyond_this_machine_without_tokens_by_default(environ: dict[str, str]) -> None:
    with process("--host", "0.0.0.0", environ=environ) as started:
        assert started.exit_code() == 2
        assert "none" in started.log[-1].text


def test_none_serves_every_caller(repository: Path) -> None:
    with running(repository, "--host", "0.0.0.0", "--bearer-token-sha256", "none") as served:
        assert served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
