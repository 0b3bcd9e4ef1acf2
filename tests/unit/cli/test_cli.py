"""The command line against a server on a real socket: what is printed, and the exit codes that scripts rely on."""

from __future__ import annotations

import io
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
from rafaga.cli import main
from rafaga.cli._errors import ExitCode, exit_code
from rafaga.server import app
from rafaga.server.config.settings import Config, ConfigError
from rafaga.v1 import vision_pb2
from tests.unit.client.fake_server import Script


def test_forecast(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = tmp_path / "co2.csv"
    csv.write_text("\ufeffdate,ppm\n" + "\n".join(f"1958-{i},{300 + i}" for i in range(30)))
    assert main(["forecast", str(csv), "--model", "lstm-co2", "--horizon", "2"]) == ExitCode.OK
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == [["STEP", "Q0.1", "Q0.5", "Q0.9"], ["1", "328", "329", "330"], ["2", "328", "329", "330"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n3\n"))
    assert main(["forecast", "--json"]) == ExitCode.OK, "the only forecaster"
    answer = json.loads(capsys.readouterr().out)
    assert answer["levels"] == [0.1, 0.5, 0.9]
    assert answer["values"][1] == [3.0] * 24


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
    script: Script, error: errors.RafagaError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    script.failures.append(error)
    assert main(["models"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"rafaga: {' '.join(error.message.split())}\n"


def test_every_error_has_an_exit_code() -> None:
    for cls in errors._BY_REASON.values():
        assert exit_code(cls("…")) in set(ExitCode) - {ExitCode.OK, ExitCode.USAGE}


def test_an_unreachable_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--server", "127.0.0.1:1", "--timeout", "1"]) == ExitCode.UNAVAILABLE
    told = "rafaga: No server at 127.0.0.1:1 (connection refused). Start one: rafaga serve\n"
    assert capsys.readouterr().err == told
    assert main(["models", "--server", "unix:/nosuch", "--timeout", "1"]) == ExitCode.UNAVAILABLE
    assert capsys.readouterr().err.startswith("rafaga: No server at unix:/nosuch (no such socket). ")


def test_the_http_port_is_not_the_grpc_port(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{http.server_port}"
        assert main(["models", "--server", f"http://{address}", "--timeout", "5"]) == ExitCode.UNAVAILABLE
        http.shutdown()
    expected = f"rafaga: No server at {address} (that port does not speak gRPC; its default is 50051)"
    assert expected in capsys.readouterr().err.splitlines()


def test_an_unknown_model_and_the_nearest_name(
    script: Script, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["models", "lenet"], ["classify", images[0], "--model", "lenet"]):
        assert main(argv) == ExitCode.INVALID
        assert "no model 'lenet'; did you mean 'lenet5-mnist'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["dance"],
        ["classify", "--model", "m"],
        ["classify", "a.png", "--model", "m", "--top-k", "0"],
        ["models", "--timeout", "-1"],
        ["models", "--priority", "HIGH"],
        ["models", "--timeout", "inf"],
        ["forecast", "--model", "m", "--horizon", "x"],
        ["segment", "a.png", "--model", "m", "--output", "classes.png"],
        ["segment", "a.png", "--model", "m", "--output", "/nosuch/classes.npy"],
        ["infer", "m", "--input", "1", "--output", "/tmp"],
    ],
)
def test_wrong_usage_ends_as_argparse_ends_it(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rafaga")
    assert line.endswith("--help")


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == ExitCode.USAGE
    assert "exit codes:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["clasify", "a.png"], "rafaga: unknown command 'clasify'; did you mean 'classify'?"),
        (["classify", "a.png", "--modle", "m"], "rafaga classify: unknown option --modle; did you mean '--model'?"),
        (["classify", "a.png", "--top=1"], "rafaga classify: unknown option --top; did you mean '--top-k'?"),
        (["classify"], "rafaga classify: missing IMAGE"),
        (["models", "a", "b"], "rafaga models: unknown argument b"),
        (["models", "--priority", "hi"], "rafaga models: --priority: 'hi' is not one of high, normal, low"),
        (["completion", "fsh"], "rafaga completion: SHELL: 'fsh' is not one of bash, zsh, fish; did you mean 'fish'?"),
        (["serve", "--gprc-port", "1"], "rafaga serve: unknown option --gprc-port; did you mean '--grpc-port'?"),
        (["load", "--protocol", "open"], "'open' is not one of rafaga, open-inference; did you mean 'open-inference'?"),
    ],
)
def test_wrong_usage_names_the_nearest_known_word(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["models", "--server", "nonsense:nonsense"],
        ["models", "--server", "nosuch.invalid,nosuch.invalid"],
        ["models", "--token-file", "absent"],
        ["models", "--tls-ca", "absent"],
        ["forecast", "absent.csv", "--model", "lstm-co2"],
    ],
)
def test_wrong_values_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == ExitCode.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["forecast", "{file}", "--model", "lstm-co2"],
        ["models", "--token-file", "{file}"],
    ],
)
def test_a_binary_file_in_the_place_of_text(
    script: Script, tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "digit.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert main([word.format(file=file) for word in argv]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "text" in line


def test_a_report_is_refused_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--report", "--json"):
        with pytest.raises(SystemExit) as ended:
            main(["load", "--model", "m", "--rate", "1", option, "/nosuch/load.html"])
        assert ended.value.code == ExitCode.USAGE
        assert "the folder '/nosuch' does not exist" in capsys.readouterr().err


def test_a_terminal_without_utf8(script: Script) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rafaga", "forecast", "--model", "lstm-co2"],
        input="1\n2\n3\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "queued" in done.stdout
    assert "?s, prepared" in done.stdout


def test_the_token_file_and_the_priority(script: Script, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    assert main(["models", "--token-file", str(tmp_path / "token"), "--priority", "low"]) == ExitCode.OK
    assert script.metadata[0]["authorization"] == "Bearer secret"
    assert script.metadata[0]["rafaga-priority"] == "low"


def test_version_and_help_as_a_process() -> None:
    for flag, expected in (("--version", "rafaga 0."), ("--help", "exit codes:")):
        done = subprocess.run(
            [sys.executable, "-m", "rafaga", flag], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0
        assert expected in done.stdout
        assert done.stderr == ""


def test_a_reader_that_goes_away_causes_no_error_on_the_terminal(script: Script) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -u -m rafaga models | true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""


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
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert arrived.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


@pytest.fixture
def log_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("log_restored")
def test_serve_hands_its_arguments_to_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Config] = []

    def serve(config: Config, serving: object) -> int:
        served.append(config)
        return 7

    monkeypatch.setattr(app, "serve", serve)
    assert main(["serve", "--repository", "models", "--grpc-port", "1"]) == 7
    assert main(["serve", "models", "--grpc-port", "1"]) == 7
    assert served == [Config.of(repository="models", grpc_port=1)] * 2
    assert main(["serve", "models", "--repository", "models"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "rafaga: models: PATH and --repository mean the same: give one of them\n"
    assert main(["serve", "--grpc-port", "-1"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "rafaga: --grpc-port: -1: expected 0 to 65535\n"
    with pytest.raises(SystemExit):
        main(["serve", "--nosuch"])
    assert "rafaga serve: unknown option --nosuch" in capsys.readouterr().err


@pytest.mark.usefixtures("log_restored")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(98, "Address already in use", "[::1]:1"),
            ExitCode.USAGE,
            "the server cannot start: [::1]:1: Address already in use",
        ),
        (ConfigError("device: no GPU"), ExitCode.USAGE, "the server cannot start: device: no GPU"),
        (ZeroDivisionError(), ExitCode.OTHER, "unhandled exception: the server ends"),
    ],
)
def test_what_ends_the_server_is_a_line_of_its_log(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def serve(config: Config, serving: object) -> int:
        raise error

    monkeypatch.setattr(app, "serve", serve)
    assert main(["serve"]) == code
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["level"], line["message"]) == ("CRITICAL", message)


def test_serve_without_its_extra_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Missing:
        """A finder for a machine without onnxruntime."""

        def find_spec(self, name: str, *_: object) -> None:
            if name == "rafaga.server.app":
                raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.delitem(sys.modules, "rafaga.server.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(["serve", "--repository", "models"]) == ExitCode.OTHER
    assert capsys.readouterr().err == (
        "rafaga: serving needs onnxruntime, which is not installed: pip install 'rafaga[server]'\n"
    )
