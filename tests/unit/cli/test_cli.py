"""The command line against a server on a real socket: what is printed, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rafaga import errors
from rafaga.cli._errors import ExitCode, exit_code
from rafaga.server import app
from rafaga.server.config.settings import Config, ConfigError
from rafaga.v1 import vision_pb2
from tests.unit.cli.conftest import Rafaga
from tests.unit.client.fake_server import Script


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rafaga", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.QueueFull("full", retry_after_s=3600), 3),
        (errors.DeadlineExceeded("too late"), 3),
        (errors.ModelNotFound("no such model"), 4),
        (errors.Unauthenticated("no token"), 4),
        (errors.EngineFailure("the model\nfailed"), 1),
    ],
)
def test_an_error_is_one_line_and_a_documented_exit_code(
    script: Script, error: errors.RafagaError, code: int, rafaga: Rafaga
) -> None:
    script.failures.append(error)
    assert rafaga("models") == (code, "", f"rafaga: {' '.join(error.message.split())}\n")


def test_every_error_has_an_exit_code() -> None:
    for cls in errors._BY_REASON.values():
        assert exit_code(cls("…")) in set(ExitCode) - {ExitCode.OK, ExitCode.USAGE}


def test_an_unreachable_server(rafaga: Rafaga) -> None:
    said = "rafaga: No server at 127.0.0.1:1 (connection refused). Start one: rafaga serve\n"
    assert rafaga("models", "--server", "127.0.0.1:1", "--timeout", "1") == (ExitCode.UNAVAILABLE, "", said)
    ran = rafaga("models", "--server", "unix:/nosuch", "--timeout", "1")
    assert ran.code == ExitCode.UNAVAILABLE
    assert ran.err.startswith("rafaga: No server at unix:/nosuch (no such socket). ")


def test_the_http_port_is_not_the_grpc_port(rafaga: Rafaga) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{http.server_port}"
        ran = rafaga("models", "--server", f"http://{address}", "--timeout", "5")
        http.shutdown()
    assert ran.code == ExitCode.UNAVAILABLE
    expected = f"rafaga: No server at {address} (that port does not speak gRPC; its default is 50051)"
    assert expected in ran.err.splitlines()


def test_an_unknown_model_and_the_nearest_name(script: Script, images: list[str], rafaga: Rafaga) -> None:
    for words in (["models", "lenet"], ["classify", images[0], "--model", "lenet"]):
        ran = rafaga(*words)
        assert ran.code == ExitCode.INVALID
        assert "no model 'lenet'; did you mean 'lenet5-mnist'?" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clasify", "a.png"], "rafaga: unknown command 'clasify'; did you mean 'classify'?"),
        (["classify", "a.png", "--modle", "m"], "rafaga classify: unknown option --modle; did you mean '--model'?"),
        (["classify", "a.png", "--top=1"], "rafaga classify: unknown option --top; did you mean '--top-k'?"),
        (["classify"], "rafaga classify: missing IMAGE"),
        (["classify", "a.png", "--top-k", "0"], "--top-k: '0': must be an integer ≥ 1"),
        (["models", "a", "b"], "rafaga models: unknown argument b"),
        (["models", "--priority", "hi"], "rafaga models: --priority: 'hi' is not one of high, normal, low"),
        (["models", "--timeout", "-1"], "'-1': must be a positive number"),
        (["models", "--timeout", "inf"], "'inf': must be a positive number"),
        (["completion", "fsh"], "rafaga completion: SHELL: 'fsh' is not one of bash, zsh, fish; did you mean 'fish'?"),
        (["serve", "--nosuch"], "rafaga serve: unknown option --nosuch"),
        (["serve", "--gprc-port", "1"], "rafaga serve: unknown option --gprc-port; did you mean '--grpc-port'?"),
        (["load", "--protocol", "open"], "'open' is not one of rafaga, open-inference; did you mean 'open-inference'?"),
        (["load", "--model", "m", "--rate", "1", "--json", "/nosuch/a.json"], "the folder '/nosuch' does not exist"),
        (["load", "--model", "m", "--rate", "1", "--report", "/nosuch/a.html"], "the folder '/nosuch' does not exist"),
        (["forecast", "--horizon", "x"], "--horizon: 'x': must be an integer ≥ 1"),
        (["forecast", "--quantiles", "0.1,1"], "'1': must be numbers between 0 and 1, separated by commas"),
        (["forecast", "--plot", "chart.jpg"], "expected a file name that ends in .png or .svg"),
        (["forecast", "--check", "0"], "--check: '0': must be an integer ≥ 1"),
        (["segment", "a.png", "--output", "a.png"], "--output: 'a.png': expected a file name that ends in .npy"),
        (["segment", "a.png", "--output", "/nosuch/a.npy"], "the folder '/nosuch' does not exist"),
        (["infer", "m", "--input", "1", "--output", "/tmp"], "--output: '/tmp': is a folder; expected a file name"),
    ],
)
def test_wrong_usage_is_named(words: list[str], said: str, rafaga: Rafaga) -> None:
    ran = rafaga(*words)
    (line,) = ran.err.splitlines()
    assert (ran.code, line.endswith("--help")) == (ExitCode.USAGE, True)
    assert said in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models", "--server", "a:b"], "rafaga: --server: 'a:b' is not a valid address; use HOST:PORT, or several"),
        (["models", "--server", "nosuch.invalid,nosuch.invalid"], "rafaga: nosuch.invalid: "),
        (["models", "--token-file", "absent"], "rafaga: absent: No such file or directory"),
        (["models", "--token-file", "{file}"], "text"),
        (["models", "--tls-ca", "absent"], "rafaga: absent: No such file or directory"),
        (["forecast", "absent.csv", "--model", "lstm-co2"], "rafaga: absent.csv: No such file or directory"),
        (["forecast", "{file}", "--model", "lstm-co2"], "text"),
        (["serve", "models", "--repository", "models"], "PATH and --repository mean the same: give one of them"),
        (["serve", "--grpc-port", "-1"], "rafaga: --grpc-port: -1: expected 0 to 65535"),
    ],
)
def test_wrong_values_are_one_line(tmp_path: Path, words: list[str], said: str, rafaga: Rafaga) -> None:
    file = tmp_path / "digit.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    ran = rafaga(*(word.format(file=file) for word in words))
    (line,) = ran.err.splitlines()
    assert ran.code == ExitCode.USAGE
    assert said in line


def test_without_a_command_it_explains_itself(rafaga: Rafaga) -> None:
    ran = rafaga()
    assert ran.code == ExitCode.USAGE
    assert "exit codes:" in ran.err


def test_version_help_and_a_terminal_without_utf8(script: Script) -> None:
    for flag, expected in (("--version", "rafaga 0."), ("--help", "exit codes:")):
        done = process(flag)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = process("forecast", "--model", "lstm-co2", input="1\n2\n3\n", env=environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert "queued" in done.stdout
    assert "?s, prepared" in done.stdout


def test_the_token_file_and_the_priority(script: Script, tmp_path: Path, rafaga: Rafaga) -> None:
    (tmp_path / "token").write_text("secret\n")
    assert rafaga("models", "--token-file", str(tmp_path / "token"), "--priority", "low").code == ExitCode.OK
    assert script.metadata[0]["authorization"] == "Bearer secret"
    assert script.metadata[0]["rafaga-priority"] == "low"


def test_a_reader_that_goes_away_causes_no_error_on_the_terminal(script: Script) -> None:
    words = ["bash", "-c", f"set -o pipefail; {sys.executable} -u -m rafaga models | true"]
    assert subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stderr == ""


def test_ctrl_c_leaves_at_once_and_without_a_traceback(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several messages are open when the signal comes, and none is ever answered."""
    received, arrived = script.received, threading.Semaphore(0)

    def hang(request: Any, context: Any) -> None:
        received(request, context)
        if isinstance(request, vision_pb2.ClassifyRequest):
            arrived.release()
            script.released.wait()

    monkeypatch.setattr(script, "received", hang)
    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(b"\x07")
    command = [sys.executable, "-m", "rafaga", "classify", str(tmp_path), "--timeout", "600"]
    # A shell starts background jobs, perhaps these tests, with the signal ignored. Children inherit that, not handlers.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        for _ in range(3):
            assert arrived.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


