"""Forecasts: the series that are accepted, and the tables and charts of what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rafaga import Client, Forecast, History, InvalidRequest, InvalidTensor, ModelInfo, Timing
from tests.unit.client.fake_server import Script

pd = pytest.importorskip("pandas")

MONTHS = pd.date_range("2020-01-31", periods=30, freq="ME", name="month")


def forecast(levels: Sequence[float] = (0.1, 0.5, 0.9)) -> Forecast:
    """Of six steps: 300, 301, …, a unit more per level."""
    values = np.arange(6, dtype=np.float32) + np.arange(len(levels), dtype=np.float32)[:, np.newaxis] + 300
    return Forecast(tuple(levels), values, ModelInfo("co2", 1, True, "fp32"), Timing(0, 0, 0, 1))


@pytest.mark.parametrize(
    "series",
    [
        *(kind([1, 2, 3]) for kind in (list, tuple, np.array, pd.Series)),
        History(np.array([1, 2, 3], np.float32)),
        pd.Series([1, 2, 3], dtype="Int64"),
        pd.DataFrame({"ppm": [1, 2, 3]}),
    ],
)
def test_series_of_every_kind(client: Client, script: Script, series: Any) -> None:
    found = client.forecast(series, model="lstm-co2", horizon=2)
    sent = script.requests[-1]
    assert (sent.history or sent.series[0].values) == [1, 2, 3]
    assert found.history is not None
    assert found.history.values.tolist() == [1, 2, 3]
    assert found.id == ("ppm" if isinstance(series, pd.DataFrame) else "")
    (again,) = client.forecast_many([series], model="lstm-co2", horizon=2)
    assert again.history is not None
    assert again.to_pandas().equals(found.to_pandas())


@pytest.mark.parametrize(
    "series",
    [
        [1, None, 3],
        *(pd.Series([1, None, 3], dtype=dtype) for dtype in (None, "Int64", object)),
        History(np.array([1, np.nan, 3], np.float32)),
    ],
)
def test_missing_values(client: Client, script: Script, series: Any) -> None:
    found = client.forecast(series, model="lstm-co2", horizon=2)
    (sent,) = script.requests[-1].series
    assert (list(sent.missing), sent.values[0], sent.values[2]) == ([1], 1, 3)
    assert np.isfinite(sent.values).all()
    assert found.filled == 1
    assert found.history is not None
    assert np.isnan(found.history.values).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (pd.DataFrame({"a": [1], "b": [2]}), r"a frame with a, b: choose one, frame\['NAME'\]"),
        (pd.DataFrame(), "a frame with none"),
        (np.array([1, np.nan, np.nan]), "2 of 3 values are not, the first at position 1: mark missing values as None"),
        ([1, None, float("nan")], "1 of 3 values are not, the first at position 2"),
        (pd.Series([1, np.inf]), "the first at position 1"),
        (pd.Series(["x"]), "must be numbers"),
        (pd.Series([1, 2], MONTHS[1::-1]), "in order of time"),
        (pd.Series([1, 2, 3], MONTHS[[0, 0, 1]]), "2020-01-31 twice, at positions 0 and 1"),
        (pd.Series([1, 2], pd.DatetimeIndex(["2020-01-01", None])), "no time at position 1"),
        (pd.Series([1, 2, 3, 4], MONTHS[[0, 1, 2, 5]]), "at position 3, 2020-06-30 follows 2020-03-31. Mark gaps as"),
        (pd.Series([1, 2, 3], pd.PeriodIndex(["2020", "2021", "2024"], freq="Y")), "2024-01-01 follows 2021-01-01"),
        (History(np.ones(3, np.float32), np.array(["2020", "2021", "2021-02"], "M8[D]")), "at position 1, 2021-01-01"),
        (7, "one row of numbers"),
    ],
)
def test_other_series_are_refused(client: Client, script: Script, series: Any, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        client.forecast(series, model="lstm-co2")
    assert not script.requests


def test_each_column_of_a_frame_is_a_series(client: Client, script: Script) -> None:
    frame = pd.DataFrame({"a": [1.0, 2], "b": [3.0, None]}, MONTHS[:2])
    found = client.forecast_many(frame, model="lstm-co2")
    assert [one.id for one in found] == ["a", "b"]
    assert [list(one.missing) for one in script.requests[-1].series] == [[], [1]]


def test_series_of_several_frequencies(client: Client, script: Script) -> None:
    """A message has one frequency."""
    days, months = (pd.Series(np.arange(5.0), pd.date_range("2020-01-01", periods=5, freq=f)) for f in ("D", "MS"))
    found = client.forecast_many([days, months, days, [1, 2]], model="lstm-co2", horizon=1)
    ends = [one.timestamps and str(one.timestamps[0])[:10] for one in found]
    assert ends == ["2020-01-06", "2020-06-01", "2020-01-06", None]
    assert sorted((r.frequency, len(r.series)) for r in script.requests[1:]) == [("", 0), ("D", 2), ("MS", 1)]


def test_what_else_a_request_has(client: Client, script: Script) -> None:
    known = {"price": [1, 2, 3], "holiday": pd.Series([0, 1, 0])}
    found = client.forecast([5, 9], model="lstm-co2", horizon=1, quantiles=(0.2, 0.5), covariates=known)
    assert found.levels == (0.2, 0.5)
    (sent,) = script.requests[-1].series
    covariates = {name: list(one.values) for name, one in sent.covariates.items()}
    assert covariates == {"price": [1, 2, 3], "holiday": [0, 1, 0]}
    client.forecast_many([History(np.array([5, 9]), covariates=known, id="a")], model="lstm-co2")
    (again,) = script.requests[-1].series
    assert (again.id, again.covariates["price"].values) == ("a", [1, 2, 3])
    for price, said in (([1, np.nan], "one row of finite numbers"), (["dear"], "numbers")):
        with pytest.raises(InvalidTensor, match=f"covariate 'price' must be {said}"):
            client.forecast([5, 9], model="lstm-co2", covariates={"price": price})


@pytest.mark.parametrize("index", [None, MONTHS[:4], pd.period_range("2020-01", periods=4, freq="M")])
def test_anomalies(client: Client, index: Any) -> None:
    """They are red points in the chart."""
    found = client.forecast(pd.Series([1, 1, 7, 1], index), model="lstm-co2", check_last=3)
    assert [check.position for check in found.checks] == [1, 2, 3]
    (anomaly,) = found.anomalies
    assert (anomaly.position, anomaly.observed, anomaly.score) == (2, 7, 3.5)
    frame = found.checks_to_pandas()
    assert frame.columns.tolist() == ["observed", "lower", "upper", "score", "anomaly"]
    assert frame[frame.anomaly].index.tolist() == ([2] if index is None else [index[2]])
    axes = drawn(found)
    (point,) = [c for c in axes.collections if c.get_label() == "anomaly"]
    assert point.get_offsets()[0][1] == 7
    with pytest.raises(InvalidRequest, match="check_last must be at least 0"):
        client.forecast([1], model="lstm-co2", check_last=-1)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (None, [1, 2, 3]),
        (range(30), [1, 2, 3]),
        *(
            (index, ["2022-07-31", "2022-08-31", "2022-09-30"])
            for index in (MONTHS, pd.DatetimeIndex(list(MONTHS)), MONTHS.as_unit("ns"))
        ),
        (pd.date_range("2020-01-06", periods=30, freq="B"), ["2020-02-17", "2020-02-18", "2020-02-19"]),
        (pd.date_range("2020-01-06", periods=30, freq="BME"), ["2022-07-29", "2022-08-31", "2022-09-30"]),
        (pd.period_range("2020Q1", periods=30, freq="Q"), ["2027Q3", "2027Q4", "2028Q1"]),
        (
            pd.date_range("2024-03-01", periods=30, tz="Europe/Madrid"),
            ["2024-03-31 00:00:00+01:00", "2024-04-01 00:00:00+02:00", "2024-04-02 00:00:00+02:00"],
        ),
        (
            pd.DatetimeIndex(list(pd.date_range("2024-03-30", periods=30, freq="h", tz="Europe/Madrid"))),
            ["2024-03-31 07:00:00+02:00", "2024-03-31 08:00:00+02:00", "2024-03-31 09:00:00+02:00"],
        ),
    ],
)
def test_a_table_continues_the_index_of_the_series(
    client: Client, script: Script, index: Any, expected: list[object]
) -> None:
    found = client.forecast(pd.Series(np.arange(30.0), index), model="lstm-co2", horizon=3)
    frame = found.to_pandas()
    assert list(frame.columns) == ["q0.1", "q0.5", "q0.9"]
    assert frame["q0.5"].tolist() == [29, 29, 29]
    steps = [step if isinstance(step, int) else str(step).removesuffix(" 00:00:00") for step in frame.index[:3]]
    assert steps == expected
    assert frame.index.name == ("month" if index is MONTHS else "step" if expected == [1, 2, 3] else frame.index.name)
    if isinstance(index, pd.DatetimeIndex):
        assert frame.index.dtype == index.dtype
    known = expected != [1, 2, 3] and getattr(index, "freqstr", None) != "BME"
    assert (found.timestamps is not None) == bool(script.requests[-1].frequency) == known


def test_two_dates_have_no_frequency(client: Client) -> None:
    series = pd.Series([1.0, 2.0], pd.DatetimeIndex(["2020-01-01", "2020-01-02"]))
    assert client.forecast(series, model="lstm-co2", horizon=2).to_pandas().index.tolist() == [1, 2]


def test_days_with_a_zone_are_sent_as_days(client: Client, script: Script) -> None:
    """Their midnights are 23 and 22 hours in UTC, which no frequency has."""
    days = pd.date_range("2024-03-01", periods=30, tz="Europe/Madrid")
    found = client.forecast(pd.Series(np.arange(30.0), days), model="lstm-co2", horizon=2)
    request = script.requests[-1]
    assert (request.frequency, request.series[0].start.ToJsonString()) == ("D", "2024-03-01T00:00:00Z")
    assert found.timestamps is not None
    assert found.timestamps.astype(str).tolist() == ["2024-03-30T23:00:00.000000", "2024-03-31T22:00:00.000000"]


def test_times_without_pandas(client: Client) -> None:
    months = np.arange("2020-01", "2020-07", dtype="datetime64[M]")
    found = client.forecast(History(np.arange(6, dtype=np.float32), months), model="lstm-co2", horizon=2)
    assert found.timestamps is not None
    assert found.timestamps.astype("datetime64[D]").astype(str).tolist() == ["2020-07-01", "2020-08-01"]
    assert found.to_pandas().index.tolist() == [pd.Timestamp("2020-07-01"), pd.Timestamp("2020-08-01")]
    before, median = drawn(found).lines
    assert (before.get_xdata()[-1], median.get_xdata()[-1]) == (months[-1], np.datetime64("2020-08-01"))


def drawn(found: Forecast) -> Any:
    """The axes of its chart."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    axes = found.plot()
    axes.figure.canvas.draw()
    pyplot.close(axes.figure)
    return axes


