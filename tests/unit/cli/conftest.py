"""`rafaga` in this process, a scripted server that RAFAGA_SERVER names, and images that it classifies by their first
byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rafaga.cli import main
from tests.unit.client.fake_server import Script, serving


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        """The words of each line."""
        return [line.split() for line in self.out.splitlines()]


Rafaga = Callable[..., Ran]


@pytest.fixture
def rafaga(capsys: pytest.CaptureFixture[str]) -> Rafaga:
    def run(*words: str) -> Ran:
        try:
            code = main(words)
        except SystemExit as ended:  # as argparse ends
            code = int(ended.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


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
