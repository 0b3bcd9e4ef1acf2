"""The command line: measures sections, writes one JSON file, prints tables."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench
from bench import engines, gpu, large, lone, machine, models, overload, sdk, small
from bench.blocks import Blocks, Plan, Section, interleaved

SECTIONS: dict[str, Section] = {
    "small": small,
    "large": large,
    "overload": overload,
    "lone": lone,
    "sdk": sdk,
    "engines": engines,
}
GPU: dict[str, Section] = {"gpu": gpu}  # only on request


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 if a section could not be measured to its end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["show"] and len(arguments) == 2:
        return show(Path(arguments[1]))
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = options.sections or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS | GPU):
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    plan = Plan(options.blocks, options.seconds, options.repository, options.device, options.baseline)
    if chosen != list(GPU):
        models.export(plan.repository, maps_and_objects="engines" in chosen)
    failed = [name for name in chosen if not measure(name, plan, options.output)]
    print(f"\n{options.output} has the raw figures" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{bench.__doc__}\n`python -m bench show FILE` prints the tables again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join([*SECTIONS, *GPU])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{names}; default: all but gpu")
    parser.add_argument("--blocks", type=int, default=5, help="measurements of every cell (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of one measurement (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"), help="default: %(default)s")
    parser.add_argument("--repository", type=Path, default=Path("build/bench-repository"), help="default: %(default)s")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this project, also measured in the section `small`",
    )
    parser.add_argument(
        "--device", default="cuda:0", help="device of the section `gpu`; cpu only tries it out (%(default)s)"
    )
    return parser


def measure(name: str, plan: Plan, output: Path) -> bool:
    """Whether every block was measured. Results are written after each block, so that no failure loses them."""
    section = (SECTIONS | GPU)[name]
    blocks: Blocks = []
    print(f"\n{name}: {plan.blocks} blocks", flush=True)
    try:
        with section.cells(plan) as cells:
            for block in interleaved(cells, plan.blocks):
                blocks.append(block)
                _save(output, name, blocks)
    except Exception:
        traceback.print_exc()
    if blocks:
        print(f"\n{_tables(name, json.loads(output.read_text())[name])}", flush=True)
    return len(blocks) == plan.blocks


def _save(output: Path, name: str, blocks: Blocks) -> None:
    """Replaces the section's results and keeps those of the others."""
    output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(output.read_text()) if output.exists() else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    results[name] = {"date": now, "machine": machine.facts(), "blocks": blocks}
    output.write_text(json.dumps(results, indent=1))


def _tables(name: str, result: dict[str, Any]) -> str:
    conditions = f"{result['date'][:10]}, blocks: {len(result['blocks'])}. {machine.sentence(result['machine'])}"
    return "\n\n".join([f"### {name}", conditions, *map(str, (SECTIONS | GPU)[name].tables(result["blocks"]))])


def show(file: Path) -> int:
    """Prints the tables of a results file as Markdown."""
    results = json.loads(file.read_text())
    print("\n\n".join(_tables(name, results[name]) for name in (*SECTIONS, *GPU) if name in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
