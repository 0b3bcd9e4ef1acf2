"""The format of the log: one JSON object per line for log collectors, or text for people."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

from rafaga.server.config.settings import LogFormat, ObservabilitySettings


def configure(settings: ObservabilitySettings) -> None:
    """Replaces all handlers of the root logger by one that writes to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format is LogFormat.JSON:
        fields = "{asctime}{levelname}{name}{message}"
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(fields, style="{", rename_fields=names))
    else:
        handler.setFormatter(_TextFormatter("{asctime} {levelname:7} {message}", style="{"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


class _TextFormatter(logging.Formatter):
    """The message, then the fields that JSON would have."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        return super().format(record) + "".join(f"  {k}={v}" for k, v in fields.items())
