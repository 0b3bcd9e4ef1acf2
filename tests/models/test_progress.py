"""Progress is shown; downloads are counted, and a file is either complete or absent."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from models.download import download
from models.progress import SpinnerSteps, shown
from tests.models.support import RecordedSteps


def test_a_step_is_shown_with_how_much_of_it_is_done() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(8), TaskProgressColumn())
    progress = Progress(*columns, console=console)

    def line() -> str:
        with console.capture() as captured:
            console.print(progress.get_renderable())
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.get()).strip()

    steps = SpinnerSteps(progress, "resnet20")
    assert line().startswith("resnet20 ")
    steps.step("calibrating [int8]")  # brackets are not markup
    assert line().startswith("resnet20: calibrating [int8] ")
    assert "%" not in line(), "the total is not known yet"
    steps.advance(3, 12)
    assert line().endswith("25%")
    steps.step("measuring")
    assert line().startswith("resnet20: measuring ")
    assert "%" not in line(), "every step starts at zero"
    steps.close()
    assert line() == ""


def test_without_a_terminal_every_step_is_a_line() -> None:
    written = io.StringIO()
    with shown(Console(file=written, width=100), "resnet20") as steps:
        steps.step("calibrating [int8]")
        steps.advance(1, 2)
        steps.step("measuring")
    assert written.getvalue() == "resnet20: calibrating [int8]\nresnet20: measuring\n"


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
