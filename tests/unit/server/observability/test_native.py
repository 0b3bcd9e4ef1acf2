"""Standard error of a process whose native code prints: every line is JSON, also at its end."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from rafaga.server.observability.native import level_of

ONNX_RUNTIME = "2026-11-28 15:00:00.123456 [{}:onnxruntime:, sequential_executor.cc:572 {}] text"


START = """
import ctypes, os, sys, threading, warnings
from rafaga.server.config.settings import ObservabilitySettings
from rafaga.server.observability.logging import configured
from rafaga.server.observability.native import captured

libc = ctypes.CDLL(None)

def printf(text):
    return libc.write(2, text, len(text))

with captured() as stderr, configured(ObservabilitySettings(), stderr):
"""


def run(code: str) -> tuple[int, list[str]]:
    """Exit code and stderr of a process that runs `code` while its standard error is captured."""
    program = START + textwrap.indent(textwrap.dedent(code), "    ")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.splitlines()


def messages(lines: list[str]) -> list[tuple[str, str, str]]:
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [(line["logger"], line["level"], line["message"]) for line in found]


@pytest.mark.parametrize(
    ("line", "level"),
    [
        (ONNX_RUNTIME.format("E", "LoadModel"), logging.ERROR),
        (ONNX_RUNTIME.format("W", "CleanUnused"), logging.WARNING),
        (ONNX_RUNTIME.format("I", "Run"), logging.INFO),
        (ONNX_RUNTIME.format("F", "Run"), logging.CRITICAL),
        (ONNX_RUNTIME.format("E", "ExecuteKernel"), logging.WARNING),
        ("E0000 00:00:1764342302.123456   12345 chttp2_server.cc:1] text", logging.ERROR),
        ("I0000 00:00:1764342302.123456   12345 fork_posix.cc:71] text", logging.INFO),
        ("E is not a prefix", logging.WARNING),
        ("something else", logging.WARNING),
    ],
)
def test_levels(line: str, level: int) -> None:
    assert level_of(line) == level


def test_what_python_and_native_code_print_is_logged() -> None:
    """Without colours, and the last line without its end."""
    code, lines = run(r"""
        warnings.warn("old")
        thread = threading.Thread(target=lambda: 1 / 0, name="failing")
        thread.start()
        thread.join()
        class Bad:
            def __del__(self):
                raise ValueError("in the end")
        bad = Bad()
        del bad
        printf(b"\x1b[1;31m2026-11-28 15:00:00.1 [E:onnxruntime:, a.cc:1 Load] text\x1b[m\nlast \xff words")
    """)
    assert code == 0
    (name, level, text), *rest = messages(lines)
    assert (name, level) == ("py.warnings", "WARNING")
    assert "UserWarning: old" in text
    assert rest[0] == ("python", "CRITICAL", "a thread ended with an exception: failing")
    assert rest[1][:2] == ("python", "ERROR")
    assert rest[2:] == [
        ("native", "ERROR", "2026-11-28 15:00:00.1 [E:onnxruntime:, a.cc:1 Load] text"),
        ("native", "WARNING", "last \ufffd words"),
    ]


def test_more_than_the_pipe_holds_does_not_block_the_interpreter() -> None:
    """Native code prints 4 MiB while it holds the interpreter, so the thread that reads cannot run. Lines are lost, but
    the process goes on."""
    code, lines = run(r"""
        holding = ctypes.PyDLL(None)
        line = b"x" * 1023 + b"\n"
        for _ in range(4096):
            holding.write(2, line, len(line))
        print("went on")
    """)
    assert code == 0
    assert all(name == "native" for name, _, _ in messages(lines))


def test_a_crash_shows_what_was_printed_last_and_where_it_happened() -> None:
    code, lines = run(r"""
        printf(b"terminate called\nout of luck")
        libc.abort()
    """)
    text = "\n".join(lines)
    # Printing the stacks of threads that run may itself end in SIGSEGV.
    assert code in (-signal.SIGABRT, -signal.SIGSEGV)
    assert '"message": "terminate called"' in text
    assert '"message": "out of luck"' in text
    assert "Fatal Python error" in text
    assert "Current thread" in text
