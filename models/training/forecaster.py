"""`python -m models.training forecaster --csv FILE --value COLUMN --horizon H --name NAME`: for series of your own.

Trains a recurrent network on the first four fifths of every series in the file, calibrates its intervals on blocks that
training left out, and measures it and the statistical baselines on the last fifth. `python -m export NAME` publishes
it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console

from models.forecasting import Cell, Forecaster, ForecasterConfig
from models.own import FORECASTERS, ForecasterRecord, write_series
from models.training import run
from models.training.data import Series
from models.training.forecast_eval import naive_error, usable_origins
from models.training.loop import TrainingSchedule, training_device
from models.training.options import add_options
from models.training.season import find_season
from models.training.series import ForecastingProblem, Windows
from models.training.table import TableInvalid, read_table
from models.zoo import QUANTILES, catalogue
from rafaga.bundle import NAME_PATTERN, ForecastSpec
from rafaga.calendar import CALENDAR
from rafaga.errors import DeviceError
from rafaga.evaluation import TEST_FRACTION, training_size
from rafaga.series import MAX_MISSING, interpolated

SCHEDULE = TrainingSchedule(epochs=10, peak_rate=5e-3, weight_decay=0.1, clip_norm=1.0, patience=5)
WINDOWS = Windows(batch_size=64, batches_per_epoch=25, jitter=0.1, folds=4)
_LONG = 5000  # observations in all from which a larger network pays
_TOLERATED = 0.05  # difference of an interval's share from its nominal one
_FEWEST_WALK = 20  # observations to estimate the volatility of a series without a season


def main(arguments: Sequence[str]) -> int:
    parser = new_parser()
    options = parser.parse_args(arguments)
    console = Console()
    if not NAME_PATTERN.fullmatch(options.name) or options.name in catalogue():
        parser.error(
            f"--name {options.name!r}: expected lower-case letters, digits, '_', '.', '-', and no name of the catalogue"
        )
    try:
        with run.one_thread():
            train(options, shlex.join(arguments), console)
    except (TableInvalid, DeviceError) as error:
        where = f"{options.csv}: " if isinstance(error, TableInvalid) else ""
        console.print(f"{where}{error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def train(options: argparse.Namespace, command: str, console: Console) -> None:
    """Raises TableInvalid, DeviceError."""
    device = training_device(options.device)
    names = covariate_names(options.covariates, options.calendar)
    if options.value in names:
        raise TableInvalid(f"column {options.value!r} is not known in advance: leave it out of --covariates")
    table = read_table(options.csv, options.value, options.time, options.id, names)
    series = list(table.series.values())
    filled = [interpolated(one) for one in series]
    covariates = list(table.covariates.values()) if names else []
    season = options.season or find_season([one[: training_size(one)] for one in filled])
    spec = msgspec.structs.replace(
        spec_of(series, season, options.horizon, options.step or table.step, options.unit or options.value),
        frequency=table.frequency,
        covariates=names,
    )
    require_enough(table.series, spec)
    config = config_of(filled, spec, options.cell)
    schedule = replace(SCHEDULE, epochs=options.epochs or SCHEDULE.epochs)

    lengths = sorted(len(one) for one in series)
    what = (
        f"{lengths[0]} observations" if len(series) == 1 else f"{len(series)} series of {lengths[0]} to {lengths[-1]}"
    )
    if gaps := sum(int(np.isnan(one).sum()) for one in series):
        what += f" ({gaps} missing)"
    chosen = (f"season {season} steps" if season > 1 else "no season") + ("" if options.season else " (found)")
    if names:
        chosen += f", {len(names)} covariates"
    console.print(
        f"{options.name}: {config.cell.upper()} for {options.csv.name}, {what}, one per {spec.step}, {chosen}"
        f", up to {schedule.epochs} epochs, seed {options.seed}, on {device}",
        soft_wrap=True,
        highlight=False,
    )
    torch.manual_seed(options.seed)
    dataset = f"{options.csv.name}, {options.value}"
    kept = [validation_block(one, spec) for one in series]
    problem = ForecastingProblem(Forecaster(config), spec, series, dataset, WINDOWS, kept, covariates)
    # A run continues only with the same data and options.
    settings = msgspec.json.encode((config, spec, schedule, WINDOWS, options.seed))
    digest = hashlib.sha256(settings + b"".join(one.tobytes() for one in [*series, *covariates])).hexdigest()
    trained = run.train(problem, schedule, f"{options.name}-{digest[:12]}", options.resume, console, device)
    for compared in problem.comparisons:
        console.print(
            compared.verdict(), style="yellow" if compared.baseline_is_better else "", markup=False, soft_wrap=True
        )
    for share, error in problem.coverage:
        held = float(share.held.mean())
        off = abs(held - share.nominal) > max(2 * error, _TOLERATED)
        line = f"the {share.nominal:.0%} interval holds {held:.0%} ± {error:.0%} of the observations"
        console.print(line, style="yellow" if off else "", markup=False, highlight=False)

    folder: Path = options.output or FORECASTERS / options.name
    record = ForecasterRecord(
        name=options.name,
        architecture=f"{config.cell.upper()} with a multi-horizon quantile head (after Wen et al. 2017)",
        dataset=dataset,
        parameters=sum(p.numel() for p in problem.module.parameters()),
        metrics=trained.metrics,
        schedule=schedule,
        calibration=trained.calibration,
        command=f"python -m models.training forecaster {command}",
        seed=options.seed,
        epochs=trained.epochs,
        training_seconds=trained.seconds,
        device=device.type,
        dtype="float32",
        config=config,
        spec=spec,
    )
    run.save(problem.module, folder / "forecaster.safetensors", record, console)
    write_series(folder, series, covariates)
    where = options.name if options.output is None else folder
    console.print(f"publish it: python -m export {where}", markup=False, highlight=False)


def covariate_names(columns: Sequence[str], calendar: Sequence[str]) -> tuple[str, ...]:
    """Columns, calendar features by their full names, and both waves of each `calendar` period. Without repetitions."""
    waves = [f"{CALENDAR}{period}.{wave}" for period in calendar for wave in ("sin", "cos")]
    return tuple(dict.fromkeys([*columns, *waves]))


def spec_of(series: Sequence[Series], season: int, horizon: int, step: str, unit: str) -> ForecastSpec:
    """Histories of two seasons to 40, but of 512 steps at most, and three seasons at least."""
    least = 2 * season if season > 1 else max(_FEWEST_WALK, horizon)
    longest = max(len(one) for one in series)
    most = max(3 * season, min(512, longest, 40 * season if season > 1 else 256), least)
    return ForecastSpec(
        min_history=least,
        max_history=most,
        max_horizon=horizon,
        quantile_levels=QUANTILES,
        season=season,
        step=step,
        unit=unit,
    )


def config_of(series: Sequence[Series], spec: ForecastSpec, cell: Cell) -> ForecasterConfig:
    season = spec.season
    return ForecasterConfig(
        cell=cell,
        hidden=32 if sum(map(len, series)) >= _LONG else 16,
        season=season,
        max_horizon=spec.max_horizon,
        quantile_levels=spec.quantile_levels,
        recent=min(10 * season if season > 1 else _FEWEST_WALK, spec.max_history),
        drift=float(np.mean([_steadiness(one[: training_size(one)], season) for one in series])) > 0.5,
        adaptive=season == 1,
        covariates=len(spec.covariates),
    )


def _steadiness(series: Series, season: int) -> float:
    """How steadily it rises or falls from season to season: 0 without a trend, 1 if every change has the same sign."""
    change = series[season:] - series[:-season]
    return float(abs(change.mean()) / np.abs(change).mean())


def validation_block(series: Series, spec: ForecastSpec) -> range:
    """The end of the training part, for early stopping: a fifth, but at least a horizon and a season."""
    total = training_size(series)
    return range(total - max(total // 5, spec.max_horizon + spec.season), total)


def require_enough(series: Mapping[str, Series], spec: ForecastSpec) -> None:
    """Raises TableInvalid for a series that cannot be split, or that never changes."""
    # Every block of the calibration, and the last fifth, must hold a horizon; two blocks are left to train on.
    seen = spec.min_history + max(WINDOWS.folds * (spec.max_horizon + 1), spec.max_horizon + spec.season)
    needed = max(math.ceil(seen / (1 - TEST_FRACTION)), math.ceil(spec.max_horizon / TEST_FRACTION))
    for name, one in series.items():
        whose = f"series {name!r}: " if name else ""
        if len(one) < needed:
            raise TableInvalid(
                f"{whose}{len(one)} observations are too few: a horizon of {spec.max_horizon} and a season of "
                f"{spec.season} need at least {needed}"
            )
        if not naive_error(one, spec.season) > 0:
            raise TableInvalid(f"{whose}it repeats itself exactly in its first four fifths: there is nothing to learn")
        total = training_size(one)
        edges = np.linspace(spec.min_history, total, WINDOWS.folds + 1).astype(int).tolist()
        for start, stop in [*pairwise(edges), (validation_block(one, spec).start, total), (total, len(one))]:
            if not usable_origins(one, spec, start, stop):
                raise TableInvalid(
                    f"{whose}too many values are missing: expected a horizon of {spec.max_horizon} without gaps among "
                    f"the observations {start + 1} to {stop}, after a history with at most {MAX_MISSING:.0%} missing"
                )


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.training forecaster",
        description="Train, calibrate and measure a forecaster of your own series.",
    )
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="a CSV file with a header")
    parser.add_argument("--value", required=True, metavar="COLUMN", help="the column to forecast")
    parser.add_argument(
        "--time", metavar="COLUMN", help="its timestamps, equally spaced; default: rows are in order, equally spaced"
    )
    parser.add_argument(
        "--id", metavar="COLUMN", help="which series a row belongs to; all series train one model; default: one series"
    )
    parser.add_argument(
        "--covariates",
        type=_words,
        default=(),
        metavar="COLUMN,...",
        help="columns that are known in advance, such as prices or holidays; every forecast then needs their future",
    )
    parser.add_argument(
        "--calendar",
        type=_words,
        default=(),
        metavar="PERIOD,...",
        help="covariates that follow from --time: month, day_of_week, day_of_year, hour",
    )
    parser.add_argument(
        "--season", type=_season, default=None, metavar="N|auto", help="steps in a period, 1 for none; default: auto"
    )
    parser.add_argument("--horizon", type=_positive, required=True, metavar="H", help="how many steps to forecast")
    parser.add_argument("--cell", type=Cell, choices=tuple(Cell), default=Cell.LSTM, metavar="lstm|gru|rnn")
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--step", metavar="WORD", help="time between observations; default: read from --time")
    parser.add_argument("--unit", metavar="TEXT", help="unit of the values; default: the name of --value")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {FORECASTERS}/NAME")
    add_options(parser)
    return parser


def _season(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer ≥ 1, got {number}")
    return number
