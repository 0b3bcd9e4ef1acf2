"""The start of a server: it serves what is whole, says clearly what is not, and ends where it cannot serve at all."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from rafaga import Client
from rafaga.cli._main import main
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, eventually, get, refusal
from tests.process.running import Line, Process, running

IMAGE = messages.random_digits(0)
NO_GPU = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def last_line(*arguments: str, **environ: str) -> Line:
    """Of a server that cannot start."""
    with Process(*arguments, environ=environ) as started:
        assert started.exit_code() == 2
    assert not any("Traceback" in line.text for line in started.log)
    return started.log[-1]


@pytest.mark.parametrize("which", ["grpc", "http"])
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=IPV6)])
def test_a_port_that_is_taken_is_named(repository: Path, host: str, which: str) -> None:
    family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        last = last_line("--repository", str(repository), "--host", host, f"--{which}-port", str(port)).fields
    assert last["level"] == "CRITICAL"
    assert last["message"] == f"the server cannot start: {shown}:{port}: Address already in use"


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--repository", "/nowhere"], {}, r"no model repository at /nowhere.*python -m export"),
        (["--max-batch-size", "0"], {}, r"^rafaga: --max-batch-size: 0: expected at least 1$"),
        pytest.param(
            *(["--device", "tensorrt:0"], {}, r"device: .*(libcuda.so.1|ExecutionProvider).*--device-fallback cpu"),
            marks=NO_GPU,
        ),
        (["--host", "0.0.0.0"], {}, "none"),
        (["--host", "0.0.0.0"], {"RAFAGA_BEARER_TOKEN_SHA256": ""}, "none"),
    ],
    ids=["repository", "setting", "device", "beyond this machine without tokens", "with a Secret that is empty"],
)
def test_what_it_cannot_serve_with_is_named(
    repository: Path, arguments: list[str], environ: dict[str, str], said: str
) -> None:
    assert re.search(said, last_line("--repository", str(repository), *arguments, **environ).text)


@NO_GPU
def test_falling_back_is_allowed_and_logged(repository: Path) -> None:
    with running(repository, "--device", "cuda", "--device-fallback", "cpu") as served:
        (told,) = (line for line in served.process.log if "fallen back to the CPU" in line.text)
        assert "WARNING" in told.text
        health = served.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_every_line_of_the_log_is_json(repository: Path) -> None:
    with running(repository) as served:
        served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
        refusal(lambda: served.vision.Classify(messages.classify(IMAGE, "unknown"), timeout=PATIENCE_S))
        assert served.process.end() == 0
        log = served.process.log
    assert all(line.fields.keys() >= {"time", "level", "logger", "message"} for line in log)
    ready = [line.fields for line in log if line.fields["message"] == "model ready"]
    found = [(line["model"], line["version"], line["precision"]) for line in ready]
    assert found == [("digits", 1, "fp32"), ("series", 1, "fp32")]
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
        assert served.process.end() == 0
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
    said = "is ignored: Kubernetes set it for a Service; enableServiceLinks: false prevents it"
    with Process("--repository", str(repository), environ=link) as started:
        assert started.wait_for(f"RAFAGA_GRPC_PORT=tcp://10.0.0.1:50051 {said}")["level"] == "WARNING"


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("0.0.0.0", ["127.0.0.1"]),
        pytest.param("::1", ["[::1]"], marks=IPV6),
        pytest.param("[::]", ["[::1]", "127.0.0.1"], marks=IPV6),
    ],
)
def test_other_hosts(repository: Path, host: str, reached: list[str]) -> None:
    """Both ports answer without a token; :: is every address, of IPv4 too."""
    allowed = ("--threads", "1", "--bearer-token-sha256", "none")
    with Process("--repository", str(repository), "--host", host, *allowed) as started:
        ports = started.wait_for("serving")
        for address in reached:
            assert get(f"http://{address}:{ports['http_port']}/readyz")[0] == 200
            with Client(f"{address}:{ports['grpc_port']}") as client:
                assert client.models()


def test_a_unix_socket(repository: Path, tmp_path: Path) -> None:
    """1. A sidecar listens on a socket, and only there. 2. The command line and the SDK reach it. 3. A second server
    does not take it over. 4. One that was killed leaves its file, which does not stop the next."""
    path = tmp_path / "rafaga.sock"
    arguments = ("--repository", str(repository), "--threads", "1", "--grpc-socket", str(path))
    with Process(*arguments) as started, Client(f"unix:{path}") as client:
        fields = started.wait_for("serving")
        assert (fields["grpc_socket"], fields["ready"]) == (str(path), True)
        assert main(["models", "--server", f"unix:{path}"]) == 0
        taken = f"the server cannot start: unix:{path}: Address already in use"
        assert last_line(*arguments).fields["message"] == taken
        assert client.models()
        started.end(signal.SIGKILL)
    with Process(*arguments) as again, Client(f"unix:{path}") as client:
        again.wait_for("serving")
        assert client.models()


def test_a_log_for_people(repository: Path) -> None:
    arguments = ("--threads", "1", "--log-format", "text")
    with Process("--repository", str(repository / "digits"), *arguments) as started:
        eventually(lambda: any("serving" in line.text for line in started.log), "it serves")
        assert any("INFO" in line.text and "ready=True" in line.text for line in started.log)
