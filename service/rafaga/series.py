"""Series from text: one number per line, or columns of a CSV file, for the command line, `rafaga load` and REST."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga import calendar

MAX_MISSING = 0.2
"""Share of the values that a forecaster reads."""

_MISSING = frozenset({"", "nan", "na", "n/a", "null", "none"})

Rows = Sequence[tuple[int, Sequence[str]]]
"""Cells, with the number of their line."""


class SeriesError(ValueError):
    """The text is not a history; the message names the line and what was expected."""


class TimeSeries(NamedTuple):
    """values: [T], NaN where missing. times: datetime64[us] [T], rising and evenly spaced; None without any.
    covariates: by name, [T + steps] each, with what the file knows of the future. id: "" where the file holds one.
    """

    values: list[float]
    times: calendar.Times | None
    covariates: Mapping[str, list[float]]
    id: str


def read_series(lines: Iterable[str], column: str | None = None) -> list[float]:
    """The named column, or the only one that holds numbers. Raises SeriesError naming the line that is wrong.

    A first line without a number is the header. Columns can also be named by number, from 1, where no header says
    otherwise.
    """
    header, body = _parsed(lines)
    index = _index(column, header, body[0][1])
    return [_number(row, index, line) for line, row in body]


def read_table(
    lines: Iterable[str],
    column: str | None = None,
    time: str | None = None,
    item: str | None = None,
    covariates: Sequence[str] = (),
) -> list[TimeSeries]:
    """Every series of a CSV file, whose values may be missing: empty cells, NaN, NA and null. Raises SeriesError.

    column: as for `read_series`. time: the column of timestamps; rows are sorted by them. item: the column of ids.
    With `covariates`, which are columns too, last rows without a value are the future.
    """
    header, body = _parsed(lines)
    first = body[0][1]
    times, items = (None if name is None else _index(name, header, first) for name in (time, item))
    known = {name: _index(name, header, first) for name in covariates}
    others = {times, items, *known.values()}
    sample = next((row for _, row in body if any(map(_is_number, _but(row, others)))), first)
    values = _index(column, header, sample, others)
    parts: dict[str, list[tuple[int, Sequence[str]]]] = {}
    for line, row in body:
        parts.setdefault("" if items is None else _cell(row, items), []).append((line, row))
    return [_one(name, rows, values, times, known) for name, rows in parts.items()]


def is_missing(cell: str) -> bool:
    return cell.strip().lower() in _MISSING


def interpolated(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """`values` [T] with NaN filled linearly between its neighbours, and at either end with the nearest value."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known) == len(values):
        return values
    filled: NDArray[np.floating] = np.interp(np.arange(len(values)), known, values[known]).astype(values.dtype)
    return filled


def read_time(text: str) -> datetime:
    """ISO 8601, a year, or a year and a month; in UTC if the text has a time zone. Raises ValueError."""
    stripped = text.strip()
    if short := re.fullmatch(r"(\d{4})(?:\.0)?(?:-(\d\d))?", stripped):
        stripped = f"{short[1]}-{short[2] or '01'}-01"
    try:
        found = datetime.fromisoformat(stripped)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time; expected one like 2024-05-31, 2024-05-31T14:00, 2024-05 or 2024"
        ) from None
    return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found


def _parsed(lines: Iterable[str]) -> tuple[list[str] | None, Rows]:
    """The header, and the rows that are not empty; at least one."""
    try:
        rows = list(enumerate(csv.reader(lines), start=1))
    except (UnicodeDecodeError, csv.Error):
        raise SeriesError("the file is not text; expected one number per line or a CSV file, in UTF-8") from None
    numbered = [(number, row) for number, row in rows if any(cell.strip() for cell in row)]
    if not numbered:
        raise SeriesError("the history is empty; expected one number per line or a CSV file")
    first = numbered[0][1]
    header = None if any(_is_number(cell) for cell in first) else [cell.strip() for cell in first]
    body = numbered[1:] if header else numbered
    if not body:
        raise SeriesError("the history has a header and no numbers")
    return header, body


def _one(name: str, rows: Rows, column: int, time: int | None, known: Mapping[str, int]) -> TimeSeries:
    whose = f" of {name!r}" if name else ""
    times = None
    if time is not None:
        moments = sorted((_time(row, time, line), line, row) for line, row in rows)
        rows = [(line, row) for _, line, row in moments]
        times = np.array([moment for moment, _, _ in moments], "datetime64[us]")
        _check_spacing(times, [line for line, _ in rows], whose)
    values = [float("nan") if is_missing(_cell(row, column)) else _number(row, column, line) for line, row in rows]
    if known:
        while values and values[-1] != values[-1]:
            values.pop()
    if all(value != value for value in values):
        raise SeriesError(f"the series{whose} has no values")
    covariates = {name: [_number(row, index, line) for line, row in rows] for name, index in known.items()}
    return TimeSeries(values, None if times is None else times[: len(values)], covariates, name)


def _check_spacing(times: calendar.Times, lines: Sequence[int], whose: str) -> None:
    steps = np.diff(times).astype(np.int64)
    if (steps == 0).any():
        at = int((steps == 0).argmax())
        raise SeriesError(
            f"line {lines[at + 1]}: the time {calendar.text(times[at])}{whose} is also in line {lines[at]}; for a file "
            "of several series name the column of their ids with --id"
        )
    if len(times) > 2 and calendar.inferred(times) is None:
        at = calendar.irregular(times)
        before, after = map(calendar.text, times[at - 1 : at + 1])
        raise SeriesError(
            f"line {lines[at]}: {after}{whose} follows {before}, but times must be evenly spaced: add the rows between "
            "them without a value, or leave out --time to take all rows as evenly spaced"
        )


def _index(column: str | None, header: list[str] | None, row: Sequence[str], others: Iterable[int | None] = ()) -> int:
    names = header or [str(i + 1) for i in range(len(row))]
    if column is not None:
        if column in names:
            return names.index(column)
        if column.isdecimal() and 1 <= int(column) <= len(row):
            return int(column) - 1
        raise SeriesError(f"no column {column!r}; the file has {', '.join(names)}")
    numeric = [i for i, cell in enumerate(row) if _is_number(cell) and i not in set(others)]
    if len(numeric) == 1:
        return numeric[0]
    raise SeriesError(
        f"choose a column with --column: {', '.join(names[i] for i in numeric if i < len(names))}"
        if numeric
        else "the history has no column of numbers"
    )


def _but(row: Sequence[str], others: Iterable[int | None]) -> list[str]:
    return [cell for i, cell in enumerate(row) if i not in set(others)]


def _cell(row: Sequence[str], index: int) -> str:
    return row[index].strip() if index < len(row) else ""


def _time(row: Sequence[str], index: int, line: int) -> datetime:
    try:
        return read_time(_cell(row, index))
    except ValueError as error:
        raise SeriesError(f"line {line}: {error}") from None


def _number(row: Sequence[str], index: int, line: int) -> float:
    cell = _cell(row, index)
    if not _is_number(cell):
        raise SeriesError(f"line {line}: {cell!r} is not a number")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
