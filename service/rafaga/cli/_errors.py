"""Exit codes, and the one line that says what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from rafaga.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    RafagaError,
    Refused,
    RequestTooLarge,
    ServerUnreachable,
    Unauthenticated,
    Unsupported,
)


class ExitCode(IntEnum):
    """What scripts can rely on."""

    OK = 0
    OTHER = 1  # an internal error of the server, a failed model, a missing extra
    USAGE = 2  # the command line, or a file it names
    UNAVAILABLE = 3  # refused, unreachable or too late: try again later
    INVALID = 4  # the request is wrong: trying again does not help


class UsageError(Exception):
    """The command line, or a file it names, is wrong."""


class NotInstalled(Exception):
    """A package that only some commands need is missing. The message says what to install."""


@contextmanager
def needed_by(what: str, install: str) -> Iterator[None]:
    """Around imports of packages that the base install lacks: NotInstalled if one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "rafaga":
            raise  # a broken installation
        raise NotInstalled(f"{what} needs {package}, which is not installed: pip install {install}") from None


# How the errors of the SDK and of /metrics end if no server listens there.
_NOTHING_THERE = ("(connection refused)", "(no such socket)")
_UNAVAILABLE = (Refused, ServerUnreachable, DeadlineExceeded)
_INVALID = (InvalidRequest, RequestTooLarge, ModelNotFound, Unsupported, Unauthenticated)


def exit_code(error: Exception) -> ExitCode:
    """The exit code that stands for an expected error."""
    if isinstance(error, UsageError | OSError | UnicodeDecodeError):
        return ExitCode.USAGE
    if isinstance(error, _UNAVAILABLE):
        return ExitCode.UNAVAILABLE
    return ExitCode.INVALID if isinstance(error, _INVALID) else ExitCode.OTHER


def sentence(error: Exception) -> str:
    """The error on one line, whatever it carries."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, RafagaError):
        text = error.message or error.reason
    elif isinstance(error, UnicodeDecodeError):
        text = "a file named on the command line is not UTF-8 text"
    else:
        text = str(error)
    if text.endswith(_NOTHING_THERE):
        text += ". Start one: rafaga serve"
    return " ".join(text.split())


def complain(text: str) -> None:
    print(f"rafaga: {text}", file=sys.stderr)
