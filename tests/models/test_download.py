"""Downloads are counted, and a file is in its place whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.download import download

CONTENT = bytes(range(256)) * 12_000  # three chunks


class Shelf(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/absent.pth":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/uncounted.pth":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1_500_000] if self.path == "/cut.pth" else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Told:
    steps: list[str] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)

    def step(self, what: str) -> None:
        self.steps.append(what)

    def advance(self, done: int, total: int) -> None:
        self.parts.append((done, total))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shelf) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_it_is_counted(address: str, tmp_path: Path) -> None:
    told = Told()
    target = tmp_path / "checkpoints" / "net.pth"
    download(f"{address}/net.pth", target, told)
    assert target.read_bytes() == CONTENT
    assert told.steps == ["downloading net.pth"]
    done = [part for part, _ in told.parts]
    assert done == sorted(done)
    assert len(done) >= 3
    assert told.parts[-1] == (len(CONTENT), len(CONTENT))
    assert list(target.parent.iterdir()) == [target]


def test_a_place_that_tells_no_length(address: str, tmp_path: Path) -> None:
    told = Told()
    download(f"{address}/uncounted.pth", tmp_path / "net.pth", told)
    assert (tmp_path / "net.pth").read_bytes() == CONTENT
    assert told.parts == []


@pytest.mark.parametrize(
    ("name", "message"), [("cut.pth", "ended after 1,500,000 of 3,072,000"), ("absent.pth", "404")]
)
def test_half_a_file_is_no_file(name: str, message: str, address: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=message):
        download(f"{address}/{name}", tmp_path / "net.pth", Told())
    assert list(tmp_path.iterdir()) == []