def test_serve_hands_its_arguments_to_the_server(monkeypatch: pytest.MonkeyPatch, rafaga: Rafaga) -> None:
    served: list[Config] = []

    def serve(config: Config, serving: object) -> int:
        served.append(config)
        return 7

    monkeypatch.setattr(app, "serve", serve)
    for words in (["--repository", "models"], ["models"]):
        assert rafaga("serve", *words, "--grpc-port", "1").code == 7
    assert served == [Config.of(repository="models", grpc_port=1)] * 2


@pytest.fixture(autouse=True)
def log_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(98, "Address in use", "[::1]:1"), ExitCode.USAGE, "the server cannot start: [::1]:1: Address in use"),
        (ConfigError("device: no GPU"), ExitCode.USAGE, "the server cannot start: device: no GPU"),
        (ZeroDivisionError(), ExitCode.OTHER, "unhandled exception: the server ends"),
    ],
)
def test_what_ends_the_server_is_a_line_of_its_log(
    monkeypatch: pytest.MonkeyPatch, rafaga: Rafaga, error: Exception, code: int, message: str
) -> None:
    def serve(config: Config, serving: object) -> int:
        raise error

    monkeypatch.setattr(app, "serve", serve)
    ran = rafaga("serve")
    (line,) = map(json.loads, ran.err.splitlines())
    assert (ran.code, line["level"], line["message"]) == (code, "CRITICAL", message)
