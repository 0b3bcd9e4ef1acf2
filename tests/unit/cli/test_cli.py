"""The command line against a server on a real socket: what is printed, and the exit codes that scripts rely on."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rafaga import errors
from rafaga.cli import main
from rafaga.cli._errors import ExitCode, exit_code
from rafaga.server import app
from rafaga.server.config.settings import Config, ConfigError
from rafaga.v1 import catalog_pb2
from tests.unit.client.fake_server import BROKEN, Script, serving


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    script = Script()
    with serving(script) as port:
        monkeypatch.setenv("RAFAGA_SERVER", f"127.0.0.1:{port}")
        yield script


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    for content in (b"\x07", b"\x03"):
        (tmp_path / f"{content[0]}.png").write_bytes(content)
    return [str(tmp_path / "7.png"), str(tmp_path / "3.png")]


def test_models(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.states["lstm-co2"] = catalog_pb2.Model.FAILED
    assert main(["models"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["MODEL", "VERSION", "STATE", "TASK"]
    assert [line.split()[:6] for line in lines[1:]] == [
        ["backbone", "1", "ready", "classification", "fp32", "random"],
        ["lenet5-mnist", "1", "ready", "classification", "fp32", "trained"],
        ["lstm-co2", "1", "failed", "forecasting", "fp32", "trained"],
    ]
    assert "top1 0.991" in lines[2]
    assert lines[3].endswith("model.onnx changed after it was published")
    script.states["lstm-co2"] = catalog_pb2.Model.READY
    assert main(["models"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert "mase 0.5, coverage_90 0.91" in shown
    assert "coverage_q05" not in shown, "a single quantile is left to JSON"
    assert main(["models", "--json"]) == ExitCode.OK
    assert "coverage_q05" in capsys.readouterr().out


def test_classify(script: Script, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", *images, "--model", "lenet5-mnist", "--top-k", "2"]) == ExitCode.OK
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()]
    assert rows[0] == ["FILE", "RANK", "LABEL", "INDEX", "PROBABILITY"]
    assert rows[1:] == [
        [images[0], "1", "7", "7", "0.5500"],
        ["2", "8", "8", "0.0500"],
        [images[1], "1", "3", "3", "0.5500"],
        ["2", "4", "4", "0.0500"],
    ]
    assert captured.err == ""


def test_a_bad_file_fails_alone(script: Script, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(images[0]).with_name("broken.png")
    broken.write_bytes(BROKEN)
    assert main(["classify", images[0], str(broken), "--model", "lenet5-mnist"]) == ExitCode.INVALID
    assert capsys.readouterr().err == f"rafaga: {broken}: broken\n"
    assert main(["classify", "absent.png", images[1], "--model", "lenet5-mnist", "--json"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.err == "rafaga: absent.png: No such file or directory\n"
    missing, found = json.loads(captured.out)
    assert missing["error"]["reason"] == "FILE"
    assert found["predictions"][0] == {"label": "3", "index": 3, "probability": pytest.approx(0.55)}
    assert found["timing"]["batch_size"] == 4


def test_features(script: Script, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "maps.npz"
    assert main(["features", images[0], "--model", "backbone", "--output", str(output)]) == ExitCode.OK
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split() == ["c4", "16", "2", "x", "3", "x", "3"]
    assert captured.err == "rafaga: backbone has random weights: its answers are meaningless\n"
    with np.load(output) as maps:
        assert {name: maps[name].shape for name in maps} == {"c4": (2, 3, 3), "embedding": (4,)}
    assert main(["features", images[0], "--model", "backbone", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["maps"][0] == {"name": "c4", "stride": 16, "shape": [2, 3, 3]}


def test_forecast(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = tmp_path / "co2.csv"
    csv.write_text("\ufeffdate,ppm\n" + "\n".join(f"1958-{i},{300 + i}" for i in range(30)))
    assert main(["forecast", str(csv), "--model", "lstm-co2", "--horizon", "2"]) == ExitCode.OK
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == [["STEP", "Q0.1", "Q0.5", "Q0.9"], ["1", "328", "329", "330"], ["2", "328", "329", "330"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n3\n"))
    assert main(["forecast", "--model", "lstm-co2", "--json"]) == ExitCode.OK
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
    assert capsys.readouterr().err.startswith("rafaga: 127.0.0.1:1: ")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["dance"],
        ["classify", "--model", "m"],
        ["classify", "a.png"],
        ["classify", "a.png", "--model", "m", "--top-k", "0"],
        ["models", "--timeout", "-1"],
        ["models", "--priority", "HIGH"],
        ["models", "--timeout", "inf"],
        ["forecast", "--model", "m", "--horizon", "x"],
        ["segment", "a.png", "--model", "m", "--output", "classes.png"],
        ["segment", "a.png", "--model", "m", "--output", "/nosuch/classes.npy"],
        ["features", "a.png", "--model", "m", "--output", "/tmp"],
    ],
)
def test_wrong_usage_ends_as_argparse_ends_it(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == ExitCode.USAGE
    assert "usage: rafaga" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["models", "--server", "nonsense,nonsense"],
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


def test_a_terminal_without_utf8(script: Script, images: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rafaga.cli", "forecast", "--model", "lstm-co2"],
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
            [sys.executable, "-m", "rafaga.cli", flag], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0
        assert expected in done.stdout
        assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_error_on_the_terminal(script: Script) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -u -m rafaga.cli models | true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""


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
    assert "usage: rafaga serve" in capsys.readouterr().err


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
