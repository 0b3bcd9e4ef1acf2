"""The log: its two formats, and repeated lines."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rafaga.server.config.settings import Config
from rafaga.server.observability.logging import configured

LOG = logging.getLogger("rafaga.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@contextmanager
def logged(**settings: object) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    with configured(Config.of(**settings).observability, stream):
        yield stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_and_text() -> None:
    with logged() as stream:
        LOG.info("model %s", "ready", extra={"model": "digits"})
        LOG.debug("not shown")
    (line,) = lines(stream)
    assert line.pop("time")
    assert line == {"level": "INFO", "logger": "rafaga.test", "message": "model ready", "model": "digits"}
    with logged(log_format="text") as stream:
        LOG.warning("model ready", extra={"model": "digits"})
    assert stream.getvalue().endswith("WARNING model ready  model=digits\n")


def test_a_terminal_gets_short_text_that_fits() -> None:
    """Unless JSON is asked for; fields without a value are left out."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with open(writer, "w", buffering=1) as terminal:
        with configured(Config().observability, terminal):
            LOG.info("serving", extra={"host": "127.0.0.1", "devices": ["cpu", "cuda"], "socket": None})
            LOG.error("model not served", extra={"model": "digits", "version": 1})
        with configured(Config.of(log_format="json").observability, terminal):
            LOG.info("serving")
        shown = b""
        while shown.count(b"\n") < 5:
            shown += os.read(reader, 4096)
        text, *wrapped, last = shown.decode().splitlines()
    os.close(reader)
    assert text[2::3][:2] == "::"
    assert text[9:] == "serving  host=127.0.0.1"
    assert [line[9:] for line in wrapped] == ["devices=cpu,cuda", "ERROR: model not served", "model=digits  version=1"]
    assert max(map(len, (text, *wrapped))) <= 40
    assert json.loads(last)["message"] == "serving"


def test_repeated_lines_are_summed_up() -> None:
    """The first comes through, the others are counted; the sum shows the last of them. Numbers in a template make no
    difference."""
    with logged() as stream:
        for n in range(500):
            LOG.warning("call %d was bad", n)
        assert [line["message"] for line in lines(stream)] == ["call 0 was bad"]
        for n in range(3):
            LOG.error(f"at 0x7f{n}a line {n}")
    first, *_, last = (line for line in lines(stream) if line["level"] == "WARNING")
    assert "repeated" not in first
    assert (last["message"], last["repeated"]) == ("call 499 was bad", 499)
    assert [line.get("repeated") for line in lines(stream) if line["level"] == "ERROR"] == [None, 2]


def test_what_differs_is_not_summed_up() -> None:
    with logged() as stream:
        for model in ("a", "b"):
            LOG.error("model not served", extra={"model": model})
            LOG.warning("model not served", extra={"model": model})
            logging.getLogger("rafaga.other").error("model not served", extra={"model": model})
        for kind in (ValueError, KeyError):
            try:
                raise kind("boom")
            except kind:
                LOG.exception("model not served", extra={"model": "a"})
    assert len(lines(stream)) == 8
    assert not any("repeated" in line for line in lines(stream))


def test_rejected_calls_are_summed_up_and_details_are_not() -> None:
    """Information too, because a caller's errors are logged as such."""
    with logged(log_level="debug") as stream:
        for n in range(3):
            LOG.info("a request was rejected: %s", n)
            LOG.debug("detail")
    assert [line.get("repeated") for line in lines(stream) if line["level"] == "INFO"] == [None, 2]
    assert sum(line["level"] == "DEBUG" for line in lines(stream)) == 3


def test_a_sum_has_no_traceback_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a minute."""
    monkeypatch.setattr("rafaga.server.observability.logging.WINDOW_S", 0.01)

    def fail() -> None:
        try:
            raise ValueError("boom")
        except ValueError:
            LOG.exception("it failed")

    with logged() as stream:
        fail()
        while not any("repeated" in line for line in lines(stream)):
            fail()
    shown = [line for line in lines(stream) if "repeated" not in line]
    sums = [line for line in lines(stream) if "repeated" in line]
    assert "ValueError: boom" in shown[0]["exc_info"]
    assert not any("exc_info" in line for line in sums)
