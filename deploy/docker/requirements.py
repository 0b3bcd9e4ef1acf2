"""Prints the requirements of rafaga's extras from pyproject.toml, one per line; `make hashes` locks them.

    python3 requirements.py EXTRA... [--replace NAME=REQUIREMENT]...

`--replace` takes another build of NAME or NAME-gpu: images for CPUs do not need ONNX Runtime's GPU build, which is ten
times as large. Runs without any package installed.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path


def requirements(project: Path, extras: Iterable[str], replaced: dict[str, str]) -> Iterator[str]:
    """Of the base and of `extras`. `replaced`: new requirements by the name that they replace."""
    about = tomllib.loads(project.read_text())["project"]
    wanted = list(about["dependencies"])
    for extra in extras:
        wanted += about["optional-dependencies"][extra]
    for requirement in wanted:
        if nested := re.fullmatch(r"rafaga\[(.+)\]", requirement):
            yield from requirements(project, nested[1].split(","), replaced)
        elif _name(requirement).removesuffix("-gpu") not in replaced:
            yield requirement
    yield from replaced.values()


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--project", type=Path, default=Path("pyproject.toml"))
    parser.add_argument("--replace", action="append", default=[], metavar="NAME=REQUIREMENT")
    options = parser.parse_args()
    replaced = dict(each.split("=", 1) for each in options.replace)
    print(*dict.fromkeys(requirements(options.project, options.extras, replaced)), sep="\n")


if __name__ == "__main__":
    main()
