"""`rafaga serve`: the only command that needs the extra `server`. The server is imported when the command runs."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from rafaga.cli._banner import banner
from rafaga.cli._errors import ExitCode, UsageError, needed_by, sentence
from rafaga.options import Parser

if TYPE_CHECKING:
    from rafaga.server.config.settings import Config
    from rafaga.server.lifecycle import Server

_LOG = logging.getLogger(__name__)

_EPILOG = (
    "Each flag, for example --max-batch-size, is also the environment variable RAFAGA_MAX_BATCH_SIZE and the key "
    "max_batch_size of the TOML file. A flag overrides the variable, and the variable overrides the file."
)

# Of each command: what it serves, and examples.
_COMMANDS = {
    "serve": (
        "a repository, one model or an ONNX file",
        ("rafaga serve models/", "rafaga serve model.onnx --http-port 9000", "rafaga serve --config rafaga.toml"),
    ),
    "demo": (
        "two small models that come with the package",
        ("rafaga demo", "rafaga demo --host :: --bearer-token-sha256 none"),
    ),
}

# Variables that are read only when a process starts.
_ENVIRONMENT = {
    # The thread that drives grpcio's completion queue then reads and writes the sockets itself, and is not woken by
    # other threads: a quarter less CPU time per small request (docs/design/hot-path.md).
    "GRPC_EXPERIMENTS": "-event_engine_listener",
    # glibc then gives the memory of large images back to the system (docs/security.md).
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**20),
}


def parser(command: str) -> Parser:
    """Of `serve` or `demo`. Raises NotInstalled."""
    with needed_by("serving", "'rafaga[server]'"):
        from rafaga.server.config.sources import add_arguments

    what, examples = _COMMANDS[command]
    made = Parser(
        prog=f"rafaga {command}",
        usage=f"rafaga {command} {'[PATH] ' if command == 'serve' else ''}[SETTING...]",
        description=f"Serves {what} until Ctrl-C or SIGTERM.",
        examples=examples,
        epilog=_EPILOG,
    )
    if command == "serve":
        made.add_argument_group("input").add_argument(
            "path", nargs="?", metavar="PATH", help="the same as --repository PATH"
        )
    add_arguments(made)
    return made


def run(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    own_process: bool = False,
    command: str = "serve",
    announce: Callable[[Config, Server], None] | None = None,
) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP. Returns the server's exit code. Raises UsageError and NotInstalled.

    `own_process`: nothing else runs in this process, so its standard error may become a log, and it may start anew.
    `announce`: called once the server serves; without it, a terminal gets the banner.
    """
    if own_process and not _ENVIRONMENT.keys() <= environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**_ENVIRONMENT, **environ})
    with needed_by("serving", "'rafaga[server]'"):
        from rafaga.server.app import serve
        from rafaga.server.config.settings import ConfigError, LogFormat
        from rafaga.server.config.sources import service_links
        from rafaga.server.observability.logging import configured, log_format
        from rafaga.server.observability.native import captured
    config = _config(parser(command).parse_args(arguments), environ)
    text = log_format(config.observability, sys.stderr) is LogFormat.TEXT
    if announce is None and text and sys.stderr.isatty():
        announce = _show_banner
    with ExitStack() as stack:
        stderr = stack.enter_context(captured()) if own_process and not text else sys.stderr
        stack.enter_context(configured(config.observability, stderr))
        for name, value in service_links(environ).items():
            _LOG.warning(
                "%s=%s is ignored: Kubernetes set it for a Service; enableServiceLinks: false prevents it", name, value
            )
        try:
            return serve(config, partial(announce, config) if announce else None)
        except (ConfigError, OSError) as error:
            _LOG.critical("the server cannot start: %s", sentence(error))
            return ExitCode.USAGE
        except Exception:
            _LOG.critical("unhandled exception: the server ends", exc_info=True)
            return ExitCode.OTHER


def _config(namespace: Namespace, environ: Mapping[str, str]) -> Config:
    """Raises UsageError."""
    from rafaga.server.config.settings import ConfigError
    from rafaga.server.config.sources import from_arguments

    if (path := getattr(namespace, "path", None)) is not None:
        if namespace.repository is not None:
            raise UsageError(f"{path}: PATH and --repository mean the same: give one of them")
        namespace.repository = path
    try:
        return from_arguments(namespace, environ)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _show_banner(config: Config, server: Server) -> None:
    print(banner(config, server), file=sys.stderr)


def leave(code: int) -> NoReturn:
    """Ends the process at once. Python would wait for its threads: a server's may still load a model or decode an image
    for a call that has ended, and a client's may wait for an answer until the deadline (grpcio does not always end a
    call that begins while its channel is closed)."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # Ctrl-C has ended the reader too
            stream.flush()
    os._exit(code)
