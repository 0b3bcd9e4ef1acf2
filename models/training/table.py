"""Series from a CSV file with a header: a column of values, and optionally one of timestamps, one of series' names, and
columns of covariates.

Rows are sorted by timestamp, and these must be equally spaced. Without timestamps, rows are taken in their order.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from models.training.data import Series
from rafaga.calendar import CALENDAR, calendar_feature, inferred
from rafaga.series import MAX_MISSING, is_missing, read_time

_MONTHS = {1: "month", 3: "quarter", 12: "year"}
_MILLISECONDS = {604_800_000: "week", 86_400_000: "day", 3_600_000: "hour", 60_000: "minute", 1000: "second", 1: "ms"}


class TableInvalid(Exception):
    """The file holds no usable series; the message names the line and what was expected."""


@dataclass(frozen=True)
class Row:
    line: int
    value: float
    time: datetime | None
    covariates: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """`series` float32 [T] each, NaN where missing, by id ("" where the file holds one), and `covariates` float32 [T,
    C] of each. `step`: time between two observations, and `frequency`, as pandas names it; empty: unknown.
    """

    series: Mapping[str, Series]
    covariates: Mapping[str, Series]
    step: str
    frequency: str


def read_table(
    path: Path, value: str, time: str | None = None, item: str | None = None, covariates: Sequence[str] = ()
) -> Table:
    """`covariates`: names of columns, and calendar features, which are computed from the timestamps. First
    and last rows without a value are left out: there is nothing to learn, or they are the future. Raises TableInvalid.
    """
    columns = [name for name in covariates if not name.startswith(CALENDAR)]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            needed = [name for name in (value, time, item) if name is not None]
            _require_columns(reader.fieldnames or (), [*needed, *columns])
            rows = list(_rows(reader, value, time, item, columns))
    except OSError as error:
        raise TableInvalid(f"{error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TableInvalid(f"not a CSV file in UTF-8 ({error})") from error
    if not rows:
        raise TableInvalid("the file has a header and no rows")
    items: dict[str, list[Row]] = {}
    for name, row in rows:
        items.setdefault(name, []).append(row)
    steps = {name: _sorted(found, name) if time is not None else "step" for name, found in items.items()}
    items = {name: _observed(found, value) for name, found in items.items()}
    if len(set(steps.values())) > 1:
        found = ", ".join(f"{name!r}: {step}" for name, step in list(steps.items())[:4])
        raise TableInvalid(f"series of one model need the same step; found {found}")
    step = next(iter(steps.values()))
    frequencies = {_frequency(found) for found in items.values()}
    return Table(
        series={name: np.array([row.value for row in found], dtype=np.float32) for name, found in items.items()},
        covariates={name: _covariates(found, covariates, columns) for name, found in items.items()},
        step=step,
        frequency=frequencies.pop() if len(frequencies) == 1 else "",
    )


def _covariates(rows: Sequence[Row], names: Sequence[str], columns: Sequence[str]) -> Series:
    """In the order of `names`. [T, C]"""
    given = np.array([row.covariates for row in rows], dtype=np.float32)
    found = [given[:, columns.index(name)] if name in columns else _of_calendar(name, rows) for name in names]
    return np.stack(found, axis=1) if found else np.zeros((len(rows), 0), np.float32)


def _of_calendar(name: str, rows: Sequence[Row]) -> Series:
    times = np.array([row.time for row in rows], dtype="datetime64[us]")
    if np.isnat(times).any():
        raise TableInvalid(f"covariate {name!r} follows from timestamps: name their column with --time")
    try:
        return calendar_feature(name, times)
    except ValueError as error:
        raise TableInvalid(str(error)) from None


def _require_columns(header: Sequence[str], names: Iterable[str]) -> None:
    for name in names:
        if name not in header:
            raise TableInvalid(f"no column {name!r}; the file has {', '.join(header) or 'no header'}")


def _rows(
    reader: csv.DictReader[str], value: str, time: str | None, item: str | None, covariates: Sequence[str]
) -> Iterator[tuple[str, Row]]:
    for cells in reader:
        line = reader.line_num
        text = cells[value] or ""
        number = math.nan if is_missing(text) else _number(text, value, line)
        beside = [_number(cells[column] or "", column, line) for column in covariates]
        moment = None if time is None else _moment(cells[time] or "", time, line)
        yield "" if item is None else cells[item] or "", Row(line, number, moment, tuple(beside))


def _observed(rows: list[Row], column: str) -> list[Row]:
    """From the first to the last value. Raises TableInvalid if too many are missing between them."""
    present = [place for place, row in enumerate(rows) if not math.isnan(row.value)]
    if not present:
        raise TableInvalid(f"line {rows[0].line}: column {column!r} has no values from here on")
    rows = rows[present[0] : present[-1] + 1]
    gaps, most = [row for row in rows if math.isnan(row.value)], int(MAX_MISSING * len(rows))
    if len(gaps) > most:
        raise TableInvalid(
            f"line {gaps[most].line}: column {column!r} is empty; expected at most {most} missing values "
            f"({MAX_MISSING:.0%}) of {len(rows)}, got {len(gaps)}"
        )
    return rows


def _number(text: str, column: str, line: int) -> float:
    if not text.strip():
        raise TableInvalid(f"line {line}: column {column!r} is empty; fill in missing values first")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # Larger numbers do not fit float32, in which models compute.
    if not abs(number) < 1e30:
        raise TableInvalid(f"line {line}: column {column!r} is {text!r}; expected a finite number")
    return number


def _moment(text: str, column: str, line: int) -> datetime:
    try:
        return read_time(text)
    except ValueError as error:
        raise TableInvalid(f"line {line}: column {column!r}: {error}") from None


def _sorted(rows: list[Row], name: str) -> str:
    """Sorts `rows` by time and returns their step. Raises TableInvalid for duplicates and gaps."""
    rows.sort(key=lambda row: row.time or datetime.min)
    times = [row.time for row in rows if row.time is not None]
    whose = f" of series {name!r}" if name else ""
    for before, after in pairwise(rows):
        if before.time == after.time:
            raise TableInvalid(
                f"line {after.line}: the timestamp {after.time}{whose} is also in line {before.line}; for a file of "
                f"several series name the column of their ids with --id"
            )
    if len(times) < 3:
        raise TableInvalid(f"{len(times)} rows{whose}: too few to find the time between them")
    months = [12 * time.year + time.month for time in times]
    if len({(time.day, time.time()) for time in times}) == 1 or all(_ends_month(time) for time in times):
        gaps, words = [after - before for before, after in pairwise(months)], _MONTHS
    else:
        gaps, words = [round(1000 * (after - before).total_seconds()) for before, after in pairwise(times)], {}
    step = Counter(gaps).most_common(1)[0][0]
    for gap, before, after in zip(gaps, rows, rows[1:], strict=False):
        if gap != step:
            raise TableInvalid(
                f"line {after.line}: {after.time}{whose} follows {before.time}; expected one row per "
                f"{_word(step, words)}: add the rows between them without a value, or leave out --time to take rows as "
                f"equally spaced"
            )
    return _word(step, words)


def _ends_month(time: datetime) -> bool:
    return (time + timedelta(days=1)).day == 1


def _word(step: int, months: Mapping[int, str]) -> str:
    if months:
        return months.get(step, f"{step} months")
    unit = next(unit for unit in _MILLISECONDS if step % unit == 0)  # the longest
    return _MILLISECONDS[unit] if step == unit else f"{step // unit} {_MILLISECONDS[unit]}s"


def _frequency(rows: Sequence[Row]) -> str:
    """As pandas names it; empty without times, or if it has no name."""
    times = np.array([row.time for row in rows if row.time is not None], dtype="datetime64[us]")
    found = inferred(times)
    return found.name if found else ""
