"""`python -m export`: the command line of everything that makes and proves bundles.

python -m export --list                       the catalogue
python -m export NAME... | --all              export, prove and publish
python -m export verify DIR...                prove published bundles again; needs no torch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

COMMANDS = ("verify",)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where everything asked for was done, 1 where something was not, 2 for a wrong command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _command(arguments)(arguments)
    except KeyboardInterrupt:
        return 130


def _command(arguments: Sequence[str]) -> Callable[[Sequence[str]], int]:
    # Each command is imported when it is asked for: `verify` must run where torch is not installed.
    if arguments[:1] == ["verify"]:
        return _verify
    return _export


def _verify(arguments: Sequence[str]) -> int:
    from export.show import show_verdicts
    from export.verify import find_bundles, verify_bundle

    parser = argparse.ArgumentParser("python -m export verify", description="Prove published bundles again, anywhere.")
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="DIR", help="a bundle, a model's folder, or a repository"
    )
    places = parser.parse_args(arguments[1:]).places
    folders = [folder for place in places for folder in find_bundles(place)]
    empty = [place for place in places if not find_bundles(place)]
    verdicts = [verdict for folder in folders for verdict in verify_bundle(folder)]
    show_verdicts(verdicts)
    for place in empty:
        print(f"{place}: no bundle here", file=sys.stderr)
    return 1 if empty or any(verdict.fault for verdict in verdicts) else 0


def _export(arguments: Sequence[str]) -> int:
    from export.command import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
