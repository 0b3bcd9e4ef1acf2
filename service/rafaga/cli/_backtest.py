"""`rafaga backtest`: forecasts of the last fifth of series from rolling origins, beside those of simple statistics."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rafaga import Client, Forecast, History, ModelDescription, Unsupported
from rafaga.calendar import Times
from rafaga.cli._errors import ExitCode, UsageError, complain, sentence
from rafaga.cli._forecast import label_axes, lines, parsed, require_matplotlib
from rafaga.cli._models import chosen
from rafaga.cli._output import Figure, show_json, show_table, wrapped
from rafaga.client import ForecastDescription
from rafaga.evaluation import (
    HOLT_WINTERS,
    Baseline,
    Comparison,
    Errors,
    Floats,
    Share,
    baselines_for,
    compared,
    intervals,
    naive_error,
    pinball,
    scaled_errors,
    shares,
    standard_error,
    training_size,
)
from rafaga.series import TimeSeries, interpolated


@dataclass(frozen=True)
class Origin:
    """A place in a series, and the horizon that follows it."""

    series: int
    position: int
    history: History
    truth: Floats  # [H]
    scale: float


@dataclass(frozen=True)
class Method:
    """What a model or a baseline forecast at every origin: quantiles [N, H, Q]."""

    name: str
    quantiles: Floats
    levels: tuple[float, ...]
    origins: Sequence[Origin]
    overlap: int  # origins that a horizon spans

    @cached_property
    def truth(self) -> Floats:
        return np.stack([origin.truth for origin in self.origins])

    @cached_property
    def scale(self) -> Floats:
        return np.array([origin.scale for origin in self.origins])

    @property
    def median(self) -> Floats:
        median: Floats = self.quantiles[:, :, self.levels.index(0.5)]
        return median

    @cached_property
    def errors(self) -> dict[str, Errors]:
        """Of every origin, by the name of their mean."""
        return {
            "MASE": scaled_errors(self.truth, self.median, self.scale),
            "pinball loss": pinball(self.truth, self.quantiles, self.levels),
        }

    @cached_property
    def coverage(self) -> list[Share]:
        """Of each central interval."""
        return list(shares(self.truth, self.quantiles, self.levels))[: len(list(intervals(self.levels)))]

    def measured(self, each: Errors) -> tuple[float, float]:
        """Mean and standard error."""
        series = np.array([origin.series for origin in self.origins])
        return float(each.mean()), standard_error(each, self.overlap, series)

    @property
    def figures(self) -> dict[str, tuple[float, float]]:
        """By the names that a bundle gives them."""
        return {
            "mase": self.measured(self.errors["MASE"]),
            "pinball": self.measured(self.errors["pinball loss"]),
            **{share.name: self.measured(share.held.mean(axis=1)) for share in self.coverage},
        }


def backtest(args: Namespace, client: Client) -> int:
    if args.plot is not None:
        require_matplotlib()
    given = lines(args)
    model = client.model(chosen(args, client, "forecasting"), version=args.model_version)
    spec = model.forecast
    if spec is None:
        raise Unsupported(f"{model.name} is not a forecaster")
    horizon = args.horizon or spec.max_horizon
    series = parsed(given, args, model)
    origins, stride = _origins(series, spec, horizon, args.origins)
    origins, found = _answers(origins, client, args, model, horizon)
    levels, overlap = found[0].levels, math.ceil(horizon / stride)
    ours = Method(model.name, np.stack([one.values.T for one in found]), levels, origins, overlap)
    methods = [ours]
    comparisons: list[tuple[str, Comparison]] = []
    for baseline in baselines_for(spec.season):
        quantiles = _quantiles(baseline, origins, spec, horizon, levels)
        if quantiles is not None:
            methods.append(Method(baseline.name, quantiles, levels, origins, overlap))
            comparisons += [
                (figure, compared(baseline, each, methods[-1].errors[figure], overlap))
                for figure, each in ours.errors.items()
            ]
    if args.json:
        show_json(_document(model, methods, comparisons, horizon, stride))
    else:
        _show(methods, comparisons, spec, horizon, stride)
    if args.plot is not None:
        _draw(args.plot, methods, series, model)
    return ExitCode.OK


def _origins(
    series: Sequence[TimeSeries], spec: ForecastDescription, horizon: int, most: int
) -> tuple[list[Origin], int]:
    """Evenly spread over the last fifths, at most so many; and how many steps one is from the next. Raises UsageError.

    Horizons with missing values are left out.
    """
    ranges = []
    for one in series:
        first = max(training_size(np.array(one.values)), spec.min_history, spec.season)
        ranges.append(range(first, len(one.values) - horizon + 1))
    total = sum(map(len, ranges))
    if not total:
        longest = max(len(one.values) for one in series)
        raise UsageError(
            f"no series is long enough: the last fifth must hold a horizon of {horizon}, after at least "
            f"{spec.min_history} values; the longest has {longest} values"
        )
    stride = math.ceil(total / most)
    origins = [
        origin
        for number, (one, places) in enumerate(zip(series, ranges, strict=True))
        for origin in _of_series(number, one, places[::stride], spec, horizon)
    ]
    if not origins:
        raise UsageError("the last fifth has missing values in every horizon")
    return origins, stride


def _of_series(
    number: int, one: TimeSeries, positions: Sequence[int], spec: ForecastDescription, horizon: int
) -> Iterator[Origin]:
    values = np.array(one.values, np.float32)
    scale = naive_error(values[: training_size(values)], spec.season) if positions else 1.0
    if not scale > 0:
        raise UsageError(f"the series{f' {one.id!r}' if one.id else ''} repeats itself exactly: MASE has no unit")
    for position in positions:
        truth = values[position : position + horizon]
        if np.isfinite(truth).all():
            first = max(0, position - spec.max_history)
            times = None if one.times is None else one.times[first:position]
            covariates = {name: known[first : position + horizon] for name, known in one.covariates.items()}
            history = History(values[first:position], times, covariates, one.id)
            yield Origin(number, position, history, truth, scale)


def _answers(
    origins: list[Origin], client: Client, args: Namespace, model: ModelDescription, horizon: int
) -> tuple[list[Origin], list[Forecast]]:
    """The forecasts, and their origins. Raises the first error if all fail."""
    levels = model.forecast.quantile_levels if model.forecast else ()
    outcomes = client.forecast_many(
        [origin.history for origin in origins],
        model=model.name,
        version=args.model_version,
        horizon=horizon,
        quantiles=None if 0.5 in levels else sorted((*levels, 0.5)),
    ).outcomes
    errors = [each for each in outcomes if not isinstance(each, Forecast)]
    if len(errors) == len(outcomes):
        raise errors[0]
    if errors:
        complain(
            f"{len(errors)} of {len(outcomes)} forecasts failed and are left out; the first: {sentence(errors[0])}"
        )
    answered = [(o, each) for o, each in zip(origins, outcomes, strict=True) if isinstance(each, Forecast)]
    return [origin for origin, _ in answered], [each for _, each in answered]


def _quantiles(
    baseline: Baseline, origins: Sequence[Origin], spec: ForecastDescription, horizon: int, levels: Sequence[float]
) -> Floats | None:
    """[N, H, Q] of a baseline, which knows as much of the history as the model; None if it cannot be computed."""
    found = []
    try:
        for number, origin in enumerate(origins, start=1):
            _progress(f"{baseline.name}: {number} of {len(origins)}")
            history = interpolated(origin.history.values)
            found.append(baseline.forecast(history, spec.season, horizon).quantiles(levels))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        complain(f"{baseline.name} is left out: it needs {package}: pip install 'rafaga[forecast]'")
        return None
    except ValueError as error:  # of statsmodels, for a history of less than two seasons
        if baseline is not HOLT_WINTERS:
            raise
        complain(f"{baseline.name} is left out: {sentence(error)}")
        return None
    finally:
        _progress("")
    return np.stack(found)


def _progress(text: str) -> None:
    """On the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _show(
    methods: Sequence[Method],
    comparisons: Sequence[tuple[str, Comparison]],
    spec: ForecastDescription,
    horizon: int,
    stride: int,
) -> None:
    figures = [method.figures for method in methods]
    rows = [
        ("MASE", *(_number(of["mase"]) for of in figures)),
        (f"pinball loss, {spec.unit}", *(_number(of["pinball"]) for of in figures)),
        *(
            (f"in the {100 * share.nominal:g} % interval", *(_percent(of[share.name]) for of in figures))
            for share in methods[0].coverage
        ),
    ]
    show_table(("", *(method.name for method in methods)), rows)
    every = f"every {stride} {spec.step}s" if stride > 1 else f"every {spec.step}"
    print("\n" + wrapped("", f"{len(methods[0].origins)} forecasts of {horizon} steps, {every} of the last fifth"))
    for figure, comparison in comparisons:
        print(wrapped("", comparison.verdict(methods[0].name, figure)))


