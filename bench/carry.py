"""A file too large to be carried at once, in pieces: `split` here, `join` there; what was damaged between is found out.

    python -m bench.carry split FILE FOLDER [--megabytes 60]
    python -m bench.carry join FOLDER

Needs nothing but Python: `join` comes before anything else is installed. The sums are those of sha256sum, which reads
them too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

SUMS = "SHA256SUMS"
_BLOCK = 2**20
_LINE = re.compile(r"(?P<sum>[0-9a-f]{64})  (?P<name>[^/\\\x00-\x1f]+)")


class CarryError(Exception):
    """The pieces are not all there, or not what was sent."""


def split(file: Path, folder: Path, size: int) -> list[Path]:
    """Cuts `file` into pieces of at most `size` bytes; gives them. `folder` must be new or empty."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CarryError(f"{folder}: expected an empty folder, since what lies there would be joined too")
    pieces: list[Path] = []
    sums: list[str] = []
    with file.open("rb") as source:
        while piece := source.read(size):
            pieces.append(folder / f"{file.name}.{len(pieces):03}")
            pieces[-1].write_bytes(piece)
            sums.append(f"{hashlib.sha256(piece).hexdigest()}  {pieces[-1].name}\n")
    sums.append(f"{_sum(file)}  {file.name}\n")
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    return pieces


def join(folder: Path) -> Path:
    """The whole file, made in `folder` once every piece is there and right. Raises CarryError, naming which is not."""
    try:
        lines = [_LINE.fullmatch(line) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise CarryError(f"{folder / SUMS}: {os.strerror(error.errno or 0)}") from None
    if not lines or None in lines:
        raise CarryError(f"{folder / SUMS}: expected a SHA-256 and a name in every line")
    *pieces, (whole_sum, name) = [(line["sum"], line["name"]) for line in lines if line is not None]
    if missing := [piece for _, piece in pieces if not (folder / piece).is_file()]:
        raise CarryError(f"{folder} lacks {', '.join(missing)}")
    if damaged := [piece for expected, piece in pieces if _sum(folder / piece) != expected]:
        raise CarryError(f"{folder}: {', '.join(damaged)} changed on the way: carry it again")
    whole, growing = folder / name, folder / f"{name}.joining"
    with growing.open("wb") as target:
        for _, piece in pieces:
            target.write((folder / piece).read_bytes())
    if _sum(growing) != whole_sum:
        growing.unlink()
        raise CarryError(f"{folder}: the pieces do not make {name}: split it again")
    growing.replace(whole)
    return whole


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.carry", description=__doc__.partition("\n")[0])
    steps = parser.add_subparsers(dest="step", required=True)
    splitting = steps.add_parser("split", help="a file into pieces and their sums")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("folder", type=Path)
    splitting.add_argument("--megabytes", type=int, default=60, help="of the largest piece (default: %(default)s)")
    joining = steps.add_parser("join", help="the pieces into the file, where all sums are right")
    joining.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.step == "split":
            for piece in split(options.file, options.folder, options.megabytes * 10**6):
                print(piece)
        else:
            print(join(options.folder))
    except (CarryError, OSError) as error:
        print(f"bench.carry: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
