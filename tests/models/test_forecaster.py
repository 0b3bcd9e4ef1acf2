"""A forecaster of your own series: from a CSV file to a bundle."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.__main__ import main as export
from export.arrays import pad_time
from models.forecasting import Cell
from models.own import FORECASTERS, ForecasterRecord, find_forecaster, forecaster_entry
from models.training import forecaster
from models.training.__main__ import main
from models.training.series import ForecastingProblem, Windows
from rafaga import Client, History, InvalidRequest
from rafaga import bundle as bundles
from rafaga.evaluation import SEASONAL_NAIVE, Floats
from tests.integration.serving import PATIENCE_S, serving

OPTIONS = ["--value", "x", "--time", "t", "--id", "shop", "--horizon", "3", "--cell", "gru", "--name", "sales"]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecaster, "WINDOWS", Windows(batch_size=8, batches_per_epoch=3, jitter=0.1, folds=2))


def write(missing: Container[int] = (), **lengths: int) -> None:
    """Series by name. `missing`: rows of every series without a value."""
    rng = np.random.default_rng(0)
    rows = ["shop,t,x"]
    for scale, (name, length) in enumerate(lengths.items(), start=1):
        values = 100**scale * (10 + np.array([1, 5, 2, 8])[np.arange(length) % 4] + rng.normal(0, 0.2, length))
        given = ["" if i in missing else value for i, value in enumerate(values)]
        rows += [f"{name},{2020 + i // 4}-{3 * (i % 4) + 1:02},{value}" for i, value in enumerate(given)]
    Path("sales.csv").write_text("\n".join(rows))


def train(*options: str) -> int:
    return main(["forecaster", "--csv", "sales.csv", *OPTIONS, "--device", "cpu", "--epochs", "3", *options])


def recorded(folder: Path) -> ForecasterRecord:
    return msgspec.json.decode((folder / "forecaster.json").read_bytes(), type=ForecasterRecord)


def test_series_of_one_file_train_one_model_that_is_exported_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Series of two scales with gaps; the export measures what training did."""
    write(north=60, south=50, missing=(11, 12, 44))
    assert train() == 0
    printed = capsys.readouterr().out
    assert "2 series of 50 to 60 (6 missing), one per quarter, season 4 steps (found)" in printed
    assert all(baseline in printed for baseline in ("seasonal naive", "Holt-Winters"))
    folder = FORECASTERS / "sales"
    assert find_forecaster("sales") == find_forecaster(str(folder)) == folder
    assert float(load_file(folder / "forecaster.safetensors")["spread"]) != 1, "calibrated"

    record = recorded(folder)
    assert (record.config.cell, record.spec.step, record.spec.frequency) == (Cell.GRU, "quarter", "QS-JAN")
    assert (record.spec.unit, record.spec.covariates) == ("x", ())
    assert record.calibration is not None
    assert (record.calibration.blocks, record.calibration.coverage[1].name) == (2, "coverage_80")
    assert export(["sales", "--license", "MIT"]) == 0
    bundle = bundles.load(Path("repository/sales/1"))
    assert (bundle.forecast, bundle.weights.license, bundle.weights.trained) == (record.spec, "MIT", True)
    found = {metric.name: metric.value for metric in bundle.variants[0].metrics}
    assert found == pytest.approx({m.name: m.value for m in record.metrics}, rel=1e-3, abs=1e-3)
    errors = {metric.name: metric.standard_error for metric in bundle.variants[0].metrics}
    assert errors == pytest.approx({m.name: m.standard_error for m in record.metrics}, rel=1e-2, abs=1e-3)
    assert min(errors["mase"], errors["pinball"], errors["coverage_80"], errors["mase_holt_winters"]) > 0
    assert "mase_seasonal_naive" in found
    assert [tensor.name for tensor in bundle.inputs] == ["history", "length"]
    (folder / "series.npz").unlink()
    with pytest.raises(SystemExit):
        export(["sales"])
    assert "not the folder of a trained forecaster" in capsys.readouterr().err


