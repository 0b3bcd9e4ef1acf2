"""What native code (ONNX Runtime, gRPC, CUDA) and Python itself print to standard error, as lines of the log."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_LOG = logging.getLogger("native")

_STDERR = 2
_PIPE_BYTES = 2**20
_MAX_LINE_BYTES = 8192
_JOIN_S = 2.0
_LOOK_S = 0.5
_FATAL = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)

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
# gRPC prints this when the server ends its listening socket before it stops.
_LISTENER_ENDED = "Failed accept4: Invalid argument"


def level_of(line: str) -> int:
    found = _PREFIX.match(line)
    level = _LEVELS[found[1] or found[2]] if found else logging.WARNING
    if _LISTENER_ENDED in line:
        return logging.DEBUG
    return min(level, logging.WARNING) if _FAILED_RUN in line else level


@contextmanager
def captured() -> Iterator[TextIO]:
    """Turns file descriptor 2 into a pipe whose lines a thread logs, until the block ends. Gives the real stderr.

    Only for a process that is the server's alone. If it crashes, Python prints the stacks of all threads to the real
    stderr, and the process ends once the lines that native code printed before are logged.
    """
    real = os.fdopen(os.dup(_STDERR), "w", buffering=1, errors="backslashreplace")
    before = sys.stderr
    read, write = os.pipe()
    with suppress(OSError):  # the system may allow less
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    # A full pipe drops lines. Otherwise code that prints while it holds the interpreter would wait forever: the thread
    # that reads needs the interpreter too.
    os.set_blocking(write, False)
    os.dup2(write, _STDERR)
    os.close(write)
    sys.stderr = real
    _show_crashes(real)
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


def _show_crashes(real: TextIO) -> None:
    """A process that crashes would be gone before the reader gets to run. So the crashing thread, which may be able to
    do very little, first sleeps (for as many seconds as its signal's number), and the reader ends the process."""
    libc = ctypes.CDLL(None)
    libc.sysv_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)  # a handler that is called once
    faulthandler.disable()  # or its handlers would be replaced
    for number in _FATAL:
        libc.sysv_signal(number, ctypes.cast(libc.sleep, ctypes.c_void_p))
    faulthandler.enable(real)


def _crash() -> int:
    """The signal of a crash, whose handler was called, so that it is no longer set; 0 if there was none."""
    status = Path("/proc/self/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return next((number for number in _FATAL if not caught >> (number - 1) & 1), 0)


def _end(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(_LOOK_S)
    os._exit(128 + number)  # the first process of a container ignores its own signals


def _read(pipe: int) -> None:
    rest = b""
    with open(pipe, "rb", buffering=0) as stream:
        while True:
            if not select.select([stream], (), (), _LOOK_S)[0]:
                if number := _crash():
                    _log(rest)
                    _end(number)
                continue
            if not (data := stream.read(65536)):
                break
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
