"""`rafaga forecast`, and the series of a file, which `rafaga backtest` reads too."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rafaga import Client, Forecast, History, ModelDescription
from rafaga.calendar import CALENDAR, Times, text
from rafaga.cli._errors import ExitCode, UsageError, complain, exit_code, needed_by, sentence
from rafaga.cli._models import chosen
from rafaga.cli._output import Cell, show_footer, show_json, show_table, warn_if_untrained
from rafaga.series import SeriesError, TimeSeries, read_table

_MOST_DRAWN = 12  # series


def forecast(args: Namespace, client: Client) -> int:
    """Exit code of the first series that fails, if one does; the others are shown."""
    given = lines(args)
    model = client.model(chosen(args, client, "forecasting"), version=args.model_version)
    series = parsed(given, args, model)
    if args.plot is not None:
        require_matplotlib()
        if len(series) > _MOST_DRAWN:
            raise UsageError(f"--plot draws {_MOST_DRAWN} series at most, and the file has {len(series)}")
    horizon = args.horizon or _known_horizon(series)
    histories = [_history(one, horizon) for one in series]
    options: Any = {
        "model": model.name,
        "version": args.model_version,
        "horizon": horizon,
        "quantiles": args.quantiles,
        "check_last": args.check or 0,
    }
    if args.id is None:
        found: list[Forecast] = [client.forecast(histories[0], **options)]
        errors: list[Exception] = []
    else:
        outcomes = client.forecast_many(histories, **options).outcomes
        found = [each for each in outcomes if isinstance(each, Forecast)]
        errors = [each for each in outcomes if not isinstance(each, Forecast)]
    if args.json:
        documents = [_document(each) for each in found]
        show_json(documents if args.id is not None else documents[0])
    elif found:
        _show(found, args)
    if args.plot is not None and found:
        _draw(found, model, args.plot)
    for error in errors:
        complain(sentence(error))
    if found:
        warn_if_untrained(found[0].model)
    return exit_code(errors[0]) if errors else ExitCode.OK


def lines(args: Namespace) -> list[str]:
    """Of the file, which is read before a server is asked. Raises OSError, UnicodeDecodeError."""
    if args.file == "-":
        if sys.stdin.isatty():
            complain("reading a number per line from this terminal; Ctrl-D ends")
        return list(sys.stdin)
    with open(args.file, encoding="utf-8-sig", newline="") as file:
        return list(file)


def parsed(lines: Sequence[str], args: Namespace, model: ModelDescription) -> list[TimeSeries]:
    """The series of --column, --time and --id, with the covariates that the model needs. Raises UsageError."""
    needed = model.forecast.covariates if model.forecast else ()
    try:
        columns = [name for name in needed if not name.startswith(CALENDAR)]
        return read_table(lines, args.column, args.time, args.id, columns)
    except SeriesError as error:
        raise UsageError(str(error)) from None


def require_matplotlib() -> None:
    """Raises NotInstalled, before anything is sent."""
    with needed_by("--plot", "'rafaga[forecast]'"):
        import matplotlib  # noqa: F401


def _clock(times: Times) -> list[str]:
    """Days alone where all are midnights."""
    unit = next((unit for unit in "Dm" if (times == times.astype(f"datetime64[{unit}]")).all()), "s")
    return [str(time).replace("T", " ") for time in times.astype(f"datetime64[{unit}]")]


def _known_horizon(series: Sequence[TimeSeries]) -> int | None:
    """As far as the file has covariates of all series; None if it has none of the future."""
    return min((len(known) - len(one.values) for one in series for known in one.covariates.values()), default=0) or None


def _history(one: TimeSeries, horizon: int | None) -> History:
    end = len(one.values) + (horizon or 0)
    covariates = {name: known[:end] for name, known in one.covariates.items()}
    return History(np.array(one.values, np.float32), one.times, covariates, one.id)


def _show(found: Sequence[Forecast], args: Namespace) -> None:
    ids = [] if args.id is None else ["ID"]
    timed = found[0].timestamps is not None
    rows: list[tuple[Cell, ...]] = []
    checks: list[tuple[Cell, ...]] = []
    for one in found:
        name: list[Cell] = [one.id] if ids else []
        steps: Sequence[Cell] = range(1, one.horizon + 1) if one.timestamps is None else _clock(one.timestamps)
        rows += [(*name, step, *map(float, values)) for step, values in zip(steps, one.values.T, strict=True)]
        positions = [check.position for check in one.checks]
        places: Sequence[Cell] = [position + 1 for position in positions]
        if one.timestamps is not None and one.history is not None:
            places = _clock(np.asarray(one.history.index)[positions])
        checks += [
            (*name, place, c.observed, c.lower, c.upper, round(c.score, 2), "anomaly" if c.anomaly else "")
            for place, c in zip(places, one.checks, strict=True)
        ]
    show_table((*ids, "TIME" if timed else "STEP", *(f"Q{level:g}" for level in found[0].levels)), rows)
    if checks:
        print()
        show_table((*ids, "TIME" if timed else "VALUE", "OBSERVED", "LOWER", "UPPER", "SCORE", ""), checks)
    filled = sum(one.filled for one in found)
    show_footer(found[0].model, found[0].timing)
    if filled:
        print(f"{filled} missing value{'s were' if filled > 1 else ' was'} filled")


def _document(found: Forecast) -> dict[str, Any]:
    times = None if found.timestamps is None else [text(time) for time in found.timestamps]
    return {
        "id": found.id,
        "levels": found.levels,
        "values": found.values,
        "timestamps": times,
        "filled": found.filled,
        "checks": found.checks,
        "model": found.model,
        "timing": found.timing,
    }


def _draw(found: Sequence[Forecast], model: ModelDescription, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4 * len(found)), layout="constrained")
    for one, axes in zip(found, figure.subplots(len(found), squeeze=False)[:, 0], strict=True):
        one.plot(axes)
        label_axes(axes, model, timed=one.timestamps is not None)
    figure.savefig(path)


def label_axes(axes: Any, model: ModelDescription, *, timed: bool) -> None:
    from matplotlib import dates

    formatter: Any = dates.ConciseDateFormatter  # has no types
    if model.forecast is not None:
        axes.set_ylabel(model.forecast.unit)
    if timed:
        axes.xaxis.set_major_formatter(formatter(axes.xaxis.get_major_locator()))
    elif model.forecast is not None:
        axes.set_xlabel(f"steps of one {model.forecast.step} after the last value")
