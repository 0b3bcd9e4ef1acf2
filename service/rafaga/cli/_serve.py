"""`rafaga serve`: the one command that needs the server extra, which is imported when it runs and not before."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import NoReturn

from rafaga.cli._errors import ExitCode, UsageError, complain


def run(parser: ArgumentParser, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serves until told to stop. Returns the server's exit code."""
    try:
        from rafaga.server.app import serve
        from rafaga.server.config.settings import ConfigError, add_arguments, from_arguments
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


def leave(code: int) -> NoReturn:
    """Ends the process at once. Everything that is owed was answered, but threads of a pool may still load a model for
    an admin, or decode an image that nobody waits for any more, and Python would wait for them."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
