"""`rafaga load` and `rafaga plan`. They need the load extra, which is imported when they run and not before."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from rafaga.cli._errors import ExitCode, UsageError, complain, needed_by


def run(command: str, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Returns one of the exit codes that the command's --help lists."""
    with needed_by(f"rafaga {command}", "'rafaga[load]'"):
        from rafaga.load.command import LoadError

        module = importlib.import_module(f"rafaga.{command}.command")
    try:
        return int(module.run(arguments, environ))
    except LoadError as error:
        if error.usage:
            raise UsageError(str(error)) from None
        complain(str(error))
        return ExitCode.OTHER
