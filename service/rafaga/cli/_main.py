"""Runs one command; turns expected errors into one line and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from rafaga import Client, ModelNotFound, RafagaError
from rafaga.cli import _completion, _demo, _load, _parser, _serve
from rafaga.cli._errors import ExitCode, NotInstalled, UsageError, complain, exit_code, sentence
from rafaga.options import credentials, did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `rafaga`; returns the exit code. Wrong usage ends in SystemExit(2), as argparse does it."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    own_process = argv is None
    _print_on_any_terminal()
    try:
        code = _run(arguments, own_process=own_process)
        sys.stdout.flush()  # here, where a reader that has gone is handled
        return code
    except BrokenPipeError:
        # The reader of a pipe has gone, `rafaga models | head -1`; stdout is closed at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OTHER
    except (RafagaError, UsageError, NotInstalled, OSError, UnicodeDecodeError) as error:
        complain(sentence(error))
        return exit_code(error)
    except KeyboardInterrupt:
        code = 130  # as a shell reports SIGINT
        if own_process:
            _serve.leave(code)
        return code


def _run(arguments: Sequence[str], *, own_process: bool) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else (None, ())
    if name in {"serve", "demo"}:
        code: int = (_demo if name == "demo" else _serve).run(rest, os.environ, own_process=own_process)
        if own_process:
            _serve.leave(code)
        return code
    if name in {"load", "plan"}:
        return _load.run(name, rest, os.environ)
    if name == "completion":
        return _completion.run(rest, os.environ)
    parser = _parser.parser(os.environ)
    if name is None:
        parser.print_help(sys.stderr)
        return ExitCode.USAGE
    args = parser.parse_args(arguments)
    return _ask(args) if "server" in args else int(args.run(args))


def _ask(args: Namespace) -> int:
    command: Callable[[Namespace, Client], int] = args.run
    with _client(args) as client:
        try:
            return command(args, client)
        except ModelNotFound as error:
            name = getattr(args, "model", None) or getattr(args, "name", None)
            if name is None:
                raise
            near = did_you_mean(name, {model.name for model in client.models()})
            raise ModelNotFound(error.message + near) from None


def _client(args: Namespace) -> Client:
    try:
        given = credentials(args)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None
    try:
        return Client(args.server, timeout_s=args.timeout, token=given.token, tls=given.tls, priority=given.priority)
    except ValueError as error:
        raise UsageError(f"--server: {error}") from None


def _print_on_any_terminal() -> None:
    """A terminal without UTF-8 shows ? in the place of characters that it lacks, such as µ."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
