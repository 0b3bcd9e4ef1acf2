"""Which bundles are exported again, and the server process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from demo import bundles
from demo.__main__ import go_on
from demo.bundles import ROOT
from demo.page import Page
from demo.server import ServerFailed, ServerProcess
from tests.bundles import publish_classifier


def test_a_bundle_that_verifies_is_not_exported_again(tmp_path: Path) -> None:
    assert bundles.published(tmp_path, "digits") is None
    publish_classifier(tmp_path)
    newest = publish_classifier(tmp_path)
    found = bundles.published(tmp_path, "digits")
    assert found is not None
    assert found.version == 2
    model = newest / "model.onnx"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert bundles.published(tmp_path, "digits") is None


def test_a_failed_export_says_which_command_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(bundles.ExportFailed, match="python -m export no-such-model"):
        bundles.export(tmp_path, ["no-such-model"])


def test_a_server_starts_and_stops_or_leaves_its_log(tmp_path: Path) -> None:
    publish_classifier(tmp_path / "repository")
    server = ServerProcess(tmp_path / "repository", tmp_path / "log")
    try:
        server.start()
        assert server.grpc_port
        assert server.metrics_url.startswith("http://127.0.0.1:")
        assert server.stop() == 0
    finally:
        server.kill()
    absent = ServerProcess(tmp_path / "absent", tmp_path / "absent.log")
    assert absent.last_log_lines() == ""
    with pytest.raises(ServerFailed, match="exit code"):
        absent.start()
    assert absent.last_log_lines()


def test_the_end_names_commands_and_files_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    go_on(Page(), Path("repository"))
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert commands[0] == ["make", "serve"]
    files = [word.lstrip("@") for command in commands for word in command if word.endswith((".png", ".csv"))]
    assert len(files) == len(commands[1:]) == 3
    assert all((ROOT / file).is_file() for file in files)
    go_on(Page(), tmp_path)
    assert f"rafaga serve {tmp_path}" in capsys.readouterr().out
