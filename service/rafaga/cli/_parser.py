"""The command line of `rafaga` as an argparse parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rafaga.addresses import HTTP_PORT
from rafaga.cli import _backtest, _forecast, _images, _infer, _models, _predict, _top
from rafaga.cli._errors import ExitCode
from rafaga.options import Parser, add_credentials, add_server, number, output_file, positive, whole

_EPILOG = f"""Each command explains itself: rafaga COMMAND --help

exit codes:
  {ExitCode.OK}    success
  {ExitCode.OTHER}    the server or a model failed, or something is not installed
  {ExitCode.USAGE}    the command line, or a file it names, is wrong
  {ExitCode.UNAVAILABLE}    refused, unreachable or too late: try again later
  {ExitCode.INVALID}    the request is invalid: an unknown model, not an image, …
  130  interrupted by Ctrl-C
"""

# Commands that parse their own arguments, most because these need extras. They are listed for --help.
SEPARATE = {
    "demo": "serve two small models that come with the package",
    "serve": "serve a model repository, one model or an ONNX file",
    "load": "load-test a server",
    "plan": "calculate how many replicas a request rate needs",
    "completion": "print a completion script for a shell",
}

_SHARE = number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
_IMAGES = "Images: files, folders, quoted patterns such as 'photos/*.jpg', - for stdin."


def parser(environ: Mapping[str, str], separate: Mapping[str, Parser] | None = None) -> Parser:
    """separate: the parsers of SEPARATE, as far as they are installed; only completion needs them."""
    rafaga = Parser(
        prog="rafaga",
        description="Serve verified ONNX models over gRPC and HTTP, and send requests to a server.",
        usage="rafaga COMMAND [OPTIONS]",
        examples=("rafaga demo", "rafaga models", "rafaga classify digit.png"),
        epilog=_EPILOG,
    )
    rafaga.add_argument("--version", action="version", version=f"rafaga {metadata.version('rafaga')}")
    commands = _Commands(
        rafaga.add_subparsers(title="commands", metavar="COMMAND", prog="rafaga", required=True), environ
    )
    for name in ("demo", "serve"):
        commands.listed(name, separate)
    for add in (_add_models, _add_classify, _add_detect, _add_segment, _add_features):
        add(commands)
    for add in (_add_forecast, _add_backtest, _add_predict, _add_infer, _add_top):
        add(commands)
    for name in ("load", "plan", "completion"):
        commands.listed(name, separate)
    return rafaga


class _Commands:
    """The subcommands, and the options that several of them share."""

    def __init__(self, subparsers: argparse._SubParsersAction[Any], environ: Mapping[str, str]) -> None:
        self._subparsers = subparsers
        self._environ = environ

    def listed(self, name: str, separate: Mapping[str, Parser] | None) -> None:
        parents = [separate[name]] if separate and name in separate else []
        self._subparsers.add_parser(name, help=SEPARATE[name], add_help=False, parents=parents)

    def add(
        self, name: str, run: Callable[..., int], usage: str, text: str, more: str = "", *, examples: Sequence[str]
    ) -> Parser:
        """text: what it does, for the list of commands; more: a line for its own help."""
        command: Parser = self._subparsers.add_parser(
            name,
            help=text,
            usage=f"rafaga {name} {usage}",
            description=f"{text[0].upper()}{text[1:]}.\n{more}",
            examples=[f"rafaga {name} {example}".rstrip() for example in examples],
        )
        command.set_defaults(run=run)
        return command

    def add_common(self, to: Parser) -> argparse._ArgumentGroup:
        """What every command that asks a server has. Returns the group of output options."""
        output = to.add_argument_group("output")
        output.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
        connection = to.add_argument_group("connection")
        add_server(connection, self._environ)
        connection.add_argument(
            "--timeout", type=positive, default=10.0, metavar="SECONDS", help="deadline of a request (%(default)g)"
        )
        add_credentials(connection)
        return output


def _add_models(commands: _Commands) -> None:
    command = commands.add(
        "models",
        _models.models,
        "[NAME] [OPTIONS]",
        "list the models of a server, or describe one",
        "Exit code 1 if one has failed.",
        examples=["", "lenet5-mnist", "--server gpu1:50051 --json"],
    )
    model = command.add_argument_group("model")
    model.add_argument("name", nargs="?", metavar="NAME", help="describe this one (list all)")
    _add_version(model)
    commands.add_common(command)


def _add_classify(commands: _Commands) -> None:
    command = commands.add(
        "classify",
        _images.classify,
        "IMAGE... [OPTIONS]",
        "label images",
        _IMAGES,
        examples=["digit.png", "photos/ --model resnet50 --top-k 1", "- --json < digit.png"],
    )
    _add_images(command)
    model = _add_model(command)
    model.add_argument("--top-k", type=whole, metavar="K", help="per image, the best (5; all with --min-probability)")
    model.add_argument(
        "--min-probability", type=_SHARE, default=0.0, metavar="P", help="lowest probability, 0 to 1 (0)"
    )
    commands.add_common(command)


def _add_detect(commands: _Commands) -> None:
    command = commands.add(
        "detect",
        _images.detect,
        "IMAGE... [OPTIONS]",
        "find objects in images",
        _IMAGES,
        examples=["street.jpg --draw found.png", "'photos/*.jpg' --min-score 0.7 --draw drawn/"],
    )
    _add_images(command)
    model = _add_model(command)
    model.add_argument("--min-score", type=_SHARE, default=0.5, metavar="S", help="lowest score, 0 to 1 (%(default)s)")
    model.add_argument("--max-objects", type=whole, metavar="N", help="per image, the best ones (all)")
    _add_draw(commands.add_common(command), "the boxes and labels")


def _add_segment(commands: _Commands) -> None:
    command = commands.add(
        "segment",
        _images.segment,
        "IMAGE... [OPTIONS]",
        "classify every pixel of images",
        _IMAGES,
        examples=["street.jpg --draw classes.png", "street.jpg --output classes.npy"],
    )
    _add_images(command)
    _add_model(command)
    output = commands.add_common(command)
    _add_draw(output, "the classes in colours")
    _add_output(output, ".npy", "the classes, uint8 [height, width]")


def _add_features(commands: _Commands) -> None:
    command = commands.add(
        "features",
        _images.features,
        "IMAGE... [OPTIONS]",
        "extract feature maps of images",
        _IMAGES,
        examples=["photo.jpg --model resnet50-features --output maps.npz"],
    )
    _add_images(command)
    _add_model(command)
    _add_output(commands.add_common(command), ".npz", "the maps, by name")


def _add_forecast(commands: _Commands) -> None:
    command = commands.add(
        "forecast",
        _forecast.forecast,
        "[FILE] [OPTIONS]",
        "forecast time series",
        "The file is CSV, or has one number per line: evenly spaced, oldest first. Empty cells are missing values.",
        examples=["co2.csv --horizon 12", "co2.csv --time month --plot co2.png", "--json < co2.csv"],
    )
    series = command.add_argument_group("input")
    series.add_argument("file", nargs="?", default="-", metavar="FILE", help="the series (standard input)")
    _add_columns(series)
    model = _add_model(command)
    model.add_argument("--horizon", type=whole, metavar="STEPS", help="steps ahead (as many as the model gives)")
    model.add_argument(
        "--quantiles", type=_levels, metavar="Q,...", help="levels, such as 0.1,0.5,0.9 (those that the model gives)"
    )
    model.add_argument(
        "--check", type=whole, metavar="N", help="find anomalies: compare the last N values with their forecasts"
    )
    output = commands.add_common(command)
    _add_plot(output, "the histories and their forecasts")


def _add_backtest(commands: _Commands) -> None:
    command = commands.add(
        "backtest",
        _backtest.backtest,
        "FILE [OPTIONS]",
        "measure forecasts of the last fifth of time series",
        "Compares forecasts from many origins with the truth, and with simple statistics.",
        examples=["co2.csv --time month", "co2.csv --origins 50 --plot backtest.png"],
    )
    series = command.add_argument_group("input")
    series.add_argument("file", metavar="FILE", help="the series, as `rafaga forecast` reads it")
    _add_columns(series)
    model = _add_model(command)
    model.add_argument("--horizon", type=whole, metavar="STEPS", help="steps ahead (as many as the model gives)")
    model.add_argument(
        "--origins", type=whole, default=100, metavar="N", help="forecasts to measure, at most (%(default)s)"
    )
    output = commands.add_common(command)
    _add_plot(output, "some of the forecasts, and the error of each step")


def _add_columns(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--column", metavar="NAME", help="column of the values, by name or number from 1")
    group.add_argument("--time", metavar="NAME", help="column of timestamps, by which rows are sorted")
    group.add_argument("--id", metavar="NAME", help="column that says which series a row belongs to")


def _add_plot(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument("--plot", type=output_file(".png", ".svg"), metavar="FILE", help=f"draw {what} (PNG, SVG)")


def _levels(text: str) -> tuple[float, ...]:
    level = number(lambda value: 0 < value < 1, "numbers between 0 and 1, separated by commas")
    return tuple(sorted({level(part) for part in text.split(",")}))


def _add_predict(commands: _Commands) -> None:
    command = commands.add(
        "predict",
        _predict.predict,
        "SYMBOLS... [OPTIONS]",
        "predict the next symbol of a sequence",
        examples=["BTBTXS", "B T B T X S --top-k 2"],
    )
    command.add_argument_group("input").add_argument(
        "symbols", nargs="+", metavar="SYMBOLS", help="one word with a symbol per character, or one symbol per word"
    )
    _add_model(command).add_argument(
        "--top-k", type=whole, default=5, metavar="K", help="symbols to give (%(default)s)"
    )
    commands.add_common(command)


def _add_infer(commands: _Commands) -> None:
    command = commands.add(
        "infer",
        _infer.infer,
        "MODEL --input NAME=VALUE... [OPTIONS]",
        "send tensors to any model, such as a plain ONNX file",
        "`rafaga models MODEL` lists its inputs and outputs.",
        examples=[
            "iris --input x=5.1,3.5,1.4,0.2",
            "iris --input x=@flowers.npy --output answers.npz",
            "sum --input 'a=[[1,2],[3,4]]' --input b=@b.npy --json",
        ],
    )
    model = command.add_argument_group("model")
    model.add_argument("model", metavar="MODEL", help="as `rafaga models` lists it")
    _add_version(model)
    command.add_argument_group("input").add_argument(
        "--input",
        action="append",
        required=True,
        metavar="NAME=VALUE",
        help="1,2,3 or [[1,2],[3,4]] or @FILE.npy; once for each input; of a model with one input, NAME= may be left "
        "out",
    )
    _add_output(commands.add_common(command), ".npz", "the outputs, by name", or_folder=False)


def _add_top(commands: _Commands) -> None:
    command = commands.add(
        "top",
        _top.top,
        "[ADDRESS] [OPTIONS]",
        "watch the load of a server",
        "Shows rates, latencies, batches, queues and errors of each model. Ctrl-C ends.",
        examples=["", "gpu1:8080", "--once --interval 10"],
    )
    server = command.add_argument_group("server")
    server.add_argument(
        "address",
        nargs="?",
        default=f"localhost:{HTTP_PORT}",
        metavar="ADDRESS",
        help="of the HTTP port: HOST, HOST:PORT or a URL (%(default)s)",
    )
    server.add_argument("--tls-ca", type=Path, metavar="FILE", help="for https://, trust these root certificates (PEM)")
    output = command.add_argument_group("output")
    output.add_argument(
        "--interval", type=positive, default=1.0, metavar="SECONDS", help="of a measurement (%(default)g)"
    )
    output.add_argument("--once", action="store_true", help="print one measurement and end; the default in a pipe")
    output.add_argument("--json", action="store_true", help="print one measurement as a JSON document")


def _add_images(to: Parser) -> None:
    to.add_argument_group("input").add_argument(
        "images", nargs="+", metavar="IMAGE", help="image file (JPEG, PNG, WebP, GIF, BMP), folder, pattern, or -"
    )


def _add_model(to: Parser) -> argparse._ArgumentGroup:
    group = to.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="as `rafaga models` lists it (the only one that fits)")
    _add_version(group)
    return group


def _add_version(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model-version", type=whole, metavar="N", help="version to use (the newest)")


def _add_draw(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--draw",
        type=output_file(".png", ".jpg", ".jpeg", or_folder=True),
        metavar="FILE|DIR",
        help=f"draw {what} on the image (PNG, JPEG); several images need a folder",
    )


def _add_output(group: argparse._ArgumentGroup, suffix: str, what: str, or_folder: bool = True) -> None:
    group.add_argument(
        "--output",
        type=output_file(suffix, or_folder=or_folder),
        metavar=f"FILE{suffix}" + ("|DIR" if or_folder else ""),
        help=f"write {what}" + ("; several images need a folder" if or_folder else ""),
    )
