"""Files that commands write: checked when the command line is read, not when the work is done."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """A type for argparse: a path that can be written, ending in one of `suffixes` if there are any."""

    def check(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a file name that ends in {' or '.join(suffixes)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: is a folder; expected a file name")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: the folder {str(path.parent)!r} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r}: no permission to write it")
        return path

    return check


def output_or_stdout(text: str) -> str:
    """A type for argparse: as `output_file`, or "-" for standard output."""
    return text if text == "-" else str(output_file()(text))
