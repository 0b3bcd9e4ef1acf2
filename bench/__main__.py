"""Runs every measurement and writes the tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench import machine, models
from bench.overload import overload
from bench.small import against_triton, lone_request
from bench.throughput import large_models
from rafaga.server.cores import available_cores


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--blocks", type=int, default=5, help="repetitions of every measurement (default: 5)")
    parser.add_argument("--only", default="small,lone,large,overload", help="of the parts (default: all)")
    parser.add_argument("--repository", type=Path, default=Path("build/bench-repository"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    repository, blocks, threads = options.repository, options.blocks, available_cores()
    parts: dict[str, Callable[[], str]] = {
        "small": lambda: against_triton(repository, blocks),
        "lone": lambda: lone_request(repository, blocks, 2.0),
        "large": lambda: large_models(repository, blocks, threads),
        "overload": lambda: overload(repository, blocks, threads),
    }
    models.export(repository)
    text = "\n".join(
        [
            "# Benchmarks\n",
            f"Written by `make bench`: median (lowest–highest) of {blocks} interleaved blocks. Client and server share "
            "the machine, so what the client takes the server lacks; every ratio is of figures with the same client.\n",
            machine.describe() + "\n",
            *(part() for name, part in parts.items() if name in options.only.split(",")),
        ]
    )
    options.output.write_text(text)
    print(f"\n{text}\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
