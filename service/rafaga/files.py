"""Files of unknown origin: only regular files are opened, and no more is read than allowed."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path

from rafaga.errors import BundleError

MOST_BYTES = 2**31 - 1
"""Of an ONNX file: protobuf's limit."""

MOST_TEXT_BYTES = 2**24
"""Of a JSON file: half a million labels."""


def opened(path: Path, most_bytes: int = MOST_BYTES) -> BufferedReader:
    """Raises BundleError for anything but a regular file of at most `most_bytes`, and OSError. Never blocks, as opening
    a FIFO does."""
    if not path.is_file():
        raise BundleError(f"{path}: missing, or not a file")
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes:
        return file
    file.close()
    raise BundleError(f"{path}: expected a file of at most {most_bytes} bytes, got {status.st_size}")


def opened_in(folder: Path, name: str, most_bytes: int = MOST_BYTES) -> BufferedReader:
    """The file `name` of a version's folder. Raises as `opened`.

    It may be a link, as in a Kubernetes ConfigMap or a checkout by git-sync, to a file inside the repository. If the
    folder is itself a link, files beside the one it leads to are inside too: the server follows no folder out of its
    repository (see repository.discovery).
    """
    path = folder / name
    with ExitStack() as stack:
        file = stack.enter_context(opened(path, most_bytes))
        target = path.resolve()
        inside = any(target.is_relative_to(base.resolve()) for base in (folder.parent.parent, folder))
        # A link may have changed since the file was opened: then it leads to another file.
        if not inside or not os.path.samestat(os.fstat(file.fileno()), target.stat()):
            what = f"is a link to {target}, outside the repository"
            raise BundleError(f"{path}: {what}: copy the file into the repository")
        stack.pop_all()
        return file


def contents(file: BufferedReader) -> bytes:
    """All bytes that a file had when it was opened, and closes it."""
    with file:
        return file.read(os.fstat(file.fileno()).st_size)
