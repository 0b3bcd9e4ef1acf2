"""`python -m bench`: measures part by part, keeps each as it ends, and writes the page from all that is kept."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from bench import goodput, large, machine, models, page, small, tail
from bench.plan import QUICK, Part, Plan, Section, Task
from bench.records import Block, Record, Records

SECTIONS: tuple[Section, ...] = (small.SECTION, tail.SECTION, large.SECTION, goodput.SECTION)
_QUICK_PARTS = "small,googlenet,overload"
_PAGE = Path("docs/benchmarks.md")
_RECORDS, _QUICK = Path("build/bench"), Path("build/bench-quick")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 when a part failed."""
    options = _parser().parse_args(arguments)
    plan = QUICK if options.quick else Plan(blocks=options.blocks)
    records = Records(_QUICK if options.quick else _RECORDS)
    to = _QUICK / _PAGE.name if options.quick else _PAGE
    failed = [] if options.render else _measure_all(_chosen(options), plan, options.repository, records)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page.rendered(_PAGE.read_text(), page.measured(records, SECTIONS)))
    print(f"written to {to}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def budget(plan: Plan, parts: Sequence[Part]) -> str:
    each = ", ".join(f"{part.name} {part.budget_s(plan) / 60:.1f}" for part in parts)
    return f"{sum(part.budget_s(plan) for part in parts) / 60:.0f} minutes ({each})"


def _parts() -> dict[str, tuple[Part, ...]]:
    """By what `--only` may say: sections and their parts."""
    return {section.name: section.parts for section in SECTIONS} | {
        part.name: (part,) for section in SECTIONS for part in section.parts
    }


def _parser() -> argparse.ArgumentParser:
    parts = [part for section in SECTIONS for part in section.parts]
    default = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__} By default it takes {budget(default, parts)}: {default.blocks} blocks of every window, "
        "on 2 cores that nobody else uses.",
    )
    names = ", ".join(_parts())
    parser.add_argument("--only", default="", metavar="PARTS", help=f"measure some anew, comma-separated: {names}")
    parser.add_argument(
        "--blocks", type=int, default=default.blocks, help="of every measurement (default: %(default)s)"
    )
    parser.add_argument("--render", action="store_true", help=f"measure nothing: write {_PAGE} from {_RECORDS}")
    parser.add_argument(
        "--quick", action="store_true", help=f"whether it works, in a minute: one block, page and records in {_QUICK}"
    )
    parser.add_argument("--repository", type=Path, default=Path("build/bench-repository"), help="default: %(default)s")
    return parser


def _chosen(options: argparse.Namespace) -> list[Part]:
    known = _parts()
    names = options.only or (_QUICK_PARTS if options.quick else ",".join(section.name for section in SECTIONS))
    if unknown := [name for name in names.split(",") if name not in known]:
        raise SystemExit(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return list(dict.fromkeys(part for name in names.split(",") for part in known[name]))


def _measure_all(parts: Sequence[Part], plan: Plan, repository: Path, records: Records) -> list[str]:
    """Gives the names of those that failed: the others are measured all the same."""
    models.export(repository)
    print(f"{len(parts)} parts, {plan.blocks} blocks each: about {budget(plan, parts)}", flush=True)
    failed = []
    for part in parts:
        start_s = time.monotonic()
        error = measure(part, plan, repository, records)
        print(f"{part.name}: {(time.monotonic() - start_s) / 60:.1f} minutes", flush=True)
        if error:
            failed.append(part.name)
    return failed


def measure(part: Part, plan: Plan, repository: Path, records: Records) -> str:
    """One part, kept block by block. Gives the error that ended it, or nothing."""
    blocks: list[Block] = []
    notes: list[str] = []
    started, on, error = datetime.now(UTC).isoformat(timespec="seconds"), machine.describe(), ""

    def keep(ended: bool) -> None:
        record = Record(part.name, started, on, plan.blocks, tuple(blocks), tuple(notes), error)
        records.keep(record, ended=ended)

    print(f"{part.name}:", flush=True)
    try:
        # Closed, so that an interrupted part ends its servers before anything else happens.
        with closing(part.measure(Task(repository, plan, notes.append))) as running:
            for block in running:
                blocks.append(block)
                keep(ended=False)
    except Exception as broken:
        error = f"{type(broken).__name__}: {broken}"
        print(f"{part.name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    keep(ended=not error)
    return error
