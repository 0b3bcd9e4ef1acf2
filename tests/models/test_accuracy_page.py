"""docs/accuracy.md: the figures of trained networks are those of their records, and the commands exist."""

from __future__ import annotations

import json
import re
import shlex
from itertools import takewhile

from models.entry import Shipped
from models.training import __main__ as training
from models.training.recipes import recipes
from models.zoo import catalogue
from rafaga.bundle import ForecastSpec
from tests.documents import ROOT

PAGE = (ROOT / "docs" / "accuracy.md").read_text()
SHIPPED = {
    n: e.weights.path for n, e in catalogue().items() if isinstance(e.weights, Shipped) and e.weights.path.exists()
}
FORECASTERS = {n for n in SHIPPED if isinstance(catalogue()[n].input, ForecastSpec)}


def table(first_column: str, heading: str) -> dict[str, list[str]]:
    """Cells by the first of each row, of the table under `heading` that begins with `first_column`."""
    lines = iter(PAGE.split(f"# {heading}\n")[1].splitlines())
    next(line for line in lines if line.startswith(f"| {first_column}".rstrip()))
    next(lines)  # the rule
    rows = ([cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in takewhile(str.strip, lines))
    return {name: cells for name, *cells in rows}


def recorded(name: str) -> tuple[str, dict[str, float]]:
    """The command that made the shipped weights, and their figures."""
    record = json.loads(SHIPPED[name].with_suffix(".json").read_text())
    return record["command"], {m["name"]: m["value"] for m in record["metrics"]}


def test_every_shipped_network_is_listed_with_its_command_and_figures() -> None:
    found = {
        shlex.split(command)[3]: (command, cells[0]) for command, cells in table("command", "Trained weights").items()
    }
    assert set(found) == set(SHIPPED)
    for name, (command, figure) in found.items():
        noted_command, noted = recorded(name)
        assert command == noted_command
        options = training.new_parser().parse_args(shlex.split(command)[3:])
        assert (options.epochs, options.seed) == (recipes()[name].schedule.epochs, 0), "the recipe's defaults"
        scale = 1 if name in FORECASTERS else 100
        figures = [f"{scale * v:.2f}" for key, v in noted.items() if not key.startswith(("coverage", "pinball"))]
        assert re.findall(r"\d+\.\d+", figure) == figures, name


def test_coverage_is_what_is_recorded() -> None:
    intervals = table("", "Forecasters: coverage of intervals")
    quantiles = table("", "Coverage of each quantile")
    assert set(intervals) == set(quantiles) == FORECASTERS
    for name in FORECASTERS:
        _, noted = recorded(name)
        assert intervals[name] == [f"{100 * noted[f'coverage_{percent}']:.1f}" for percent in (90, 80, 50)]
        points = [100 * noted[f"coverage_q{percent:02d}"] - percent for percent in (5, 10, 25, 50, 75, 90, 95)]
        assert quantiles[name] == [*(f"{p:+.1f}" for p in points), f"{sum(abs(p) <= 5 for p in points)} of 7"], name
