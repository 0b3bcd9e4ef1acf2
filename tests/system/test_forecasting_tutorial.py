"""docs/forecasting-tutorial.md from its first file to its last command; quickly, and nightly in full."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
import pytest

from models.own import ForecasterRecord
from rafaga import bundle as bundles
from tests.documents import blocks
from tests.system.test_tutorial import Walk, said, walking

PAGE = "docs/forecasting-tutorial.md"


class QuickWalk(Walk):
    """One epoch on the last hundred months, of a GRU, which is traced in a tenth of the LSTM's time."""

    def give(self, command: str) -> None:
        training = command.startswith("python -m models.training")
        super().give(f"{command} --cell gru --epochs 1" if training else command)
        if command == "python elnino.py":
            path = self.folder / "elnino.csv"
            header, *rows = path.read_text().splitlines()
            path.write_text("\n".join([header, *rows[-100:]]))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(QuickWalk, id="quick"),
        pytest.param(Walk, id="full", marks=[pytest.mark.nightly, pytest.mark.timeout(1200)]),
    ],
)
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    with walking(tmp_path_factory.mktemp("forecasting"), PAGE, request.param) as walked:
        yield walked


def recorded(walk: Walk) -> ForecasterRecord:
    folder = walk.folder / "runs/forecasters/lstm-elnino"
    return msgspec.json.decode((folder / "forecaster.json").read_bytes(), type=ForecasterRecord)


def test_a_series_is_trained_on_published_and_forecast(walk: Walk) -> None:
    assert "one per month, season 12 steps (found)" in said(walk, "python -m models.training")
    spec = bundles.load(walk.folder / "repository/lstm-elnino/1").forecast
    assert spec == recorded(walk).spec
    assert spec
    assert (spec.season, spec.step, spec.unit, spec.max_horizon) == (12, "month", "°C", 12)
    _, *rows = said(walk, "rafaga forecast").splitlines()
    values = [[float(word) for word in row.split()[1:]] for row in rows[:12]]
    assert all(5 < row[0] <= row[3] <= row[6] < 45 for row in values), "degrees of the sea"
    assert [row.split()[0] for row in rows[:12:11]] == ["2011-01-01", "2011-12-01"]
    months = [line.split(":")[0] for line in said(walk, "python ask.py").splitlines()]
    assert months == ["January 2011", "February 2011", "March 2011"]
    for plot in ("elnino.png", "backtest.png"):
        assert (walk.folder / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("number", "command"), [(0, "python -m models.training"), (1, "rafaga backtest")])
def test_the_page_shows_what_is_printed(walk: Walk, number: int, command: str) -> None:
    """The same sentences, in full with about the same figures: the last digits depend on the processor."""
    found = [sentence(line) for line in said(walk, command).splitlines()]
    for line in blocks(PAGE, "text")[number].lines:
        words, numbers = sentence(line)
        if isinstance(walk, QuickWalk):  # another network and fewer origins, with other verdicts
            beginnings = {other[:6] for other, _ in found}
            assert words[:6] in beginnings or "difference" in words or "forecasts of" in words, line
        else:
            same = pytest.approx(numbers, rel=0.3, abs=0.1)
            assert any(words == other and values == same for other, values in found), line


def sentence(line: str) -> tuple[str, list[float]]:
    """The words, and the numbers, of a line."""
    words = " ".join(re.sub(r"[+-]?\d+(\.\d+)?", "#", line).split())
    return words, [float(word) for word in re.findall(r"[+-]?\d+(?:\.\d+)?", line)]
