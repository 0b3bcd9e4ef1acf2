"""The log: one JSON object per line for log collectors, or text for people. Repeated lines are summed up."""

from __future__ import annotations

import logging
import os
import re
import textwrap
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

from rafaga.server.config.settings import LogFormat, ObservabilitySettings

WINDOW_S = 60.0

_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")
_ABOUT = ("model", "version", "method")


def log_format(settings: ObservabilitySettings, stream: TextIO) -> LogFormat:
    return settings.log_format or (LogFormat.TEXT if stream.isatty() else LogFormat.JSON)


@contextmanager
def configured(settings: ObservabilitySettings, stream: TextIO) -> Iterator[None]:
    """Replaces all handlers of the root logger by one that writes to `stream`. Leaving sums up what was repeated."""
    handler = logging.StreamHandler(stream)
    if log_format(settings, stream) is LogFormat.JSON:
        fields = "{asctime}{levelname}{name}{message}"
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(fields, style="{", rename_fields=names))
    elif stream.isatty():
        handler.setFormatter(_TerminalFormatter(stream))
    else:
        handler.setFormatter(_TextFormatter("{asctime} {levelname:7} {message}", style="{"))
    repeats = Repeats()
    handler.addFilter(repeats)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    over = threading.Event()

    def sum_up() -> None:
        while not over.wait(WINDOW_S):
            repeats.sum_up()

    threading.Thread(target=sum_up, name="log", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        repeats.sum_up()


class Repeats(logging.Filter):
    """Lets the first of equal lines through. `sum_up` logs the last of the others, with their number in
    the field `repeated`, and begins anew.

    Equal: of one logger, template, model, version, method and type of exception; numbers in a template do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[Hashable, tuple[int, logging.LogRecord]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO or hasattr(record, "repeated"):
            return True
        fields = vars(record)
        kind = record.exc_info[0] if record.exc_info else None
        template = _VARYING.sub("#", str(record.msg))
        key = (record.name, record.levelno, template, kind, *map(fields.get, _ABOUT))
        with self._lock:
            count = self._seen[key][0] + 1 if key in self._seen else 0
            self._seen[key] = (count, record)
        return not count

    def sum_up(self) -> None:
        with self._lock:
            seen, self._seen = self._seen, {}
        for count, record in seen.values():
            if count:
                last = logging.makeLogRecord({**vars(record), "exc_info": None, "exc_text": None, "repeated": count})
                logging.getLogger(record.name).handle(last)


class _TextFormatter(logging.Formatter):
    """The message, then the fields that JSON would have."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = {k: v for k, v in vars(record).items() if k not in self._STANDARD and v is not None}
        return super().formatMessage(record) + "".join(f"  {k}={_shown(v)}" for k, v in fields.items())


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class _TerminalFormatter(_TextFormatter):
    """As short as possible, and lines that are too long for the terminal continue indented."""

    def __init__(self, terminal: TextIO) -> None:
        super().__init__("{asctime} {message}", "%H:%M:%S", style="{")
        self._terminal = terminal

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        if record.levelno > logging.INFO:
            record.message = f"{record.levelname}: {record.message}"
        columns = os.get_terminal_size(self._terminal.fileno()).columns or 80
        return textwrap.fill(
            super().formatMessage(record),
            columns,
            subsequent_indent=" " * 9,
            break_long_words=False,
            break_on_hyphens=False,
        )
