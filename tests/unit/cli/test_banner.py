"""The addresses that people can use, and the command for the model that is served."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rafaga.bundle import Task
from rafaga.cli._banner import addresses, banner, demo_commands
from rafaga.server.config.settings import Config


def server(*models: tuple[str, Task | None]) -> Any:
    versions = [SimpleNamespace(name=name, model=SimpleNamespace(bundle=SimpleNamespace(task=t))) for name, t in models]
    absent = SimpleNamespace(name="broken", model=None)
    return SimpleNamespace(grpc_port=1, http_port=2, repository=SimpleNamespace(versions=[absent, *versions]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("localhost:1", "http://localhost:2")),
        ({"host": "0.0.0.0"}, ("localhost:1", "http://localhost:2")),
        ({"host": "10.0.0.7"}, ("10.0.0.7:1", "http://10.0.0.7:2")),
        ({"host": "fd00::7"}, ("[fd00::7]:1", "http://[fd00::7]:2")),
        ({"grpc_socket": "/run/r"}, ("unix:/run/r", "http://localhost:2")),
        ({"tls_key": "k", "tls_certificate": "c"}, ("localhost:1", "https://localhost:2")),
    ],
)
def test_addresses(settings: dict[str, str], expected: tuple[str, str]) -> None:
    assert addresses(Config.of(bearer_token_sha256="none", **settings), server()) == expected


@pytest.mark.parametrize(
    ("task", "command"),
    [
        (Task.DETECTION, "curl --data-binary @IMAGE.jpg http://localhost:2/v1/models/net:detect"),
        (Task.FORECASTING, "curl --data-binary @SERIES.csv http://localhost:2/v1/models/net:forecast"),
        (Task.SEQUENCE, "curl --data SYMBOLS http://localhost:2/v1/models/net:predict"),
        (None, "curl http://localhost:2/v2/models/net"),
    ],
)
def test_a_command_to_try(task: Task | None, command: str) -> None:
    assert f"\n  {command}\n" in banner(Config(), server(("net", task)))


def test_no_command_where_nothing_is_served_or_credentials_are_needed() -> None:
    assert "No model is served; the lines above say why." in banner(Config(), server())
    secured = banner(Config.of(bearer_token_sha256="a" * 64), server(("net", Task.DETECTION)))
    assert "http://localhost:2" in secured
    assert "curl" not in secured


def test_commands_of_the_demo_quote_files_and_name_an_unusual_port(tmp_path: Path) -> None:
    folder = tmp_path / "my files"
    usual = demo_commands(folder, "localhost:50051", "http://localhost:8080")
    assert usual[1] == f"rafaga classify --model lenet5-mnist '{folder}/digit.png'"
    assert usual[2].endswith("co2.csv'")
    other = demo_commands(folder, "localhost:1", "http://localhost:2")
    assert all(command.endswith(" --server localhost:1") for command in other[1:])
