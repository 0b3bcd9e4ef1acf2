"""Files of unknown origin: which are opened, and which are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rafaga.errors import BundleError
from rafaga.files import contents, opened, opened_in


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert contents(opened(tmp_path / "file", 3)) == b"abc"


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "missing", "fifo behind a link"])
def test_anything_else_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if "fifo" in kind:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="missing, or not a file"):
        opened(path)


def test_a_file_that_became_a_fifo_after_it_was_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    with pytest.raises(BundleError, match="expected a file"):
        opened(tmp_path / "file")


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**31)  # takes no space
    with pytest.raises(BundleError, match="at most 2147483647 bytes, got 2147483648"):
        opened(tmp_path / "file")


def test_a_link_that_leads_elsewhere_once_the_file_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repository" / "model" / "1"
    folder.mkdir(parents=True)
    (folder / "inside").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "file").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(Path, "resolve", lambda path: folder / "inside" if path.name == "file" else path)
    with pytest.raises(BundleError, match="outside the repository"):
        opened_in(folder, "file")
