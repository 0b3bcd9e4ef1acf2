"""The demonstration: its data, pictures and histogram, the server process, and which bundles are exported again."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client import generate_latest

from demo import batches, bundles, co2, digits
from demo.__main__ import go_on
from demo.bundles import ROOT
from demo.page import Page
from demo.server import ServerFailed, ServerProcess
from rafaga import Forecast, ModelInfo, Timing
from rafaga.server.observability.metrics import BatchRecord, Metrics
from tests.bundles import publish_classifier


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


def test_batch_sizes_are_those_of_the_servers_histogram() -> None:
    metrics = Metrics()
    metrics.model("idle")
    for model, rows in (("digits", 2), ("digits", 2), ("digits", 7), ("digits", 32), ("others", 1)):
        metrics.model(model).batches.append(BatchRecord(rows, 0.001, [0.0] * rows))
    text = generate_latest(metrics.registry).decode()
    sizes = batches.read(text, "digits")
    assert (sizes.batches, sizes.rows, sizes.mean) == (4, 43, 10.75)
    assert sizes.labelled() == [("2", 2), ("3-4", 0), ("5-8", 1), ("9-16", 0), ("17-32", 1)]
    idle = batches.read(text, "idle")
    assert (idle.labelled(), idle.mean) == ([], 0)
    with pytest.raises(KeyError, match="absent"):
        batches.read(text, "absent")


def test_a_bundle_that_verifies_is_not_exported_again(tmp_path: Path) -> None:
    assert bundles.published(tmp_path, "digits") is None
    publish_classifier(tmp_path)
    newest = publish_classifier(tmp_path)
    found = bundles.published(tmp_path, "digits")
    assert found is not None
    assert found.version == 2
    model = newest / "model.onnx"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert bundles.published(tmp_path, "digits") is None


def test_a_failed_export_says_which_command_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(bundles.ExportFailed, match="python -m export no-such-model"):
        bundles.export(tmp_path, ["no-such-model"])


def test_a_server_starts_and_stops_or_leaves_its_log(tmp_path: Path) -> None:
    publish_classifier(tmp_path / "repository")
    server = ServerProcess(tmp_path / "repository", tmp_path / "log")
    try:
        server.start()
        assert server.grpc_port
        assert server.metrics_url.startswith("http://127.0.0.1:")
        assert server.stop() == 0
    finally:
        server.kill()
    absent = ServerProcess(tmp_path / "absent", tmp_path / "absent.log")
    assert absent.last_log_lines() == ""
    with pytest.raises(ServerFailed, match="exit code"):
        absent.start()
    assert absent.last_log_lines()


def test_the_end_names_commands_and_files_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    go_on(Page(), Path("repository"))
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert commands[0] == ["make", "serve"]
    files = [word.lstrip("@") for command in commands for word in command if word.endswith((".png", ".csv"))]
    assert len(files) == len(commands[1:]) == 3
    assert all((ROOT / file).is_file() for file in files)
    go_on(Page(), tmp_path)
    assert f"rafaga serve {tmp_path}" in capsys.readouterr().out
