"""The time between observations as pandas names it, and features of a time. Client, server and training share them.

Times are UTC, as numpy's datetime64[us].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.datetime64]

FIRST, LAST = np.datetime64("0001-01-01", "us"), np.datetime64("9999-12-31T23:59:59.999999", "us")
"""The years that protobuf and RFC 3339 can write."""

_DAY = np.timedelta64(1, "D")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "D": 86400, "W": 7 * 86400}
_MONTHS_OF = {"M": 1, "Q": 3, "Y": 12}
_OLD_NAMES = {"S": "s", "T": "min", "H": "h", "M": "ME", "Q": "QE", "A": "YE", "Y": "YE", "AS": "YS"}
WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_PATTERN = re.compile(r"([1-9][0-9]{0,4})?([A-Za-z]{1,3})(?:-([A-Z]{3}))?")
_KNOWN = "s, min, h, D, B, W, MS, ME, QS, QE, YS or YE, or a multiple such as 15min"


@dataclass(frozen=True)
class Frequency:
    """`name`: as pandas writes it: "15min", "W-SUN", "QS-JAN". `step`: seconds, business days and months between
    observations, one of which is not 0. It is equal for frequencies that differ only in the day: "MS" and "ME".

    `weekday`: of weeks; 0 is Monday. `end`: on the last day of the month instead of the first. `month`: 1 to 12, with
    which quarters or years begin or end; `every`: 1, 3 or 12 months.
    """

    name: str
    step: tuple[int, int, int]
    weekday: int | None = None
    end: bool = False
    month: int = 1
    every: int = 1

    @property
    def intraday(self) -> bool:
        """Whether observations are closer than a day."""
        return 0 < self.step[0] < _SECONDS["D"]

    def times(self, start: np.datetime64, count: int) -> Times:
        """`start` and the times that follow it: datetime64[us] [count]. `start` must be one of this frequency's times.
        Raises ValueError if they leave the years 1 to 9999."""
        seconds, business_days, months = self.step
        steps = np.arange(count)
        day = start.astype("datetime64[D]")
        # Checked before numpy's integers could overflow, then exactly.
        shortest = seconds or 86400 * (business_days + 28 * months)
        if (count - 1) * shortest <= int((LAST - start) / np.timedelta64(1, "s")):
            if seconds:
                found = start + steps * np.timedelta64(seconds, "s")
            elif business_days:
                found = np.busday_offset(day, steps * business_days) + (start - day)
            else:
                found = self._of_month(day.astype("datetime64[M]") + steps * months) + (start - day)
            if not count or found[-1] <= LAST:
                return found.astype("datetime64[us]")
        raise ValueError(f"{count} times from {text(start)} pass the year 9999")

    def mismatch(self, time: np.datetime64) -> str:
        """Where the frequency's times are, such as "the first day of a month", if `time` is none of them; or ""."""
        day = time.astype("datetime64[D]")
        if self.weekday is not None:
            return "" if _weekday(day) == self.weekday else f"a {WEEKDAYS[self.weekday].capitalize()}"
        if self.step[1]:
            return "" if np.is_busday(day) else "a day from Mon to Fri"
        if self.step[0]:
            return ""
        month = day.astype("datetime64[M]")
        if day == self._of_month(month) and (month.astype(np.int64) + 1 - self.month) % self.every == 0:
            return ""
        months = [MONTHS[(self.month - 1 + m) % 12].capitalize() for m in range(0, 12, self.every)]
        return f"the {'last' if self.end else 'first'} day of {'a month' if self.every == 1 else ' or '.join(months)}"

    def _of_month(self, months: Times) -> Times:
        days: Times = (months + 1 if self.end else months).astype("datetime64[D]")
        return np.asarray(days - _DAY) if self.end else days


@lru_cache(maxsize=256)
def frequency(alias: str) -> Frequency:
    """Raises ValueError if `alias` is none of pandas' offset aliases that forecasts know."""
    match = _PATTERN.fullmatch(alias)
    if match is None:
        raise _unknown(alias)
    count, unit, anchor = int(match[1] or 1), match[2], match[3]
    unit = _OLD_NAMES.get(unit, unit)
    number = match[1] if count > 1 else ""
    if unit in _SECONDS and not (anchor and unit != "W"):
        if unit != "W":
            return Frequency(f"{number}{unit}", (count * _SECONDS[unit], 0, 0))
        if (anchor := anchor or "SUN") in WEEKDAYS:
            return Frequency(f"{number}W-{anchor}", (count * _SECONDS["W"], 0, 0), weekday=WEEKDAYS.index(anchor))
    elif unit == "B" and not anchor:
        return Frequency(f"{number}B", (0, count, 0))
    elif unit[:-1] in _MONTHS_OF and unit[-1] in "SE":
        every, end = _MONTHS_OF[unit[:-1]], unit[-1] == "E"
        if every > 1:
            anchor = anchor or ("DEC" if end else "JAN")
            unit = f"{unit}-{anchor}"
        if not anchor:
            return Frequency(f"{number}{unit}", (0, 0, count), end=end)
        if every > 1 and anchor in MONTHS:
            month = MONTHS.index(anchor) + 1
            return Frequency(f"{number}{unit}", (0, 0, count * every), end=end, month=month, every=every)
    raise _unknown(alias)