def test_a_covariate_that_decides_the_series_improves_its_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. Sales double on days of promotions, which follow no pattern: without them, they cannot be forecast. 2. The
    export proves the model, and publishes the names of its covariates. 3. The server computes those of the calendar,
    and forecasts as the network does; without the promotions of the next days it refuses.
    """
    monkeypatch.setattr(forecaster, "WINDOWS", Windows(batch_size=32, batches_per_epoch=14, jitter=0.1, folds=2))
    monkeypatch.setattr("models.training.forecast_eval.baselines_for", lambda _: (SEASONAL_NAIVE,))
    rng = np.random.default_rng(0)
    promotion = rng.integers(2, size=120).astype(np.float32)
    sales = 100 + 20 * np.array([0, 1, 2, 1, 0, 3, 3])[np.arange(120) % 7] + 100 * promotion + rng.normal(0, 3, 120)
    days = np.arange("2024-01-01", "2024-04-30", dtype="datetime64[D]")
    rows = [f"north,{day},{x},{here}" for day, x, here in zip(days, sales, promotion, strict=True)]
    Path("sales.csv").write_text("\n".join(["shop,t,x,promotion", *rows]))
    folder = FORECASTERS / "sales"
    found = {}
    for covariates in ([], ["--covariates", "promotion", "--calendar", "day_of_week"]):
        assert train("--season", "7", "--epochs", "6", *covariates) == 0
        record = recorded(folder)
        found[record.spec.covariates] = next(metric.value for metric in record.metrics if metric.name == "mase")
    waves = ("calendar.day_of_week.sin", "calendar.day_of_week.cos")
    assert found["promotion", *waves] < 0.5 * found[()]

    assert export(["sales"]) == 0
    bundle = bundles.load(Path("repository/sales/1"))
    assert bundle.forecast is not None
    assert (bundle.forecast.covariates, bundle.forecast.frequency) == (("promotion", *waves), "D")
    shapes = [(tensor.name, tensor.shape) for tensor in bundle.inputs[2:]]
    assert shapes == [("past_covariates", (None, None, 3)), ("future_covariates", (None, 3, 3))]
    (mase,) = (metric for metric in bundle.variants[0].metrics if metric.name == "mase")
    assert mase.value == pytest.approx(found[bundle.forecast.covariates], rel=1e-3)

    history = History(sales.astype(np.float32), days)
    with serving(Path("repository")) as server, Client(server.address) as client:
        for future in ([0, 1, 0], [1, 0, 1]):
            known = {"promotion": [*promotion, *future]}
            answer = client.forecast(history, model="sales", covariates=known, timeout_s=PATIENCE_S)
            expected = promised(folder, sales, promotion, future)
            for level, values in zip(record.spec.quantile_levels, expected.T, strict=True):
                np.testing.assert_allclose(answer.quantile(level), values, rtol=1e-4)
        with pytest.raises(InvalidRequest, match="promotion"):
            client.forecast(history, model="sales", timeout_s=PATIENCE_S)


def promised(folder: Path, sales: Floats, promotion: Floats, future: Sequence[int]) -> Floats:
    """What the network says of the three days after `sales`. [horizon, levels]"""
    module = forecaster_entry(folder).build()
    module.load_state_dict(load_file(folder / "forecaster.safetensors"))
    phase = 2 * np.pi * (np.arange(len(sales) + len(future)) % 7) / 7  # the first day is a Monday
    beside = np.stack([[*promotion, *future], np.sin(phase), np.cos(phase)], axis=1)
    inputs = pad_time([sales], [beside])
    with torch.inference_mode():
        quantiles: Floats = module.eval()(*(torch.from_numpy(x) for x in inputs.values()))[0].numpy()
    return quantiles


def test_a_stopped_run_is_resumed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(north=60)
    assert train("--output", "whole") == 0
    drawn = ForecastingProblem.windows
    calls = iter(range(100))

    def stopping(problem: ForecastingProblem) -> tuple[torch.Tensor, ...]:
        if next(calls) == 13:  # in the second epoch of the first rehearsal
            raise KeyboardInterrupt
        return drawn(problem)

    monkeypatch.setattr(ForecastingProblem, "windows", stopping)
    with pytest.raises(KeyboardInterrupt):
        train("--output", "resumed")
    monkeypatch.setattr(ForecastingProblem, "windows", drawn)
    assert train("--output", "resumed", "--resume") == 0
    assert "resumed after epoch" in capsys.readouterr().out
    whole, resumed = (load_file(f"{folder}/forecaster.safetensors") for folder in ("whole", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert train("--resume", "--seed", "1", "--output", "other") == 0
    assert "resumed" not in capsys.readouterr().out, "another seed is another run"


@pytest.mark.parametrize(
    ("series", "options", "message"),
    [
        ({"south": 15}, ("--season", "4"), "sales.csv: series 'south': 15 observations are too few"),
        ({}, ("--season", "4", "--horizon", "13"), "season of 4 need at least 65"),
        ({}, ("--value", "y"), "sales.csv: no column 'y'; the file has shop, t, x"),
        ({}, ("--covariates", "x"), "sales.csv: column 'x' is not known in advance"),
        ({"missing": range(48, 60, 3)}, ("--season", "4"), "without gaps among the observations 49 to 60"),
    ],
)
def test_series_that_cannot_be_split_are_refused(
    series: dict[str, Any], options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(north=60, **series)
    assert train(*options) == 1
    assert message in capsys.readouterr().out.replace("\n", " ")


def test_a_series_that_repeats_itself_and_names_of_the_catalogue_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("sales.csv").write_text("shop,t,x\n" + "".join(f"a,{1900 + i},7\n" for i in range(100)))
    assert train() == 1
    assert "repeats itself exactly" in capsys.readouterr().out
    for name in ("lstm-co2", "My Sales"):
        with pytest.raises(SystemExit):
            train("--name", name)
        assert f"--name {name!r}" in capsys.readouterr().err