@pytest.mark.parametrize("index", [None, MONTHS, pd.period_range("2020-01", periods=30, freq="M")])
def test_a_chart_joins_the_history_and_the_intervals(client: Client, index: Any) -> None:
    series = pd.Series(np.arange(30.0), index) if index is not None else np.arange(30.0)
    found = client.forecast(series, model="lstm-co2", horizon=6)
    axes = drawn(found)
    before, median = axes.lines
    assert before.get_ydata().tolist() == list(range(6, 30)), "four horizons"
    assert median.get_ydata().tolist() == [29] * 7, "from the last value of the history on"
    assert before.get_xdata()[-1] == median.get_xdata()[0] < median.get_xdata()[1]
    assert [band.get_label() for band in axes.collections] == ["80 % interval"]
    assert found.plot(axes) is axes
    assert len(axes.lines) == 4


def test_a_chart_of_any_levels() -> None:
    axes = drawn(forecast(levels=(0.05, 0.1, 0.4, 0.9, 0.95)))
    assert [line.get_label() for line in axes.lines] == ["forecast, quantile 0.4"]
    assert [band.get_label() for band in axes.collections] == ["90 % interval", "80 % interval"]


def test_the_representation_has_numbers() -> None:
    shown = "Forecast([301., 302., 303., 304., 305., 306.], last 305 to 307 (80 %), horizon=6, model='co2 v1 fp32')"
    assert repr(forecast()) == shown
    assert "300., 301., 302., 303., 304., 305.], horizon=6" in repr(forecast(levels=[0.5]))
    html = forecast()._repr_html_()
    assert "<th>step</th><th>0.1</th><th>0.5</th><th>0.9</th>" in html
    assert html.count("<tr>") == 7
