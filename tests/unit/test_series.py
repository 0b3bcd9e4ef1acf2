"""Histories from files of every reasonable form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rafaga.series import SeriesError, TimeSeries, read_series, read_table

CO2 = ["date,ppm,adjusted\n", "1958-03,315.7,314.4\n", "1958-04,317.5,315.2\n"]


@pytest.mark.parametrize(
    ("lines", "column", "values"),
    [
        (["1\n", "2.5\n", "\n", "-3e2\n"], None, [1, 2.5, -300]),
        (["ppm\n", "1\n", "2\n"], None, [1, 2]),
        (["date,ppm\n", "1958-03,315.7\n"], None, [315.7]),
        (["1958-03,315.7\n", "1958-04,317.5\n"], None, [315.7, 317.5]),
        (CO2, "adjusted", [314.4, 315.2]),
        (CO2, "ppm", [315.7, 317.5]),
        (CO2, "2", [315.7, 317.5]),
        (["2,1\n", "3,4\n"], "1", [2, 3]),
        (["1,2\n", "3,4\n"], "2", [2, 4]),
    ],
)
def test_valid_files(lines: list[str], column: str | None, values: list[float]) -> None:
    assert read_series(lines, column) == values


@pytest.mark.parametrize(
    ("lines", "column", "message"),
    [
        ([], None, "empty"),
        (["\n", " \n"], None, "empty"),
        (["ppm\n"], None, "no numbers"),
        (CO2, None, "choose a column.*ppm, adjusted"),
        (CO2, "co2", "no column 'co2'; the file has date, ppm, adjusted"),
        (["a,b\n", "x,y\n"], None, "no column of numbers"),
        (["1\n", "two\n"], None, "line 2: 'two' is not a number"),
        (["date,ppm\n", "a,1\n", "\n", "b,\n"], None, "line 4: '' is not a number"),
        (["date,ppm\n", "a,1\n", "b\n"], None, "line 3"),
    ],
)
def test_invalid_files(lines: list[str], column: str | None, message: str) -> None:
    with pytest.raises(SeriesError, match=message):
        read_series(lines, column)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "digit.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with (
        (tmp_path / "digit.png").open(encoding="utf-8") as file,
        pytest.raises(SeriesError, match="not text; expected"),
    ):
        read_series(file)


SALES = [
    "shop,month,price,sold\n",
    "b,2024-02,2,\n",
    "a,2024-01,1,10\n",
    "b,2024-01,2,20\n",
    "a,2024-02,1,11\n",
    "a,2024-03,1.5,\n",
    "b,2024-03,2,NA\n",
    "b,2024-04,2,23\n",
]


def shown(series: TimeSeries) -> tuple[object, ...]:
    """With None for missing values, and months."""
    times = None if series.times is None else series.times.astype("datetime64[M]").astype(str).tolist()
    return series.id, [None if np.isnan(value) else value for value in series.values], times, dict(series.covariates)


def test_tables_of_several_series_are_sorted_by_time() -> None:
    """Missing values stay, at the end too. With covariates, last rows without a value are their future."""
    months = ["2024-01", "2024-02", "2024-03", "2024-04"]
    b, a = map(shown, read_table(SALES, "sold", "month", "shop"))
    assert b == ("b", [20, None, None, 23], months, {})
    assert a == ("a", [10, 11, None], months[:3], {})
    b, a = map(shown, read_table(SALES, "sold", "month", "shop", ["price"]))
    assert b == ("b", [20, None, None, 23], months, {"price": [2, 2, 2, 2]})
    assert a == ("a", [10, 11], months[:2], {"price": [1, 1, 1.5]})


@pytest.mark.parametrize(
    ("lines", "columns", "expected"),
    [
        (["1\n", "2\n"], {}, ("", [1, 2], None, {})),
        (["year,x\n", "1950,1\n", "1951,2\n"], {"time": "year"}, ("", [1, 2], ["1950-01", "1951-01"], {})),
        (["x\n", "null\n", "2\n"], {}, ("", [None, 2], None, {})),
        (["x,y\n", ",a\n", "2,b\n"], {}, ("", [None, 2], None, {})),
    ],
)
def test_tables_of_one_series(lines: list[str], columns: dict[str, str], expected: tuple[object, ...]) -> None:
    (found,) = read_table(lines, **columns)
    assert shown(found) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["t,x\n", "2024-01,1\n", "2024-02,2\n", "2024-01,3\n"], "line 4: the time 2024-01-01 is also in line 2; for"),
        (["t,x\n", "2024-01,1\n", "2024-02,2\n", "2024-05,3\n"], "line 4: 2024-05-01 follows 2024-02-01, but times"),
        (["t,x\n", "2024-01,1\n", "soon,2\n"], "line 3: 'soon' is not a time; expected one like 2024-05-31"),
        (["t,x\n", "2024-01,1\n", "2024-02,one\n"], "line 3: 'one' is not a number"),
        (["t,x,y\n", "2024-01,1,2\n"], "choose a column with --column: x, y"),
        (["t,x,y\n", "2024-01,,NA\n"], "no column of numbers"),
    ],
)
def test_invalid_tables(lines: list[str], message: str) -> None:
    with pytest.raises(SeriesError, match=message):
        read_table(lines, time="t")


def test_a_series_without_values() -> None:
    with pytest.raises(SeriesError, match="the series of 'b' has no values"):
        read_table(["id,x\n", "a,1\n", "b,\n"], "x", item="id")
