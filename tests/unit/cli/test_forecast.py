"""`rafaga forecast` and `rafaga backtest`: files with times, gaps and several series, tables, plots and JSON."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rafaga.cli._errors import ExitCode
from tests.unit.cli.conftest import Rafaga
from tests.unit.client.fake_server import Script

MONTHS = [str(month) for month in np.arange("2010-01", "2020-01", dtype="datetime64[M]")]
SOLD = ("--column", "sold", "--time", "month")


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


def drawn(plot: Path, *words: str) -> bool:
    """Whether an SVG has these words."""
    text = plot.read_text()
    return text.startswith("<?xml") and all(f"<!-- {word} -->" in text for word in words)


def test_values_of_a_file_and_of_standard_input(
    script: Script, tmp_path: Path, rafaga: Rafaga, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = tmp_path / "co2.csv"
    csv.write_text("\ufeffdate,ppm\n" + "\n".join(f"1958-{i},{300 + i}" for i in range(30)))
    ran = rafaga("forecast", str(csv), "--model", "lstm-co2", "--horizon", "2")
    assert ran.rows[:3] == [["STEP", "Q0.1", "Q0.5", "Q0.9"], ["1", "328", "329", "330"], ["2", "328", "329", "330"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n3\n"))
    answer = json.loads(rafaga("forecast", "--json").out)
    assert (answer["levels"], answer["values"][1]) == ([0.1, 0.5, 0.9], [3.0] * 24)


def test_times_follow_those_of_the_file(script: Script, north: str, tmp_path: Path, rafaga: Rafaga) -> None:
    plot = tmp_path / "north.svg"
    ran = rafaga("forecast", north, *SOLD, "--horizon", "2", "--check", "1", "--plot", str(plot))
    assert [row[0] for row in ran.rows[:3]] == ["TIME", "2020-01-01", "2020-02-01"]
    assert ran.rows[5][:: len(ran.rows[5]) - 1] == ["2019-12-01", "anomaly"], "far from 0, which the server expects"
    assert max(map(len, ran.out.splitlines())) <= 80
    (sent,) = script.requests[-1].series
    assert (script.requests[-1].frequency, sent.start.ToJsonString()) == ("MS", "2010-01-01T00:00:00Z")
    assert drawn(plot, "ppm", "2020", "history", "80 % interval", "anomaly")


def test_several_series_of_a_file(script: Script, sales: str, tmp_path: Path, rafaga: Rafaga) -> None:
    options = [*SOLD, "--id", "shop", "--horizon", "1"]
    plot = tmp_path / "shops.png"
    ran = rafaga("forecast", sales, *options, "--check", "2", "--plot", str(plot))
    shops = [["north", "2020-01-01"], ["south", "2020-01-01"]]
    assert [row[:2] for row in ran.rows[:3]] == [["ID", "TIME"], *shops]
    checked = [[shop, day] for shop in ("north", "south") for day in ("2019-11-01", "2019-12-01")]
    assert [row[:2] for row in ran.rows[5:9]] == checked
    assert ran.out.splitlines()[-1] == "1 missing value was filled"
    assert plot.read_bytes().startswith(b"\x89PNG")
    north, south = json.loads(rafaga("forecast", sales, *options, "--quantiles", "0.9,0.1", "--json").out)
    assert (north["id"], north["levels"], north["timestamps"]) == ("north", [0.1, 0.9], ["2020-01-01"])
    assert (south["filled"], south["checks"]) == (1, [])


def test_hours_are_shown_without_seconds(script: Script, tmp_path: Path, rafaga: Rafaga) -> None:
    path = tmp_path / "load.csv"
    path.write_text("at,mw\n" + "\n".join(f"2024-01-0{1 + hour // 24}T{hour % 24:02}:30,{hour}" for hour in range(47)))
    ran = rafaga("forecast", str(path), "--time", "at", "--column", "mw", "--horizon", "2")
    assert [line[:16] for line in ran.out.splitlines()[1:3]] == ["2024-01-02 23:30", "2024-01-03 00:30"]


def test_the_future_of_covariates_sets_the_horizon(script: Script, tmp_path: Path, rafaga: Rafaga) -> None:
    script.covariates = ("price", "calendar.month.sin")
    path = tmp_path / "sales.csv"
    path.write_text("sold,price\n" + "\n".join(f"{i},{i % 3}" for i in range(30)) + "\n,1\n,2\n")
    assert rafaga("forecast", str(path)).code == ExitCode.OK
    request = script.requests[-1]
    assert request.horizon == 2
    assert list(request.series[0].covariates["price"].values) == [*(i % 3 for i in range(30)), 1, 2]
    assert rafaga("forecast", str(path), "--horizon", "1").code == ExitCode.OK
    assert len(script.requests[-1].series[0].covariates["price"].values) == 31
    path.write_text("sold\n1\n2\n")
    ran = rafaga("forecast", str(path))
    assert (ran.code, "no column 'price'" in ran.err) == (ExitCode.USAGE, True)


def test_a_backtest_compares_with_baselines(script: Script, north: str, tmp_path: Path, rafaga: Rafaga) -> None:
    """The server repeats the last value: worse than any useful forecast."""
    plot = tmp_path / "backtest.svg"
    ran = rafaga("backtest", north, *SOLD, "--horizon", "6", "--origins", "5", "--plot", str(plot))
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert ran.rows[0] == ["lstm-co2", "seasonal", "naive", "Holt-Winters"]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["MASE", "pinball loss, ppm", "in the 80 % interval"]
    assert "5 forecasts of 6 steps, every 4 months of the last fifth" in lines
    assert any(line.startswith("seasonal naive is better than lstm-co2: MASE") for line in lines)
    assert any(line.startswith("Holt-Winters is better than lstm-co2: pinball loss") for line in lines)
    assert drawn(plot, "ppm", "2019", "forecast by lstm-co2", "steps ahead")
    sent = script.requests[-1]
    assert [len(series.values) for series in sent.series] == [96, 100, 104, 108, 112], "what came before each origin"
    assert {series.start.ToJsonString() for series in sent.series} == {"2010-01-01T00:00:00Z"}


def test_a_backtest_of_several_series(script: Script, sales: str, rafaga: Rafaga) -> None:
    """MASE has each series' own unit: the error of the last value over the seasonal-naive error in training."""
    options = ["--id", "shop", "--horizon", "1", "--origins", "8", "--json"]
    found = json.loads(rafaga("backtest", sales, *SOLD, *options).out)
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
    script: Script, north: str, monkeypatch: pytest.MonkeyPatch, rafaga: Rafaga
) -> None:
    for name in [name for name in sys.modules if name.startswith("statsmodels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    ran = rafaga("backtest", north, "--column", "sold", "--horizon", "1", "--origins", "3")
    assert ran.code == ExitCode.OK
    assert "Holt-Winters" not in ran.out
    assert ran.err == "rafaga: Holt-Winters is left out: it needs statsmodels: pip install 'rafaga[forecast]'\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1\n" * 30, "no series is long enough: the last fifth must hold a horizon of 12, after at least 24 values"),
        ("1\n" * 120, "repeats itself exactly"),
        ("x\n" + "\n".join([*map(str, range(80)), *["NA", "3"] * 20]), "missing values in every horizon"),
    ],
)
def test_files_that_cannot_be_tested(script: Script, tmp_path: Path, rows: str, message: str, rafaga: Rafaga) -> None:
    path = tmp_path / "series.csv"
    path.write_text(rows)
    ran = rafaga("backtest", str(path), "--horizon", "12")
    assert ran.code == ExitCode.USAGE
    assert message in ran.err


@pytest.mark.parametrize("command", ["forecast", "backtest"])
def test_a_plot_needs_matplotlib(
    script: Script, north: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rafaga: Rafaga, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = rafaga(command, north, "--plot", str(tmp_path / "a.png"))
    assert ran.code == ExitCode.OTHER
    assert "--plot needs matplotlib, which is not installed: pip install 'rafaga[forecast]'" in ran.err
