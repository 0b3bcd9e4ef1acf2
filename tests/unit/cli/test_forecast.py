"""`rafaga forecast` and `rafaga backtest`: files with times, gaps and several series, tables, plots and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rafaga.cli import main
from rafaga.cli._errors import ExitCode
from tests.unit.client.fake_server import Script

MONTHS = [str(month) for month in np.arange("2010-01", "2020-01", dtype="datetime64[M]")]


@pytest.fixture
def sales(tmp_path: Path) -> str:
    """Ten years of two shops, with a season of 12 months; the second lacks its fifth month."""
    rng = np.random.default_rng(0)
    rows = ["month,shop,sold"]
    for shop, level in (("north", 100), ("south", 20)):
        sold = level + 5 * np.sin(np.arange(120) * 2 * np.pi / 12) + rng.normal(0, 1, 120)
        cells = [f"{value:.2f}" for value in sold]
        cells[4] = "" if shop == "south" else cells[4]
        rows += [f"{month},{shop},{cell}" for month, cell in zip(MONTHS, cells, strict=True)]
    path = tmp_path / "sales.csv"
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture
def north(sales: str) -> str:
    """The first shop alone."""
    path = Path(sales).with_name("north.csv")
    path.write_text("\n".join(line for line in Path(sales).read_text().splitlines() if "south" not in line))
    return str(path)


def test_times_follow_those_of_the_file(
    script: Script, north: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "north.svg"
    columns = ["--column", "sold", "--time", "month"]
    assert main(["forecast", north, *columns, "--horizon", "2", "--check", "1", "--plot", str(plot)]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["TIME", "2020-01-01", "2020-02-01"]
    assert lines[5].split()[0] == "2019-12-01"
    assert lines[5].split()[-1] == "anomaly", "far from 0, with which the server compares it"
    assert max(map(len, lines)) <= 80
    (sent,) = script.requests[-1].series
    assert (script.requests[-1].frequency, sent.start.ToJsonString()) == ("MS", "2010-01-01T00:00:00Z")
    text = plot.read_text()
    assert text.startswith("<?xml")
    for word in ("<!-- ppm -->", "<!-- 2020 -->", "<!-- history -->", "<!-- 80 % interval -->", "<!-- anomaly -->"):
        assert word in text


def test_several_series_of_a_file(
    script: Script, sales: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ["--column", "sold", "--time", "month", "--id", "shop"]
    plot = tmp_path / "shops.png"
    assert main(["forecast", sales, *columns, "--horizon", "1", "--check", "2", "--plot", str(plot)]) == ExitCode.OK
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert [row[:2] for row in rows[:3]] == [["ID", "TIME"], ["north", "2020-01-01"], ["south", "2020-01-01"]]
    assert [row[:2] for row in rows[5:9]] == [
        [shop, day] for shop in ("north", "south") for day in ("2019-11-01", "2019-12-01")
    ]
    assert text.splitlines()[-1] == "1 missing value was filled"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["forecast", sales, *columns, "--horizon", "1", "--quantiles", "0.9,0.1", "--json"]) == ExitCode.OK
    north, south = json.loads(capsys.readouterr().out)
    assert (north["id"], north["levels"], north["timestamps"]) == ("north", [0.1, 0.9], ["2020-01-01"])
    assert (south["filled"], south["checks"]) == (1, [])


def test_hours_are_shown_without_seconds(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "load.csv"
    path.write_text("at,mw\n" + "\n".join(f"2024-01-0{1 + hour // 24}T{hour % 24:02}:30,{hour}" for hour in range(47)))
    assert main(["forecast", str(path), "--time", "at", "--column", "mw", "--horizon", "2"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines[1:3]] == ["2024-01-02 23:30", "2024-01-03 00:30"]


def test_the_future_of_covariates_sets_the_horizon(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.covariates = ("price", "calendar.month.sin")
    path = tmp_path / "sales.csv"
    path.write_text("sold,price\n" + "\n".join(f"{i},{i % 3}" for i in range(30)) + "\n,1\n,2\n")
    assert main(["forecast", str(path)]) == ExitCode.OK
    request = script.requests[-1]
    assert request.horizon == 2
    assert list(request.series[0].covariates["price"].values) == [*(i % 3 for i in range(30)), 1, 2]
    assert main(["forecast", str(path), "--horizon", "1"]) == ExitCode.OK
    assert len(script.requests[-1].series[0].covariates["price"].values) == 31
    path.write_text("sold\n1\n2\n")
    assert main(["forecast", str(path)]) == ExitCode.USAGE
    assert "no column 'price'" in capsys.readouterr().err


def test_a_backtest_compares_with_baselines(
    script: Script, north: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server repeats the last value: worse than any useful forecast."""
    plot = tmp_path / "backtest.svg"
    columns = ["--column", "sold", "--time", "month"]
    options = ["--horizon", "6", "--origins", "5", "--plot", str(plot)]
    assert main(["backtest", north, *columns, *options]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["lstm-co2", "seasonal", "naive", "Holt-Winters"]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["MASE", "pinball loss, ppm", "in the 80 % interval"]
    assert "5 forecasts of 6 steps, every 4 months of the last fifth" in lines
    assert any(line.startswith("seasonal naive is better than lstm-co2: MASE") for line in lines)
    assert any(line.startswith("Holt-Winters is better than lstm-co2: pinball loss") for line in lines)
    text = plot.read_text()
    for word in ("<!-- ppm -->", "<!-- 2019 -->", "<!-- forecast by lstm-co2 -->", "<!-- steps ahead -->"):
        assert word in text
    sent = script.requests[-1]
    assert [len(series.values) for series in sent.series] == [96, 100, 104, 108, 112], "what came before each origin"
    assert {series.start.ToJsonString() for series in sent.series} == {"2010-01-01T00:00:00Z"}


def test_a_backtest_of_several_series(script: Script, sales: str, capsys: pytest.CaptureFixture[str]) -> None:
    """MASE has each series' own unit: the error of the last value over the seasonal-naive error in training."""
    columns = ["--column", "sold", "--time", "month", "--id", "shop"]
    assert main(["backtest", sales, *columns, "--horizon", "1", "--origins", "8", "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert (found["origins"], found["stride"], found["horizon"]) == (8, 6, 1)
    ours, naive, _ = found["methods"]
    rows = [line.split(",") for line in Path(sales).read_text().splitlines()[1:]]
    errors = []
    for shop in ("north", "south"):
        sold = np.array([float(cell or "nan") for _, name, cell in rows if name == shop])
        scale = np.nanmean(np.abs(sold[12:96] - sold[:84]))
        errors += [abs(sold[t] - sold[t - 1]) / scale for t in range(96, 120, 6)]
    assert ours["figures"]["mase"]["value"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert ours["figures"]["mase"]["standard_error"] > 0
    assert 0.5 < naive["figures"]["mase"]["value"] < 1.5
    assert [(each["baseline"], each["figure"]) for each in found["comparisons"]] == [
        (name, figure) for name in ("seasonal naive", "Holt-Winters") for figure in ("MASE", "pinball loss")
    ]


def test_a_backtest_without_statsmodels(
    script: Script, north: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("statsmodels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    assert main(["backtest", north, "--column", "sold", "--horizon", "1", "--origins", "3"]) == ExitCode.OK
    said = capsys.readouterr()
    assert "Holt-Winters" not in said.out
    assert said.err == "rafaga: Holt-Winters is left out: it needs statsmodels: pip install 'rafaga[forecast]'\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1\n" * 30, "no series is long enough: the last fifth must hold a horizon of 12, after at least 24 values"),
        ("1\n" * 120, "repeats itself exactly"),
        ("x\n" + "\n".join([*map(str, range(80)), *["NA", "3"] * 20]), "missing values in every horizon"),
    ],
)
def test_files_that_cannot_be_tested(
    script: Script, tmp_path: Path, rows: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "series.csv"
    path.write_text(rows)
    assert main(["backtest", str(path), "--horizon", "12"]) == ExitCode.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantiles", "0.1,1"], "numbers between 0 and 1, separated by commas"),
        (["--plot", "chart.jpg"], "ends in .png or .svg"),
        (["--check", "0"], "must be an integer ≥ 1"),
    ],
)
def test_wrong_options(north: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["forecast", north, *arguments])
    assert message in capsys.readouterr().err


def test_a_plot_needs_matplotlib(
    script: Script, north: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("forecast", "backtest"):
        assert main([command, north, "--plot", str(tmp_path / "a.png")]) == ExitCode.OTHER
        assert (
            "--plot needs matplotlib, which is not installed: pip install 'rafaga[forecast]'" in capsys.readouterr().err
        )
