"""Command-line options that several commands share: who calls, and which files they write."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rafaga.client import Tls
from rafaga.priority import Priority


class Credentials(NamedTuple):
    token: str | None
    tls: Tls | None
    priority: Priority


def add_credentials(group: argparse._ArgumentGroup) -> None:
    """What `credentials` reads."""
    known = [priority.word for priority in Priority]
    group.add_argument(
        "--priority", choices=known, default=Priority.NORMAL.word, help="priority of the requests (%(default)s)"
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


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """A type for argparse: a path that can be written, ending in one of `suffixes` if there are any. Checked when the
    command line is read, not when the work is done."""

    def check(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise ArgumentTypeError(f"{text!r}: expected a file name that ends in {' or '.join(suffixes)}")
        if path.is_dir():
            raise ArgumentTypeError(f"{text!r}: is a folder; expected a file name")
        if not path.parent.is_dir():
            raise ArgumentTypeError(f"{text!r}: the folder {str(path.parent)!r} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ArgumentTypeError(f"{text!r}: no permission to write it")
        return path

    return check


def output_or_stdout(text: str) -> str:
    """A type for argparse: as `output_file`, or "-" for standard output."""
    return text if text == "-" else str(output_file()(text))
