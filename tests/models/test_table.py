"""Series from CSV files: what is read, and how a bad file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.training.season import find_season
from models.training.table import TableInvalid, read_table


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("times", "step", "frequency"),
    [
        (("2024-01", "2024-02", "2024-03"), "month", "MS"),
        (("2024-01-31", "2024-02-29", "2024-03-31"), "month", "ME"),
        (("2024-01-15", "2024-02-15", "2024-03-15"), "month", ""),
        (("2024-01", "2024-03", "2024-05"), "2 months", "2MS"),
        (("1700.0", "1701.0", "1702.0"), "year", "YS-JAN"),
        (("2023-10-01", "2024-01-01", "2024-04-01"), "quarter", "QS-OCT"),
        (("2024-02-28", "2024-02-29", "2024-03-01"), "day", "D"),
        (("2024-01-01", "2024-01-15", "2024-01-29"), "2 weeks", "2W-MON"),
        (("2024-03-31T00:00+01:00", "2024-03-31T01:00+01:00", "2024-03-31T03:00+02:00"), "hour", "h"),
        (("2024-01-01T00:15", "2024-01-01T00:00", "2024-01-01T00:30"), "15 minutes", "15min"),
    ],
)
def test_the_step_is_read_from_the_timestamps(
    times: tuple[str, ...], step: str, frequency: str, tmp_path: Path
) -> None:
    rows = "".join(f"{time},{number}\n" for number, time in enumerate(times))
    found = read_table(table(tmp_path, "t,x\n" + rows), "x", "t")
    assert (found.step, found.frequency) == (step, frequency)
    assert found.series[""].tolist() == [number for number, _ in sorted(enumerate(times), key=lambda pair: pair[1])]


def test_covariates_are_columns_and_features_of_the_timestamps(tmp_path: Path) -> None:
    text = "t,x,price,open\n2024-02,2,20,0\n2024-01,1,10,1\n2024-03,3,30,1\n2024-04,,40,1\n"
    names = ("price", "calendar.month.sin", "open")
    read = read_table(table(tmp_path, text), "x", "t", covariates=names)
    assert read.series[""].tolist() == [1, 2, 3], "the last row is the future"
    expected = np.array([[10.0, 0.0, 1.0], [20.0, 0.5, 0.0], [30.0, 0.866025, 1.0]])
    np.testing.assert_allclose(read.covariates[""], expected, atol=1e-6)
    assert read_table(table(tmp_path, text.replace(",,", ",4,")), "x", "t").covariates[""].shape == (4, 0)
    for covariate, time, message in (
        ("prize", "t", "no column 'prize'"),
        ("calendar.month", None, "name their column with --time"),
        ("calendar.moon", "t", "no calendar feature 'calendar.moon'"),
    ):
        with pytest.raises(TableInvalid, match=message):
            read_table(tmp_path / "table.csv", "x", time, covariates=[covariate])
    with pytest.raises(TableInvalid, match="line 3: column 'price' is empty"):
        read_table(table(tmp_path, "t,x,price\n2024-01,1,1\n2024-02,1,\n"), "x", "t", covariates=["price"])


def test_missing_values_between_others_are_kept(tmp_path: Path) -> None:
    rows = "".join(f"{2000 + i},{value}\n" for i, value in enumerate(["", "1", "2", "NA", "4", "5", "nan", ""]))
    found = read_table(table(tmp_path, "t,x\n" + rows), "x", "t")
    np.testing.assert_array_equal(found.series[""], np.array([1, 2, np.nan, 4, 5], np.float32))
    assert found.covariates[""].shape == (5, 0)


def test_series_of_one_file_are_distinguished_by_their_ids(tmp_path: Path) -> None:
    text = "shop,t,x\na,2024,1\nb,2024,10\na,2026,3\na,2025,2\nb,2025,20\nb,2026,30\n"
    found = read_table(table(tmp_path, text), "x", "t", "shop")
    assert {name: series.tolist() for name, series in found.series.items()} == {"a": [1, 2, 3], "b": [10, 20, 30]}
    plain = read_table(table(tmp_path, text), "x")
    assert (plain.step, plain.series[""].tolist()) == ("step", [1, 10, 3, 2, 20, 30])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t,y\n2024,1\n", "no column 'x'; the file has t, y"),
        ("", "no column 'x'; the file has no header"),
        ("t,x\n", "a header and no rows"),
        ("t,x\n2024,1\n2025,abc\n", "line 3: column 'x' is 'abc'; expected a finite number"),
        ("t,x\n2024,1\n2025,inf\n", "line 3: column 'x' is 'inf'"),
        (
            "t,x\n2024,1\n2025,\n2026,3\n",
            "line 3: column 'x' is empty; expected at most 0 missing values .* of 3, got 1",
        ),
        ("t,x\n2024,\n2025,\n2026,\n", "line 2: column 'x' has no values from here on"),
        ("t,x\nyesterday,1\n", "line 2: column 't': 'yesterday' is not a time; expected one like 2024-05-31"),
        ("t,x\n2024,1\n2025,1\n2024,2\n", "line 4: the timestamp 2024-01-01 00:00:00 is also in line 2.*--id"),
        ("t,x\n2024-01,1\n2024-02,1\n2024-03,1\n2024-05,1\n", r"line 5: 2024-05-01 .* follows 2024-03-01 .* per month"),
        ("t,x\n2024-01-01,1\n2024-01-02,1\n2024-01-03,1\n2024-01-06,1\n", "line 5: .* one row per day: add the rows"),
        ("t,x\n2024,1\n2025,1\n", "2 rows: too few to find the time between them"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TableInvalid, match=message) as refused:
        read_table(table(tmp_path, text), "x", "t")
    assert "\n" not in str(refused.value)


def test_files_that_are_not_tables_or_mix_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableInvalid, match="No such file"):
        read_table(tmp_path / "none.csv", "x")
    (tmp_path / "table.csv").write_bytes(b"x\n\xff\n")
    with pytest.raises(TableInvalid, match="not a CSV file in UTF-8"):
        read_table(tmp_path / "table.csv", "x")
    rows = "".join(f"a,202{year},1\nb,2024-0{year + 1},1\n" for year in range(4))
    with pytest.raises(TableInvalid, match="same step; found 'a': year, 'b': month"):
        read_table(table(tmp_path, "id,t,x\n" + rows), "x", "t", "id")


def test_a_season_is_found_under_a_trend_and_noise_and_not_in_a_random_walk() -> None:
    rng = np.random.default_rng(0)
    time = np.arange(600)
    yearly = (0.2 * time + 5 * np.sin(2 * np.pi * time / 12) + rng.normal(0, 0.5, 600)).astype(np.float32)
    daily = np.sin(2 * np.pi * time / 24) + 0.5 * np.sin(2 * np.pi * time / 168) + rng.normal(0, 0.2, 600)
    assert find_season([yearly]) == find_season([yearly[:100], yearly]) == 12
    assert find_season([daily.astype(np.float32)]) == 24, "not the week"
    assert [find_season([rng.normal(size=n).cumsum().astype(np.float32)]) for n in (10, 100, 1000)] == [1, 1, 1]
