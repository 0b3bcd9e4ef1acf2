"""Forecasts: the series that are accepted, and the tables and charts of what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rafaga import Client, Forecast, History, InvalidRequest, InvalidTensor, ModelInfo, Timing
from rafaga.client import _forecast
from tests.unit.client.fake_server import Script

pd = pytest.importorskip("pandas")

MONTHS = pd.date_range("2020-01-31", periods=30, freq="ME", name="month")


def forecast(history: History | None = None, levels: Sequence[float] = (0.1, 0.5, 0.9)) -> Forecast:
    """Of six steps: 300, 301, …, a unit more per level."""
    values = np.arange(6, dtype=np.float32) + np.arange(len(levels), dtype=np.float32)[:, np.newaxis] + 300
    return Forecast(tuple(levels), values, ModelInfo("co2", 1, True, "fp32"), Timing(0, 0, 0, 1), history)


@pytest.mark.parametrize(
    "series",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        pd.Series([1, 2, 3]),
        pd.Series([1, 2, 3], dtype="Int64"),
        pd.Series([1, 2, 3], MONTHS[:3]),
        pd.DataFrame({"ppm": [1, 2, 3]}, MONTHS[:3]),
    ],
)
def test_series_of_every_kind(client: Client, script: Script, series: Any) -> None:
    found = client.forecast(series, model="lstm-co2", horizon=2)
    assert script.requests[-1].history == [1, 2, 3]
    assert found.history is not None
    assert found.history.values.tolist() == [1, 2, 3]
    (again,) = client.forecast_many([series], model="lstm-co2", horizon=2)
    assert again.history is not None
    assert again.to_pandas().equals(found.to_pandas())


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (pd.DataFrame({"a": [1], "b": [2]}), r"a frame with a, b: choose one, frame\['NAME'\]"),
        (pd.DataFrame(), "a frame with none"),
        (pd.Series([1, None]), "fill the gaps first"),
        (pd.Series(["x"]), "must be numbers"),
        (pd.Series([1, 2], MONTHS[1::-1]), "in order of time"),
        (7, "one row of numbers"),
    ],
)
def test_other_series_are_refused(client: Client, script: Script, series: Any, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        client.forecast(series, model="lstm-co2")
    assert not script.requests


def test_a_frame_is_not_several_series(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="expected a list of series, got a frame"):
        client.forecast_many(pd.DataFrame({"a": [1], "b": [2]}), model="lstm-co2")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (None, [1, 2, 3]),
        (range(30), [1, 2, 3]),
        (MONTHS, ["2022-07-31", "2022-08-31", "2022-09-30"]),
        (pd.DatetimeIndex(list(MONTHS)), ["2022-07-31", "2022-08-31", "2022-09-30"]),
        (pd.DatetimeIndex([*MONTHS[:-1], "2022-07-09"]), [1, 2, 3]),
        (pd.period_range("2020Q1", periods=30, freq="Q"), ["2027Q3", "2027Q4", "2028Q1"]),
        (
            pd.date_range("2024-03-01", periods=30, tz="Europe/Madrid"),
            ["2024-03-31 00:00:00+01:00", "2024-04-01 00:00:00+02:00", "2024-04-02 00:00:00+02:00"],
        ),
    ],
)
def test_a_table_continues_the_index_of_the_series(index: Any, expected: list[object]) -> None:
    frame = forecast(_forecast.history(pd.Series(np.arange(30.0), index))).to_pandas()
    assert list(frame.columns) == ["q0.1", "q0.5", "q0.9"]
    assert frame["q0.5"].tolist() == [301, 302, 303, 304, 305, 306]
    steps = [step if isinstance(step, int) else str(step).removesuffix(" 00:00:00") for step in frame.index[:3]]
    assert steps == expected
    assert frame.index.name == ("month" if index is MONTHS else "step" if expected == [1, 2, 3] else None)


def test_two_dates_have_no_frequency() -> None:
    history = _forecast.history(pd.Series([1.0, 2.0], pd.DatetimeIndex(["2020-01-01", "2020-01-02"])))
    assert forecast(history).to_pandas().index.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("index", [None, MONTHS, pd.period_range("2020-01", periods=30, freq="M")])
def test_a_chart_has_the_history_and_the_intervals(index: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    history = _forecast.history(pd.Series(np.arange(30.0), index) if index is not None else np.arange(30.0))
    axes = forecast(history, (0.05, 0.1, 0.5, 0.9, 0.95)).plot()
    before, median = axes.lines
    assert before.get_ydata().tolist() == list(range(6, 30)), "four horizons"
    assert median.get_ydata().tolist() == [302, 303, 304, 305, 306, 307]
    assert before.get_xdata()[-1] < median.get_xdata()[0]
    assert [band.get_label() for band in axes.collections] == ["90 % interval", "80 % interval"]
    assert forecast().plot(axes) is axes
    assert len(axes.lines) == 3
    axes.figure.canvas.draw()
    pyplot.close(axes.figure)


def test_the_representation_has_numbers() -> None:
    assert repr(forecast()) == (
        "Forecast([301., 302., 303., 304., 305., 306.], last 305 to 307 (80 %), horizon=6, model='co2 v1 fp32')"
    )
    assert repr(forecast(levels=[0.5])) == (
        "Forecast([300., 301., 302., 303., 304., 305.], horizon=6, model='co2 v1 fp32')"
    )
    html = forecast()._repr_html_()
    assert "<th>step</th><th>0.1</th><th>0.5</th><th>0.9</th>" in html
    assert html.count("<tr>") == 7
