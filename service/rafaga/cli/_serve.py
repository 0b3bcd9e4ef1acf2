"""`rafaga serve`: the only command that needs the extra `server`. The server is imported when the command runs."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import NoReturn

from rafaga.cli._errors import ExitCode, UsageError, complain

_EPILOG = """Each flag, for example --max-batch-size, is also the environment variable RAFAGA_MAX_BATCH_SIZE and the key
max_batch_size of the TOML file. A flag overrides the variable, and the variable overrides the file."""


def run(parser: ArgumentParser, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serves until SIGTERM or SIGINT. Returns the server's exit code."""
    try:
        from rafaga.server.app import serve
        from rafaga.server.config.settings import ConfigError
        from rafaga.server.config.sources import add_arguments, from_arguments
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rafaga":
            raise  # a broken installation, not a missing extra
        complain(f"serving needs {error.name}, which is not installed: pip install 'rafaga[server]'")
        return ExitCode.OTHER
    parser.usage, parser.epilog = "%(prog)s [--config FILE] [SETTING ...]", _EPILOG
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    try:
        return serve(from_arguments(namespace, environ))
    except ConfigError as error:
        raise UsageError(str(error)) from None


def leave(code: int) -> NoReturn:
    """Ends the process at once. Every accepted call was answered, but threads may still load a model or decode an image
    for a call that has ended, and Python would wait for them."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
