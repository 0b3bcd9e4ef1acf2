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
from bench.plan import Part, Section
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
    shown: dict[Part, Record] = {}
    for section in sections:
        kept = {part: record for part in section.parts if (record := records.best(part.name)) is not None}
        if kept:
            of_section = list(kept.values())
            found[section.name] = "\n".join([_notes(of_section), section.tables(of_section)])
            rows += section.verdicts(of_section)
            shown |= kept
    stopped = [record for s in sections for part in s.parts if (record := records.stopped(part.name)) is not None]
    if rows:
        rows.append(_generators(shown))
        found[VERDICTS] = table(HEAD, [row.cells() for row in rows])
    if shown or stopped:
        found[RUNS] = "\n".join([_runs(list(shown.values())), *map(_failure, stopped)])
    return found


def _generators(records: Mapping[Part, Record]) -> Verdict:
    """Of the open loops, where a client that is too busy sends late; the closed loops' figures stand beside them. The
    highest of each part counts."""
    judged = tuple(case for part, record in records.items() for case in _busiest(part, record, open_loop=True))
    others = [case for part, record in records.items() for case in _busiest(part, record, open_loop=False)]
    beside = ", ".join(f"{case.name} {case.middle:.2f}" for case in others)
    return Verdict("cores of the busiest load generator process, open loops", judged, "in {}", f"closed: {beside}")


def _busiest(part: Part, record: Record, *, open_loop: bool) -> list[Case]:
    """One, or none where the part has no such loop."""
    runs = [[run for run in block if (run.subject.load in part.open_loads) is open_loop] for block in record.blocks]
    highest = [max(run.sample.client_cores for run in block) for block in runs if block]
    return [Case.of(part.name, _CLIENT, highest, max(highest))] if highest else []


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
