"""Downloads are counted, and a file is either complete or absent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.download import download
from tests.models.support import RecordedSteps

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


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shelf) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("name", "counted"), [("net.pth", True), ("uncounted.pth", False)])
def test_a_download_is_counted_where_its_length_is_known(
    name: str, counted: bool, address: str, tmp_path: Path
) -> None:
    steps, target = RecordedSteps(), tmp_path / "checkpoints" / name
    download(f"{address}/{name}", target, steps)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert steps.progress == {f"downloading {name}": (len(CONTENT), len(CONTENT)) if counted else (0, 0)}


@pytest.mark.parametrize(
    ("name", "message"), [("cut.pth", "ended after 1,500,000 of 3,072,000"), ("absent.pth", "404")]
)
def test_an_incomplete_file_is_not_kept(name: str, message: str, address: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=message):
        download(f"{address}/{name}", tmp_path / "net.pth", RecordedSteps())
    assert list(tmp_path.iterdir()) == []
