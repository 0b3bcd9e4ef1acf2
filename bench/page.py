"""docs/benchmarks.md: measured parts between markers, rendered anew from the records; what people wrote stays.

    <!-- measured: NAME -->
    …
    <!-- end of NAME -->

What was never measured keeps what it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from bench.cores import BUSY_CLIENT_CORES
from bench.plan import Section
from bench.records import Record, Records
from bench.tables import table
from bench.verdicts import HEAD, Aim, Case, Verdict

VERDICTS, RUNS = "verdicts", "runs"
_CLIENT = Aim(BUSY_CLIENT_CORES, at_least=False)


def rendered(page: str, measured: Mapping[str, str]) -> str:
    """The page with `measured` between the markers of these names. Raises ValueError where one has no markers."""
    for name, text in measured.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
        parts = re.split(rf"{re.escape(begin)}\n.*?{re.escape(end)}", page, flags=re.DOTALL)
        if len(parts) != 2:
            raise ValueError(f"expected {begin} … {end} once in the page, found it {len(parts) - 1} times")
        page = f"{begin}\n{text.strip()}\n{end}".join(parts)
    return page


def measured(records: Records, sections: Sequence[Section]) -> dict[str, str]:
    """Markdown by the name of the markers it belongs between."""
    found: dict[str, str] = {}
    rows: list[Verdict] = []
    shown: list[Record] = []
    for section in sections:
        of_section = [record for part in section.parts if (record := records.best(part.name)) is not None]
        if of_section:
            found[section.name] = "\n".join([_notes(of_section), section.tables(of_section)])
            rows += section.verdicts(of_section)
            shown += of_section
    stopped = [record for s in sections for part in s.parts if (record := records.stopped(part.name)) is not None]
    if rows:
        rows.append(_generators(shown))
        found[VERDICTS] = table(HEAD, [row.cells() for row in rows])
    if shown or stopped:
        found[RUNS] = "\n".join([_runs(shown), *map(_failure, stopped)])
    return found


def _generators(records: Iterable[Record]) -> Verdict:
    """The client that is too busy measures itself. The highest of each part counts."""
    highest = {
        record.part: [max(run.sample.client_cores for run in block) for block in record.blocks] for record in records
    }
    cases = tuple(Case.of(part, _CLIENT, blocks, max(blocks)) for part, blocks in highest.items())
    return Verdict("cores of the busiest load generator process", cases, "in {}")


def _notes(records: Iterable[Record]) -> str:
    """Each once, with an empty line behind."""
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    return " ".join(notes) + "\n" if notes else ""


def _runs(records: Sequence[Record]) -> str:
    """Which part ran when, on what machine."""
    by_machine: dict[str, list[str]] = {}
    for record in records:
        blocks = f"{len(record.blocks)} blocks"
        by_machine.setdefault(record.machine, []).append(f"{record.part} ({record.started[:10]}, {blocks})")
    return "\n".join(f"{', '.join(parts)}: {machine}\n" for machine, parts in by_machine.items())


def _failure(record: Record) -> str:
    done = f"after {len(record.blocks)} of {record.wanted} blocks"
    cause = " ".join(record.error.split())[:300] or "it was ended"
    return f"**The last run of {record.part}**, of {record.started[:16]} UTC, **stopped** {done}: {cause}\n"
