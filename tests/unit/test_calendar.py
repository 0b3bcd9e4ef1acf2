"""Dates by pandas' offset aliases, and features of dates; pandas gives the expected answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rafaga import calendar

ALIASES = [
    *("s", "min", "15min", "h", "2h", "D", "7D", "B", "3B", "W", "W-WED", "2W-FRI", "MS", "ME", "2MS", "QS", "QE"),
    *("QS-FEB", "QE-NOV", "2QS-MAR", "YS", "YE", "YS-APR", "YE-MAR", "5YS"),
]
STARTS = ("1700-01-31", "1899-12-30T23:59:59", "1970-01-01", "1999-12-31T06:30", "2000-02-29", "2024-03-31T12:00")


@pytest.mark.parametrize("alias", ALIASES)
def test_times_and_names_are_those_of_pandas(alias: str) -> None:
    frequency = calendar.frequency(alias)
    assert frequency.name == pd.tseries.frequencies.to_offset(alias).freqstr
    for start in STARTS:
        expected = pd.date_range(start, periods=200, freq=alias).to_numpy().astype("datetime64[us]")
        np.testing.assert_array_equal(frequency.times(expected[0], 200), expected)
        assert not any(frequency.mismatch(time) for time in expected)
        if alias != "3B":
            found = calendar.inferred(expected)
            assert found is not None
            assert found.step == frequency.step
            np.testing.assert_array_equal(found.times(expected[0], 200), expected)


@pytest.mark.parametrize("alias", ALIASES)
def test_times_of_other_frequencies_are_found(alias: str) -> None:
    """1200 days from 1998 to 2001, those that pandas counts to the frequency and those it does not."""
    frequency, offset = calendar.frequency(alias), pd.tseries.frequencies.to_offset(alias)
    for day in pd.date_range("1998-01-01", periods=1200):
        where = frequency.mismatch(day.to_numpy().astype("datetime64[us]"))
        assert (not where) == offset.is_on_offset(day), (day, where)


@pytest.mark.parametrize(
    ("alias", "time", "where"),
    [
        ("W-TUE", "2024-01-01", "a Tue"),
        ("B", "2024-01-06", "a day from Mon to Fri"),
        ("MS", "2024-01-02", "the first day of a month"),
        ("QE", "2024-01-31", "the last day of Dec or Mar or Jun or Sep"),
        ("YS-APR", "2024-01-01", "the first day of Apr"),
    ],
)
def test_mismatches_say_where_times_are(alias: str, time: str, where: str) -> None:
    assert calendar.frequency(alias).mismatch(np.datetime64(time, "us")) == where


def test_old_names_and_equal_steps() -> None:
    old = {"H": "h", "2H": "2h", "T": "min", "S": "s", "M": "ME", "Q": "QE-DEC", "A": "YE-DEC", "AS": "YS-JAN"}
    assert {name: calendar.frequency(name).name for name in old} == old
    for one, other in (("MS", "ME"), ("60min", "h"), ("W-SUN", "7D"), ("3MS", "QE"), ("1D", "24h")):
        assert calendar.frequency(one).step == calendar.frequency(other).step
    assert len({calendar.frequency(name).step for name in ("D", "B", "W", "MS", "QS", "YS", "h", "min", "s")}) == 9


@pytest.mark.parametrize(
    "alias", ["", "0D", "-1h", "1.5h", "month", "W-XXX", "MS-JAN", "D-SUN", "QS-SUN", "999999D", "BMS", "h\n", "É"]
)
def test_unknown_frequencies_are_refused(alias: str) -> None:
    with pytest.raises(ValueError, match="a frequency as pandas names it"):
        calendar.frequency(alias)


def test_times_stop_with_the_year_9999() -> None:
    start = np.datetime64("9998-01-01", "us")
    assert str(calendar.frequency("MS").times(start, 24)[-1]) == "9999-12-01T00:00:00.000000"
    for alias, count in (("MS", 25), ("99999YE", 10**6), ("99999W", 10**6), ("B", 1000), ("s", 10**8)):
        with pytest.raises(ValueError, match="year 9999"):
            calendar.frequency(alias).times(start, count)


def test_text_of_a_time() -> None:
    for time in ("1990-01-01", "1990-01-01T06:30:00Z", "1990-01-01T06:30:00.000001Z"):
        assert calendar.text(np.datetime64(time.removesuffix("Z"), "us")) == time


def test_features_are_those_of_pandas() -> None:
    index = pd.date_range("1950-01-01T05:00", periods=900, freq="91h")
    times = index.to_numpy().astype("datetime64[us]")
    phases = {
        "month": (index.month - 1) / 12,
        "day_of_week": index.day_of_week / 7,
        "day_of_year": (index.day_of_year - 1) / 366,
        "hour": (index.hour + index.minute / 60) / 24,
    }
    for name, phase in phases.items():
        forms = {"": phase - 0.5, ".sin": np.sin(2 * np.pi * phase), ".cos": np.cos(2 * np.pi * phase)}
        for form, expected in forms.items():
            found = calendar.calendar_feature(f"calendar.{name}{form}", times)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert {f"calendar.{name}{form}" for name in phases for form in forms} == set(calendar.CALENDAR_FEATURES)
    with pytest.raises(ValueError, match=r"no calendar feature 'calendar\.week'"):
        calendar.calendar_feature("calendar.week", times)


def test_unknown_frequencies_and_features_of_a_bundle_are_refused() -> None:
    calendar.check("", ("price", "calendar.hour.sin"))
    for alias, name in (("monthly", "price"), ("MS", "calendar.second")):
        with pytest.raises(ValueError, match=r"frequency as pandas|no calendar feature"):
            calendar.check(alias, (name,))


@pytest.mark.parametrize(
    ("times", "position"),
    [
        (["2020-01-01", "2020-01-02", "2020-01-05"], 2),
        (["2020-01-01", "2020-01-08", "2020-01-09", "2020-01-10"], 1),
        (["2020-01-15", "2020-02-15", "2020-03-15", "2020-06-15"], 3),
    ],
)
def test_irregular_times_have_none(times: list[str], position: int) -> None:
    moments = np.array(times, "datetime64[us]")
    assert calendar.inferred(moments) is None
    assert calendar.irregular(moments) == position
    assert calendar.inferred(moments[:2]) is None, "two are too few"
