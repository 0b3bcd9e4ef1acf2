"""A scripted server that RAFAGA_SERVER names, and images that it classifies by their first byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.client.fake_server import Script, serving


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
