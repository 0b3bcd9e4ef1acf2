"""The demonstration's data, figures and picture."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import co2, digits
from rafaga import Forecast, ModelInfo, Timing


def test_scikit_learns_digits_take_mnists_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "_folders", lambda: iter([tmp_path]))
    found = digits.load()
    assert (found.images.shape, found.images.dtype) == ((1797, 28, 28), np.uint8)
    assert set(found.labels) == set(range(10))
    ink = found.images.astype(float)
    centre = (ink.sum(axis=2) * np.arange(28)).sum(axis=1) / ink.sum(axis=(1, 2))
    assert abs(centre - 13.5).max() <= 1
    assert ink[:, [0, -1]].sum() == 0


def test_mnist_is_read_from_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, labels = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8), np.array([7, 3], np.uint8)
    (tmp_path / "mnist").mkdir()
    for name, shape, values in (("images-idx3", (2, 28, 28), images), ("labels-idx1", (2,), labels)):
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        (tmp_path / "mnist" / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    monkeypatch.setenv("RAFAGA_DATA", str(tmp_path))
    found = digits.load()
    assert found.source == "MNIST, test"
    np.testing.assert_array_equal(found.images.ravel(), images)
    assert found.labels.tolist() == [7, 3]


def test_a_forecast_its_figures_and_its_picture(tmp_path: Path) -> None:
    values = np.stack([np.full(24, level, np.float32) for level in (399, 400, 402)])
    values[2, 0] = 400.5  # the truth is outside in the first month
    forecast = Forecast((0.1, 0.5, 0.9), values, ModelInfo("lstm-co2", 1, True, "fp32"), Timing(0, 0, 0, 1))
    outlook = co2.Outlook(np.linspace(300, 400, 502, dtype=np.float32), np.full(24, 401, np.float32), forecast)
    assert (outlook.error_ppm, outlook.inside) == (1, 23)
    assert 1 < outlook.naive_error_ppm < 5
    assert co2.months(526)[-1] == "2001-12"
    path = tmp_path / "new" / "forecast.png"
    co2.draw(outlook, path)
    with Image.open(path) as picture:
        assert picture.size == (1200, 600)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    # matplotlib's tab:blue for the median, tab:red for the truth.
    assert {(31, 119, 180), (214, 39, 40)} <= colours