def _number(figure: tuple[float, float]) -> Figure:
    value, error = figure
    return Figure(f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}")


def _percent(figure: tuple[float, float]) -> Figure:
    value, error = figure
    return Figure(f"{100 * value:.1f} ± {100 * error:.1f} %" if error else f"{100 * value:.1f} %")


def _document(
    model: ModelDescription,
    methods: Sequence[Method],
    comparisons: Sequence[tuple[str, Comparison]],
    horizon: int,
    stride: int,
) -> dict[str, Any]:
    return {
        "model": model.name,
        "version": model.version,
        "horizon": horizon,
        "stride": stride,
        "origins": len(methods[0].origins),
        "methods": [
            {
                "name": method.name,
                "figures": {
                    name: {"value": value, "standard_error": error} for name, (value, error) in method.figures.items()
                },
            }
            for method in methods
        ],
        "comparisons": [
            {
                "baseline": comparison.baseline.name,
                "figure": figure,
                "difference": comparison.difference,
                "standard_error": comparison.standard_error,
                "baseline_is_better": comparison.baseline_is_better,
            }
            for figure, comparison in comparisons
        ],
    }


def _draw(path: Path, methods: Sequence[Method], series: Sequence[TimeSeries], model: ModelDescription) -> None:
    """The first series with forecasts that do not overlap, and MASE by step."""
    from matplotlib.figure import Figure as Drawing

    ours = methods[0]
    drawing = Drawing(figsize=(8, 8), layout="constrained")
    above, below = drawing.subplots(2, height_ratios=(3, 2))
    of_first = [row for row, origin in enumerate(ours.origins) if origin.series == ours.origins[0].series]
    one = series[ours.origins[0].series]
    places = _places(one)
    first = max(0, ours.origins[of_first[0]].position - ours.truth.shape[1])
    above.plot(places[first:], one.values[first:], color="0.4", label="observed")
    low, high = next(intervals(ours.levels), (None, None))
    end = 0
    for row in of_first:
        start = ours.origins[row].position
        if start < end:
            continue
        label, end = f"forecast by {ours.name}" if not end else None, start + ours.truth.shape[1]
        above.plot(places[start:end], ours.median[row], color="tab:blue", label=label)
        if low is not None and high is not None:
            share = f"{100 * (ours.levels[high] - ours.levels[low]):g} % interval" if label else None
            edges = ours.quantiles[row, :, low], ours.quantiles[row, :, high]
            above.fill_between(places[start:end], *edges, color="tab:blue", alpha=0.2, linewidth=0, label=share)
    above.set_title(one.id or ours.name)
    label_axes(above, model, timed=one.times is not None)
    if one.times is None:
        above.set_xlabel("value of the file")
    above.legend()
    steps = np.arange(1, ours.truth.shape[1] + 1)
    for method, style in zip(methods, ("-", "--", ":", "-."), strict=False):
        error = np.abs(method.truth - method.median) / method.scale[:, None]
        below.plot(steps, error.mean(axis=0), style, marker=".", label=method.name)
    below.set_ylim(bottom=0)
    below.set_xlabel("steps ahead")
    below.set_ylabel("mean absolute scaled error")
    below.legend()
    drawing.savefig(path)


def _places(one: TimeSeries) -> Times | npt.NDArray[np.int64]:
    return np.arange(1, len(one.values) + 1) if one.times is None else one.times
