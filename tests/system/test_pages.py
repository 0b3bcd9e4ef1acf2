"""The pages that the project writes, opened in a browser: every plot shows something, and every word can be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from export import report
from export.speed import BatchTiming
from models.progress import Silent
from rafaga.bundle import Loss, Precision
from rafaga.load.report import page
from tests import bundles
from tests.browser import see
from tests.unit.load.test_report import ramp
from tests.unit.load.test_tally import counted, result, rows, run


def export_report(folder: Path) -> str:
    """Timings of a small model on a quick machine: a scale of milliseconds from hundredths to tenths."""
    bundles.publish_classifier(folder, "digits")
    measured = report.measure_bundle(folder / "digits" / "1", 0.001, 1, Silent())
    (fp32,) = measured.bundle.variants
    half, eighth = (
        msgspec.structs.replace(fp32, precision=precision, loss=Loss("top1", drop, 0.005, 120), default_eligible=False)
        for precision, drop in ((Precision.FP16, 0.001), (Precision.INT8, 0.1234))
    )
    layers = msgspec.structs.replace(eighth, float_layers=("conv1", "conv2"))
    milliseconds = (0.016, 0.024, 0.041, 0.074, 0.194, 0.374)
    timings = {
        precision: [BatchTiming(2**i, factor * ms, 1.2 * factor * ms) for i, ms in enumerate(milliseconds)]
        for precision, factor in ((Precision.FP32, 1.0), (Precision.FP16, 1.1), (Precision.INT8, 0.4))
    }
    bundle = msgspec.structs.replace(measured.bundle, variants=(fp32, half, layers))
    return report.render([replace(measured, bundle=bundle, timings=timings)], threads=1)


@pytest.mark.parametrize(
    ("write", "panels"),
    [
        pytest.param(lambda _: page.render(ramp()), [2, 2, 1, 3, 1, 1], id="load"),
        pytest.param(lambda _: page.render(run(result(counted(rows()), 0.1))), [2, 1, 1, 1, 1], id="load, one step"),
        pytest.param(export_report, [2], id="export"),
    ],
)
def test_every_plot_shows_something_and_every_word_can_be_read(
    write: Callable[[Path], str], panels: list[int], tmp_path: Path
) -> None:
    seen = see(write(tmp_path), tmp_path)
    assert [len(plot.axes) for plot in seen.plots] == panels
    for plot in seen.plots:
        assert all(seen.colourful(axes) > 0.005 for axes in plot.axes)
        assert plot.collisions == []
        assert plot.cut == []
    assert seen.width <= seen.pixels.shape[1], "no sideways scrolling"
