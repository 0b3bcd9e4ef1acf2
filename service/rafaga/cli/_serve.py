"""`rafaga serve`: the one command that needs the server extra, which is imported when it runs and not before."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence

from rafaga.cli._errors import ExitCode, UsageError, complain


def run(parser: ArgumentParser, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serves until told to stop. Returns the server's exit code."""
    try:
        from rafaga.server.app import serve
        from rafaga.server.config import ConfigError, add_arguments, from_arguments
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rafaga":
            raise  # not a missing extra but a broken installation
        complain(f"serving needs {error.name}, which is not installed: pip install 'rafaga[server]'")
        return ExitCode.OTHER
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    try:
        return serve(from_arguments(namespace, environ))
    except ConfigError as error:
        raise UsageError(str(error)) from None
