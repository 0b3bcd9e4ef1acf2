"""Parses the command line, runs one command, turns expected errors into one line and an exit code."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from rafaga import Client, RafagaError
from rafaga.cli import _commands, _demo, _load, _serve
from rafaga.cli._errors import ExitCode, UsageError, complain, exit_code, sentence
from rafaga.options import add_credentials, credentials, output_file

_EPILOG = f"""exit codes:
  {ExitCode.OK}  success
  {ExitCode.OTHER}  the server failed, or something is not installed
  {ExitCode.USAGE}  the command line, or a file it names, is wrong
  {ExitCode.UNAVAILABLE}  refused, unreachable or too late: try again later
  {ExitCode.INVALID}  the request is invalid: an unknown model, not an image, …
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `rafaga`; returns the exit code. Wrong usage ends in SystemExit(2), as argparse does it."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _print_on_any_terminal()
    try:
        if arguments[:1] in (["serve"], ["demo"]):
            run = _demo.run if arguments[0] == "demo" else _serve.run
            code = run(_serve_parser(arguments[0]), arguments[1:], os.environ, own_process=argv is None)
            if argv is None:  # the process is this command's alone
                _serve.leave(code)
            return code
        if arguments[:1] == ["load"]:
            return _load.run("load", arguments[1:], os.environ)
        if arguments[:1] == ["plan"]:
            return _load.run("plan", arguments[1:], os.environ)
        args = _parser(os.environ).parse_args(arguments)
        with _client(args) as client:
            command: Callable[[Namespace, Client], int] = args.command
            return command(args, client)
    except BrokenPipeError:
        # The reader of a pipe has gone, `rafaga models | head -1`; stdout is closed at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OTHER
    except (RafagaError, UsageError, OSError, UnicodeDecodeError) as error:
        complain(sentence(error))
        return exit_code(error)
    except KeyboardInterrupt:
        return 130  # as a shell reports SIGINT


def _print_on_any_terminal() -> None:
    """A terminal without UTF-8 shows ? in the place of characters that it lacks, such as µ."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser(environ: Mapping[str, str]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="rafaga",
        description="Serve verified ONNX models over gRPC, and send requests to a server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rafaga {metadata.version('rafaga')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Listed for --help only: their options need extras, and `main` handles them before parsing.
    commands.add_parser("demo", help="serve two small models that come with the package", add_help=False)
    commands.add_parser("serve", help="serve a model repository, one model or an ONNX file", add_help=False)
    commands.add_parser("load", help="load-test a server", add_help=False)
    commands.add_parser("plan", help="calculate how many replicas a request rate needs", add_help=False)
    connection = _connection(environ)

    models = commands.add_parser("models", parents=[connection], help="list the models of a server")
    models.set_defaults(command=_commands.models)

    classify = commands.add_parser("classify", parents=[connection, _model()], help="label images")
    classify.add_argument("files", nargs="+", metavar="FILE", help="a JPEG or PNG file")
    classify.add_argument("--top-k", type=_positive_int, default=5, metavar="K", help="labels per image (%(default)s)")
    classify.set_defaults(command=_commands.classify)

    features = commands.add_parser("features", parents=[connection, _model()], help="extract feature maps of an image")
    features.add_argument("file", metavar="FILE", help="a JPEG or PNG file")
    features.add_argument(
        "--output", type=output_file(".npz"), metavar="FILE.npz", help="write the maps there, under their names"
    )
    features.set_defaults(command=_commands.features)

    detect = commands.add_parser("detect", parents=[connection, _model()], help="find objects in images")
    detect.add_argument("files", nargs="+", metavar="FILE", help="a JPEG or PNG file")
    detect.add_argument(
        "--min-score", type=_share, default=0.5, metavar="S", help="from 0 to 1, lowest score to report (%(default)s)"
    )
    detect.add_argument("--max-objects", type=_positive_int, metavar="N", help="per image, the best ones (all)")
    detect.set_defaults(command=_commands.detect)

    segment = commands.add_parser("segment", parents=[connection, _model()], help="classify every pixel of an image")
    segment.add_argument("file", metavar="FILE", help="a JPEG or PNG file")
    segment.add_argument(
        "--output", type=output_file(".npy"), metavar="FILE.npy", help="write the classes there, uint8 [height, width]"
    )
    segment.set_defaults(command=_commands.segment)

    predict = commands.add_parser(
        "predict", parents=[connection, _model()], help="predict the next symbol of a sequence"
    )
    predict.add_argument(
        "symbols", nargs="+", metavar="SYMBOLS", help="BTBTX is a symbol per character; or one symbol per argument"
    )
    predict.add_argument("--top-k", type=_positive_int, default=5, metavar="K", help="symbols to give (%(default)s)")
    predict.set_defaults(command=_commands.predict)

    forecast = commands.add_parser("forecast", parents=[connection, _model()], help="forecast a time series")
    forecast.add_argument("file", nargs="?", default="-", metavar="FILE", help="CSV or one number per line; - is stdin")
    forecast.add_argument(
        "--horizon", type=_positive_int, metavar="STEPS", help="steps ahead (as many as the model gives)"
    )
    forecast.add_argument("--column", metavar="NAME", help="column of the CSV file, by name or number from 1")
    forecast.set_defaults(command=_commands.forecast)
    return parser


def _serve_parser(command: str) -> ArgumentParser:
    what = {"demo": "two small models that come with the package", "serve": "a repository, one model or an ONNX file"}
    return ArgumentParser(prog=f"rafaga {command}", description=f"Serves {what[command]} until Ctrl-C or SIGTERM.")


def _connection(environ: Mapping[str, str]) -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server",
        default=environ.get("RAFAGA_SERVER") or "localhost:50051",
        metavar="HOST:PORT",
        help="one or more, separated by commas, share the calls (environment RAFAGA_SERVER; now %(default)s)",
    )
    group.add_argument(
        "--timeout", type=_positive_s, default=10.0, metavar="SECONDS", help="deadline of a request (%(default)s)"
    )
    add_credentials(group)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    return parser


def _model() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--model", required=True, metavar="NAME", help="as `rafaga models` lists it")
    parser.add_argument(
        "--model-version",
        dest="version_of_model",
        type=_positive_int,
        default=0,
        metavar="N",
        help="version to use (the newest)",
    )
    return parser


def _client(args: Namespace) -> Client:
    try:
        given = credentials(args)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None
    try:
        return Client(args.server, timeout_s=args.timeout, token=given.token, tls=given.tls, priority=given.priority)
    except ValueError as error:
        raise UsageError(f"--server: {error}") from None


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer ≥ 1")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from 0 to 1")
    return value


def _positive_s(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a positive number of seconds")
    return value
