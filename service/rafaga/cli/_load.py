"""`rafaga load`. Needs the load extra, which is imported when it runs and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rafaga.cli._errors import ExitCode, UsageError, complain


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Loads a server. Returns one of the exit codes that `rafaga load --help` lists."""
    try:
        from rafaga.load.command import LoadError
        from rafaga.load.command import run as load
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rafaga":
            raise  # not a missing extra but a broken installation
        complain(f"load tests need {error.name}, which is not installed: pip install 'rafaga[load]'")
        return ExitCode.OTHER
    try:
        return load(arguments, environ)
    except LoadError as error:
        if error.usage:
            raise UsageError(str(error)) from None
        complain(str(error))
        return ExitCode.OTHER
