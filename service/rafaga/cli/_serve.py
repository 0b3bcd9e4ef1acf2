"""`rafaga serve`: the only command that needs the extra `server`. The server is imported when the command runs."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NoReturn

from rafaga.cli._errors import ExitCode, UsageError, complain, sentence

_LOG = logging.getLogger(__name__)

_EPILOG = """Each flag, for example --max-batch-size, is also the environment variable RAFAGA_MAX_BATCH_SIZE and the key
max_batch_size of the TOML file. A flag overrides the variable, and the variable overrides the file."""


# The thread that drives grpcio's completion queue then reads and writes the sockets itself, instead of being woken by
# other threads that do: a quarter less CPU time per small request (docs/design/hot-path.md).
_SWITCH, _VALUE = "GRPC_EXPERIMENTS", "-event_engine_listener"


def run(
    parser: ArgumentParser, arguments: Sequence[str], environ: Mapping[str, str], *, own_process: bool = False
) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP. Returns the server's exit code.

    `own_process`: nothing else runs in this process, so its standard error may become a log, and it may start anew.
    """
    if own_process and _SWITCH not in environ:
        # grpcio's core has read its environment already, when it was imported.
        os.execve(sys.executable, sys.orig_argv, {**environ, _SWITCH: _VALUE})
    try:
        from rafaga.server.app import serve
        from rafaga.server.config.settings import ConfigError, LogFormat
        from rafaga.server.config.sources import add_arguments, from_arguments, service_links
        from rafaga.server.observability.logging import configured
        from rafaga.server.observability.native import captured
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "rafaga":
            raise  # a broken installation, not a missing extra
        complain(f"serving needs {error.name}, which is not installed: pip install 'rafaga[server]'")
        return ExitCode.OTHER
    parser.usage, parser.epilog = "%(prog)s [--config FILE] [SETTING ...]", _EPILOG
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    try:
        config = from_arguments(namespace, environ)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    capture = own_process and config.observability.log_format is LogFormat.JSON
    with ExitStack() as stack:
        stderr = stack.enter_context(captured()) if capture else sys.stderr
        stack.enter_context(configured(config.observability, stderr))
        for name, value in service_links(environ).items():
            _LOG.warning(
                "%s=%s is ignored: Kubernetes set it for a Service; enableServiceLinks: false prevents it", name, value
            )
        try:
            return serve(config)
        except (ConfigError, OSError) as error:
            _LOG.critical("the server cannot start: %s", sentence(error))
            return ExitCode.USAGE
        except Exception:
            _LOG.critical("unhandled exception: the server ends", exc_info=True)
            return ExitCode.OTHER


def leave(code: int) -> NoReturn:
    """Ends the process at once. Every accepted call was answered, but threads may still load a model or decode an image
    for a call that has ended, and Python would wait for them."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
