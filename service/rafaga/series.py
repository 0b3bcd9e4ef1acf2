"""A history from text: one number per line, or a column of a CSV file. Used by `rafaga forecast` and `rafaga load`."""

from __future__ import annotations

import csv
from collections.abc import Iterable


class SeriesError(ValueError):
    """The text is not a history; the message names the line and what was expected."""


def read_series(lines: Iterable[str], column: str | None = None) -> list[float]:
    """The named column, or the only one that holds numbers. Raises SeriesError naming the line that is wrong.

    A first line without a number is the header. Columns can also be named by number, from 1, where no header says
    otherwise.
    """
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
    index = _index(column, header, body[0][1])
    return [_number(row, index, line) for line, row in body]


def _index(column: str | None, header: list[str] | None, row: list[str]) -> int:
    names = header or [str(i + 1) for i in range(len(row))]
    if column is not None:
        if column in names:
            return names.index(column)
        if column.isdecimal() and 1 <= int(column) <= len(row):
            return int(column) - 1
        raise SeriesError(f"no column {column!r}; the file has {', '.join(names)}")
    numeric = [i for i, cell in enumerate(row) if _is_number(cell)]
    if len(numeric) == 1:
        return numeric[0]
    raise SeriesError(
        f"choose a column with --column: {', '.join(names[i] for i in numeric if i < len(names))}"
        if numeric
        else "the history has no column of numbers"
    )


def _number(row: list[str], index: int, line: int) -> float:
    cell = row[index].strip() if index < len(row) else ""
    if not _is_number(cell):
        raise SeriesError(f"line {line}: {cell!r} is not a number")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
