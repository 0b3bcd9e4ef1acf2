"""What all commands share, those of `load` and `plan` too: the parser, options, and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import textwrap
from argparse import Action, ArgumentError, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from rafaga.addresses import GRPC_PORT
from rafaga.client import Tls
from rafaga.priority import Priority

E = TypeVar("E", bound=StrEnum)

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})


class Parser(ArgumentParser):
    """Reports wrong usage in one line, with the nearest known word for one that is unknown. Abbreviated options are
    unknown: a new option must not change what a script means."""

    def __init__(self, *, examples: Sequence[str] = (), epilog: str = "", **options: Any) -> None:
        if examples:
            title = "examples:" if len(examples) > 1 else "example:"
            epilog = "\n  ".join([title, *examples]) + ("\n\n" + epilog if epilog else "")
        super().__init__(allow_abbrev=False, epilog=epilog, formatter_class=_Formatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Called for each subcommand's parser too: the error then comes from the one that lacks the option.
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            what = "option" if word.startswith("-") else "argument"
            self.error(f"unknown {what} {word}{did_you_mean(word, self._option_string_actions)}")
        return known, unknown

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            raise ArgumentError(None, f"unknown command {value!r}{did_you_mean(str(value), known)}")
        raise ArgumentError(action, _unknown_choice(str(value), known))

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").replace("the following arguments are required:", "missing")
        self.exit(2, f"{self.prog}: {text}; see {self.prog} --help\n")


class _Formatter(argparse.HelpFormatter):
    """Wraps each line of a description or an epilog by itself, and leaves indented ones as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 14  # argparse ignores that subcommands are indented twice

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line if line.startswith(" ") else textwrap.fill(line, width) for line in text.strip().splitlines()
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'detect'?", or nothing if no known word is near."""
    words = [str(each) for each in known]  # members of enumerations have a longer repr
    within = [each for each in words if len(word) > 2 and word in each]
    near = difflib.get_close_matches(word, words, n=1) or within[:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown_choice(word: str, known: Sequence[str]) -> str:
    return f"{word!r} is not one of {', '.join(known)}{did_you_mean(word, known)}"


def one_of(kind: type[E]) -> Callable[[str], E]:
    """A type for argparse: a member of an enumeration."""

    def read(text: str) -> E:
        try:
            return kind(text)
        except ValueError:
            raise ArgumentTypeError(_unknown_choice(text, list(kind))) from None

    return read


def number(allowed: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A type for argparse: a finite number."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise ArgumentTypeError(f"{text!r}: must be {expected}")
        return value

    return convert


positive = number(lambda value: value > 0, "a positive number")


def whole(text: str) -> int:
    """A type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: must be an integer ≥ 1")
    return int(text)


class Credentials(NamedTuple):
    token: str | None
    tls: Tls | None
    priority: Priority


def add_server(group: argparse._ArgumentGroup, environ: Mapping[str, str]) -> None:
    group.add_argument(
        "--server",
        default=environ.get("RAFAGA_SERVER") or f"localhost:{GRPC_PORT}",
        metavar="HOST[:PORT]",
        help="one or more, separated by commas, share the calls; https:// for TLS (environment RAFAGA_SERVER; "
        "now %(default)s)",
    )


def add_credentials(group: argparse._ArgumentGroup) -> None:
    """What `credentials` reads."""
    known = [priority.word for priority in Priority]
    group.add_argument(
        "--priority",
        choices=known,
        default=Priority.NORMAL.word,
        metavar="|".join(known),
        help="priority of the requests (%(default)s)",
    )
    group.add_argument("--token-file", type=Path, metavar="FILE", help="file with the bearer token")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="use TLS, trusting these root certificates (PEM)")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="mTLS: the key of this client (PEM)")
    group.add_argument("--tls-certificate", type=Path, metavar="FILE", help="mTLS: the certificate of this client")


def credentials(args: argparse.Namespace) -> Credentials:
    """Raises ArgumentTypeError for options that do not go together, OSError for a file that cannot be read, and
    UnicodeDecodeError for a token that is not text."""
    token = args.token_file.read_text(encoding="utf-8").strip() if args.token_file else None
    if token == "":
        raise ArgumentTypeError(f"--token-file {args.token_file}: the file is empty; expected a bearer token")
    if bool(args.tls_key) != bool(args.tls_certificate):
        raise ArgumentTypeError("--tls-key and --tls-certificate go together")
    files = (args.tls_ca, args.tls_key, args.tls_certificate)
    return Credentials(token, Tls.from_files(*files) if any(files) else None, Priority.of(args.priority))


def files_in(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Every file in `folder` and below that ends in one of `suffixes`, of any case, by path."""
    known = set(suffixes)
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in known and file.is_file()]


def output_file(*suffixes: str, or_folder: bool = False) -> Callable[[str], Path]:
    """A type for argparse: a path that can be written, ending in one of `suffixes` if there are any, or with
    `or_folder` an existing folder. Checked when the command line is read, not when the work is done."""

    def check(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            if not or_folder:
                raise ArgumentTypeError(f"{text!r}: is a folder; expected a file name")
        elif suffixes and path.suffix.lower() not in suffixes:
            raise ArgumentTypeError(f"{text!r}: expected a file name that ends in {' or '.join(suffixes)}")
        if not path.parent.is_dir():
            raise ArgumentTypeError(f"{text!r}: the folder {str(path.parent)!r} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ArgumentTypeError(f"{text!r}: no permission to write it")
        return path

    return check


def output_or_stdout(text: str) -> str:
    """A type for argparse: as `output_file`, or "-" for standard output."""
    return text if text == "-" else str(output_file()(text))
