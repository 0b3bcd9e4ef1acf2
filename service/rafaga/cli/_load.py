"""`rafaga load` and `rafaga plan`. They need the load extra, which is imported when they run and not before."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Literal

from rafaga.cli._errors import ExitCode, UsageError, complain


def run(command: Literal["load", "plan"], arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns one of the exit codes that the command's --help lists."""
    try:
        from rafaga.load.command import LoadError

        module = importlib.import_module(f"rafaga.{command}.command")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rafaga":
            raise  # not a missing extra but a broken installation
        complain(f"rafaga {command} needs {error.name}, which is not installed: pip install 'rafaga[load]'")
        return ExitCode.OTHER
    try:
        return int(module.run(arguments, environ))
    except LoadError as error:
        if error.usage:
            raise UsageError(str(error)) from None
        complain(str(error))
        return ExitCode.OTHER
