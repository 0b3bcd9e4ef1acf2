"""make bench-gpu without a GPU: models packed and drawn again, the table, and what is said where there is nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from bench import gpu
from bench.gpu import Results, Served, Settings, report
from bench.gpu_models import BOTH, Workload, pack_bundle, sample, unpack
from bench.gpu_raw import Figure
from rafaga import bundle as bundles
from rafaga.bundle import Precision, TensorSpec
from rafaga.errors import DeviceError
from rafaga.server.batcher import BatchPolicy
from rafaga.server.devices import CPU
from rafaga.server.loader import Loader
from rafaga.server.metrics import Metrics
from rafaga.server.placement import Placement
from tests.bundles import publish_classifier


@pytest.mark.parametrize("precision", BOTH)
def test_a_model_is_carried_without_its_weights(tmp_path: Path, precision: Precision) -> None:
    """1. The packed file has none. 2. Unpacked it has as many as before. 3. It is a bundle that is served."""
    folder = publish_classifier(tmp_path / "from")
    pack_bundle(folder, tmp_path / "packed", large=1000)
    assert (tmp_path / "packed" / "model.onnx").stat().st_size < 2000 < (folder / "model.onnx").stat().st_size
    unpacked = unpack(tmp_path / "packed", tmp_path / "to", precision, max_batch_size=64)
    drawn = onnx.load(unpacked / "model.onnx").graph.initializer
    assert {tuple(t.dims) for t in drawn} >= {(784, 10)}
    bundle = bundles.load(unpacked)
    assert (bundle.max_batch_size, [v.precision for v in bundle.variants]) == (64, [precision])
    served = Loader(BatchPolicy(), 8, None, Placement(threads=1), Metrics()).load(unpacked, bundle)
    served.close()


def test_samples_fill_free_dimensions() -> None:
    image, series, length = sample(
        (
            TensorSpec(name="image", dtype="uint8", shape=(None, None, None, 3)),
            TensorSpec(name="history", dtype="float32", shape=(None, None)),
            TensorSpec(name="length", dtype="int64", shape=(None,)),
        ),
        3,
    )
    assert (image.shape, image.dtype) == ((3, 224, 224, 3), np.uint8)
    assert (series.shape, length.tolist()) == ((3, 240), [240, 240, 240])


def test_the_table() -> None:
    settings = Settings(models=(Workload("resnet50", BOTH, 16),))
    results = Results(
        raw=[
            Figure("onnxruntime", "resnet50", "fp16", 1000.0, 32, 3.0, ""),
            Figure("onnxruntime", "resnet50", "fp16", 2000.0, 128, 9.5, "NHWC CUDA graph"),
            Figure("torch-eager", "resnet50", "fp16", 900.0, 8, 1.0, ""),
        ],
        served=[Served("resnet50", "fp16", 1900.0, 64.0, 4.0, None)],
        left_out=["TensorRT: cannot load libnvinfer.so.10"],
    )
    text = report(settings, results, CPU)
    assert "REHEARSAL" in text
    best = "2,000 (128) NHWC CUDA graph | 9.50 | 900 (8) | – | – | 1,900 | 0.95 | 64 | 4.00 | – |"
    assert f"| resnet50 | fp16 | {best}" in text
    assert "| resnet50 | fp32 | – | – |" in text
    assert "- not measured: TensorRT: cannot load libnvinfer.so.10" in text


def test_no_gpu_is_said_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def check(*_: object) -> None:
        raise DeviceError("cannot load libcuda.so.1")

    monkeypatch.setattr(gpu.devices, "check", check)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--packed", str(tmp_path)])
    assert gpu.main() == 1
    assert "no GPU to measure: cannot load libcuda.so.1" in capsys.readouterr().err


def test_models_that_were_not_prepared_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--device", "cpu", "--models", "vgg16", "--packed", str(tmp_path)])
    assert gpu.main() == 1
    assert "lacks vgg16: python -m bench.gpu prepare" in capsys.readouterr().err
