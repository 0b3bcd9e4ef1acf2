"""CO2 in the atmosphere: a forecast of the last two years from the years before, compared with the measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.training.data import load_co2
from rafaga import Client, Forecast

MODEL = "lstm-co2"
FIRST_MONTH = np.datetime64("1958-03")
_YEARS_DRAWN = 8
_SEASON = 12

Series = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outlook:
    """history [T] and truth [H], monthly means in ppm; the forecast uses the history only."""

    history: Series
    truth: Series
    forecast: Forecast

    @property
    def error_ppm(self) -> float:
        """Mean absolute error of the median."""
        return float(np.abs(self.forecast.median - self.truth).mean())

    @property
    def naive_error_ppm(self) -> float:
        """Mean absolute error of the last year repeated."""
        repeated = np.resize(self.history[-_SEASON:], len(self.truth))
        return float(np.abs(repeated - self.truth).mean())

    @property
    def inside(self) -> int:
        """Number of months with the truth inside the 80 % interval."""
        lower, upper = self.forecast.interval(0.8)
        return int(((lower <= self.truth) & (self.truth <= upper)).sum())


def ask(client: Client) -> Outlook:
    """Forecasts the last months of the series. Raises RafagaError."""
    limits = client.model(MODEL).forecast
    assert limits is not None, f"{MODEL} is a forecaster"
    series = load_co2()
    history, truth = series[: -limits.max_horizon], series[-limits.max_horizon :]
    forecast = client.forecast(history[-limits.max_history :], model=MODEL, horizon=limits.max_horizon)
    return Outlook(history, truth, forecast)


def months(count: int) -> list[str]:
    """The first `count` months of the series: "1958-03", …"""
    return [str(month) for month in FIRST_MONTH + np.arange(count)]


def draw(outlook: Outlook, path: Path) -> None:
    """Writes a PNG: history, median, 80 % interval, and the truth that followed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _YEARS_DRAWN * _SEASON
    total = len(outlook.history) + len(outlook.truth)
    month = (FIRST_MONTH + np.arange(total)).astype("datetime64[D]")
    before, after = month[-shown - len(outlook.truth) : -len(outlook.truth)], month[-len(outlook.truth) :]
    lower, upper = outlook.forecast.interval(0.8)

    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(before, outlook.history[-shown:], color="0.35", linewidth=1.2, label="history")
    axes.fill_between(after, lower, upper, color="tab:blue", alpha=0.25, linewidth=0, label="80 % interval")
    axes.plot(after, outlook.forecast.median, color="tab:blue", linewidth=1.8, label="median forecast")
    axes.plot(after, outlook.truth, "o", color="tab:red", markersize=3.5, label="what followed")
    axes.axvline(after[0], color="0.7", linewidth=0.8, linestyle="--")
    axes.set_title(f"CO2 at Mauna Loa, forecast by {outlook.forecast.model}")
    axes.set_ylabel("ppm, monthly mean")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    axes.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