def inferred(times: Times) -> Frequency | None:
    """Of three and more rising times; None if they are irregular or of a frequency that is not known here."""
    if len(times) < 3:
        return None
    for alias in _candidates(times[0], times[1]):
        found = frequency(alias)
        if not found.mismatch(times[0]) and (found.times(times[0], len(times)) == times).all():
            return found
    return None


def irregular(times: Times) -> int:
    """The position, from 1, of that of rising times after the most unusual step."""
    steps = np.diff(times).astype(np.int64)
    usual = np.sort(steps)[(len(steps) - 1) // 2]
    return int(np.abs(steps - usual).argmax()) + 1


def _candidates(first: np.datetime64, second: np.datetime64) -> Iterator[str]:
    month, following = (time.astype("datetime64[M]").astype(np.int64) for time in (first, second))
    for unit, every in reversed(_MONTHS_OF.items()):
        count, rest = divmod(following - month, every)
        if count and not rest:
            anchor = "" if every == 1 else f"-{MONTHS[month % 12]}"
            yield from (f"{count}{unit}{end}{anchor}" for end in "SE")
    for unit, seconds in reversed(_SECONDS.items()):
        count, rest = divmod((second - first) // np.timedelta64(1, "us"), seconds * 1_000_000)
        if count and not rest:
            yield f"{count}{unit}" + (f"-{WEEKDAYS[int(_weekday(np.asarray(first)))]}" if unit == "W" else "")
            break
    yield "B"


def _unknown(alias: str) -> ValueError:
    return ValueError(f"expected a frequency as pandas names it ({_KNOWN}), got {alias[:20]!r}")


def text(time: np.datetime64) -> str:
    """RFC 3339 in UTC, without the time at midnight: "1990-01-01", "1990-01-01T06:30:00Z"."""
    if time == time.astype("datetime64[D]"):
        return str(time.astype("datetime64[D]"))
    unit = "s" if time == time.astype("datetime64[s]") else "us"
    return f"{time.astype(f'datetime64[{unit}]')}Z"


def _weekday(days: Times) -> NDArray[np.int64]:
    """0 Monday; 1970-01-01 was a Thursday."""
    since: NDArray[np.int64] = days.astype("datetime64[D]").astype(np.int64)
    return (since + 3) % 7


def _phase_of_hour(times: Times) -> NDArray[np.float64]:
    return np.asarray((times - times.astype("datetime64[D]")) / _DAY)


def _phase_of_year(times: Times) -> NDArray[np.float64]:
    return np.asarray((times.astype("datetime64[D]") - times.astype("datetime64[Y]")) / _DAY / 366)


_PHASES = {
    "calendar.month": lambda times: times.astype("datetime64[M]").astype(np.int64) % 12 / 12,
    "calendar.day_of_week": lambda times: _weekday(times) / 7,
    "calendar.day_of_year": _phase_of_year,
    "calendar.hour": _phase_of_hour,
}
CALENDAR = "calendar."
CALENDAR_FEATURES = tuple(f"{name}{form}" for name in _PHASES for form in ("", ".sin", ".cos"))


def check(alias: str, covariates: Iterable[str]) -> None:
    """Raises ValueError for an unknown frequency, unless it is empty, or an unknown calendar feature."""
    if alias:
        frequency(alias)
    for name in covariates:
        if name.startswith(CALENDAR):
            calendar_feature(name, np.empty(0, "datetime64[us]"))


def calendar_feature(name: str, times: Times) -> NDArray[np.float32]:
    """One of CALENDAR_FEATURES for each of `times`, float32 [T]. Raises ValueError for other names.

    The phase p is in [0, 1): the month of the year over 12, the day of the week over 7 (Monday is 0), the day of the
    year over 366 and the time of day over 24 hours, all from 0. "calendar.month" is p - 0.5, "calendar.month.sin" is
    sin(2πp) and "calendar.month.cos" is cos(2πp); so for the others.
    """
    if name not in CALENDAR_FEATURES:
        raise ValueError(f"no calendar feature {name[:40]!r}; there are {', '.join(CALENDAR_FEATURES)}")
    base, _, form = name.removeprefix(CALENDAR).partition(".")
    phase = _PHASES[CALENDAR + base](times.astype("datetime64[us]"))
    if not form:
        return np.asarray(phase - 0.5, np.float32)
    wave = np.sin if form == "sin" else np.cos
    return np.asarray(wave(2 * np.pi * phase), np.float32)
