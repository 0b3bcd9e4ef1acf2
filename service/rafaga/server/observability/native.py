"""What native code (ONNX Runtime, gRPC, CUDA) and Python itself print to standard error, as lines of the log."""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_LOG = logging.getLogger("native")

_STDERR = 2
_PIPE_BYTES = 2**20
_MAX_LINE_BYTES = 8192
_JOIN_S = 2.0

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Of ONNX Runtime: "2026-01-01 12:00:00.123 [E:onnxruntime:, file.cc:1 Function] text"; of gRPC: "E0000 00:00:1.2 3 …".
_PREFIX = re.compile(r"(?:\S+ \S+ )?\[([VIWEF]):onnxruntime:|([IWEF])\d{4} ")
_LEVELS = {
    "V": logging.DEBUG,
    "I": logging.INFO,
    "W": logging.WARNING,
    "E": logging.ERROR,
    "F": logging.CRITICAL,
}
# ONNX Runtime prints this for each run that fails, also if the caller's values are the cause. The run raises it as
# well, so the server logs it where it is an error.
_FAILED_RUN = "ExecuteKernel"


def level_of(line: str) -> int:
    found = _PREFIX.match(line)
    level = _LEVELS[found[1] or found[2]] if found else logging.WARNING
    return min(level, logging.WARNING) if _FAILED_RUN in line else level


@contextmanager
def captured() -> Iterator[TextIO]:
    """Turns file descriptor 2 into a pipe whose lines a thread logs, until the block ends. Gives the real stderr.

    Only for a process that is the server's alone. If the process crashes, Python prints the stacks of all threads to
    the real stderr, while the thread still logs what came before.
    """
    real = os.fdopen(os.dup(_STDERR), "w", buffering=1, errors="backslashreplace")
    before = sys.stderr
    read, write = os.pipe()
    with suppress(OSError):  # the system may allow less
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    # A full pipe drops lines. Otherwise code that prints while it holds the interpreter would wait for ever: the thread
    # that reads needs the interpreter too.
    os.set_blocking(write, False)
    os.dup2(write, _STDERR)
    os.close(write)
    sys.stderr = real
    faulthandler.enable(real)
    reader = threading.Thread(target=_read, args=(read,), name="native-log", daemon=True)
    reader.start()
    _log_what_python_prints()
    try:
        yield real
    finally:
        os.dup2(real.fileno(), _STDERR)  # closes the pipe, which ends the thread
        reader.join(_JOIN_S)
        faulthandler.enable(before)
        sys.stderr = before


def _read(pipe: int) -> None:
    rest = b""
    with open(pipe, "rb", buffering=0) as stream:
        while data := stream.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                _log(line)
    _log(rest)


def _log(line: bytes) -> None:
    text = _COLOUR.sub("", line[:_MAX_LINE_BYTES].decode(errors="replace")).strip()
    if text:
        _LOG.log(level_of(text), text)


def _log_what_python_prints() -> None:
    """Warnings, and exceptions that end a thread or cannot be raised."""
    log = logging.getLogger("python")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "unknown"
        error = args.exc_value or args.exc_type()
        log.critical("a thread ended with an exception: %s", name, exc_info=error)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        log.error("%s: %r", args.err_msg or "exception ignored in", args.object, exc_info=args.exc_value)

    logging.captureWarnings(True)
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable
