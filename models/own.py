"""Forecasters that `python -m models.training forecaster` trained: a folder each, which the export reads.

forecaster.safetensors   the weights
forecaster.json          ForecasterRecord: the network, its figures, and how to reproduce them
series.npz               the series and their covariates, so that the export can measure what it publishes
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from models.entry import Entry, Trained
from models.forecasting import Forecaster, ForecasterConfig
from models.training.data import Series
from models.training.run import TrainingRecord
from rafaga.bundle import ForecastSpec, Task

FORECASTERS = Path("runs") / "forecasters"
_WEIGHTS, _SERIES = "forecaster.safetensors", "series.npz"


class ForecasterRecord(TrainingRecord, frozen=True, kw_only=True):
    config: ForecasterConfig
    spec: ForecastSpec


def find_forecaster(name: str) -> Path | None:
    """The folder of a trained forecaster, given its name or the folder itself."""
    folders = (FORECASTERS / name, Path(name))
    return next((folder for folder in folders if (folder / _WEIGHTS).is_file()), None)


def forecaster_entry(folder: Path) -> Entry:
    """An entry like those of the catalogue. The better baseline's MASE is the one that is expected of it.

    Raises ValueError if the folder is damaged.
    """
    weights = folder / _WEIGHTS
    try:
        record = msgspec.json.decode(weights.with_suffix(".json").read_bytes(), type=ForecasterRecord)
        series, covariates = read_series(folder)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{folder}: not the folder of a trained forecaster ({error})") from error
    baselines = [metric.value for metric in record.metrics if metric.name.startswith("mase_")]
    return Entry(
        name=record.name,
        architecture=record.architecture,
        task=Task.FORECASTING,
        dataset=record.dataset,
        build=partial(Forecaster, record.config),
        input=record.spec,
        weights=Trained(weights, f"python -m models.training forecaster, on {record.dataset}"),
        series=series,
        covariates=covariates,
        expected={"mase": min(baselines)},
    )


def write_series(folder: Path, series: Sequence[Series], covariates: Sequence[Series]) -> None:
    np.savez_compressed(folder / _SERIES, *series, *covariates, allow_pickle=False)


def read_series(folder: Path) -> tuple[tuple[Series, ...], tuple[Series, ...]]:
    """The series, float32 [T] each, and their covariates, [T, C] each; none in folders written without any."""
    with np.load(folder / _SERIES, allow_pickle=False) as file:
        arrays = [file[f"arr_{number}"] for number in range(len(file.files))]
    return tuple(one for one in arrays if one.ndim == 1), tuple(one for one in arrays if one.ndim == 2)
