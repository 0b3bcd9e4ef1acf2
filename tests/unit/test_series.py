"""Histories from files of every reasonable form."""

from __future__ import annotations

from pathlib import Path

import pytest

from rafaga.series import SeriesError, read_series

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
    path = tmp_path / "digit.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with (
        path.open(encoding="utf-8") as file,
        pytest.raises(SeriesError, match="not text; expected"),
    ):
        read_series(file)
