"""The start of a server: it serves what is whole, says clearly what is not, and ends where it cannot serve at all."""

from __future__ import annotations

import hashlib
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, eventually, get, refusal
from tests.process.running import Running, process, running

IMAGE = messages.random_digits(0)
OPEN = "anyone who can reach it may call"


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
def test_falling_back_is_allowed_and_told(repository: Path) -> None:
    with running(repository, "--device", "cuda", "--device-fallback", "cpu") as served:
        (told,) = (line for line in served.process.log if "fallen back to the CPU" in line.text)
        assert "WARNING" in told.text
        assert health(served, "") == "SERVING"


def test_a_bundle_with_one_flipped_bit_is_not_served_and_the_others_are(repository: Path, tmp_path: Path) -> None:
    """The log names the file; health, readiness and the metrics tell it; the caller of that model is told to go on."""
    root = tmp_path / "repository"
    shutil.copytree(repository, root)
    file = root / "slow" / "1" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    with running(root) as served:
        errors = [line for line in served.process.log if line.fields.get("level") == "ERROR"]
        assert [line.fields["model"] for line in errors] == ["slow"]
        assert str(file) in errors[0].fields["message"]
        assert "changed after it was published" in errors[0].fields["message"]

        assert [health(served, name) for name in ("slow", "digits", "")] == ["NOT_SERVING", "SERVING", "NOT_SERVING"]
        assert get(f"{served.http}/readyz")[0] == 503
        assert get(f"{served.http}/healthz")[0] == 200
        assert served.metric("rafaga_model_ready", model="slow") == 0

        refused = refusal(lambda: served.vision.Classify(messages.classify(IMAGE, "slow"), timeout=PATIENCE_S))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
        answer = served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
        assert messages.probabilities(answer) == pytest.approx(bundles.classify(IMAGE), abs=1e-5)


def test_every_line_of_the_log_is_json(repository: Path) -> None:
    with running(repository) as served:
        served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
        refusal(lambda: served.vision.Classify(messages.classify(IMAGE, "nobody"), timeout=PATIENCE_S))
        served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 0
        log = served.process.log
    assert all(line.fields.keys() >= {"time", "level", "logger", "message"} for line in log)
    assert not any(OPEN in line.text for line in log), "on loopback nobody else may call"
    ready = [line.fields for line in log if line.fields["message"] == "model ready"]
    assert [(line["model"], line["version"], line["precision"]) for line in ready] == [
        ("digits", 1, "fp32"),
        ("slow", 1, "fp32"),
    ]
    serving = served.process.wait_for("serving")
    assert (serving["ready"], serving["host"]) == (True, "127.0.0.1")


def test_a_log_for_people(repository: Path) -> None:
    """The setting transport has no effect any more; one warning says so."""
    free = ("--grpc-port", "0", "--http-port", "0")
    arguments = ("--threads", "1", "--log-format", "text", "--transport", "grpcio")
    with process("--repository", str(repository / "digits"), *free, *arguments) as started:
        eventually(lambda: any("serving" in line.text for line in started.log), "it serves")
        assert any("INFO" in line.text and "ready=False" in line.text for line in started.log)
        assert sum("transport has no effect" in line.text for line in started.log) == 1


@pytest.mark.parametrize("token", [(), ("--bearer-token-sha256", hashlib.sha256(b"token").hexdigest())])
def test_listening_beyond_this_machine_without_a_token_is_warned_about(
    repository: Path, token: tuple[str, ...]
) -> None:
    with running(repository, "--host", "0.0.0.0", *token) as served:
        warnings = [line.text for line in served.process.log if line.fields.get("level") == "WARNING"]
    assert any(OPEN in warning for warning in warnings) is (not token)
