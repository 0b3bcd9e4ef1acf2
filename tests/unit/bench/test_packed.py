"""Packed bundles: small, complete again on arrival and served; small ones keep their weights."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from bench import packed
from bench.packed import found, pack, pack_repository, unpack
from export.variants import to_fp16
from rafaga import bundle as bundles
from rafaga.bundle import Parity, Precision, Variant
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.selection import Placement
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.golden import Golden
from rafaga.server.repository.loader import Loader
from rafaga.server.scheduling.batcher import BatchPolicy
from tests.bundles import publish_classifier, publish_detector, publish_forecaster

FILES = {Precision.FP32: "model.onnx", Precision.FP16: "model.fp16.onnx", Precision.INT8: "model.int8.onnx"}


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Its largest float weights as int8, with a DequantizeLinear before their use."""
    weights = max(model.graph.initializer, key=lambda t: np.prod(t.dims))
    values = onnx.numpy_helper.to_array(weights)
    scale = np.asarray(np.abs(values).max() / 127, np.float32)
    name = weights.name
    weights.CopyFrom(onnx.numpy_helper.from_array((values / scale).round().astype(np.int8), f"{name}_int8"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "scale"))
    model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [f"{name}_int8", "scale"], [name]))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of one model in fp32, fp16, and with weights of 8 bits."""
    folder = publish_classifier(tmp_path / "from")
    to_fp16(folder / "model.onnx", folder / "model.fp16.onnx")
    onnx.save(rounded(onnx.load(folder / "model.onnx")), folder / "model.int8.onnx")
    parity = Parity(max_absolute_error=0.01, max_relative_error=0.01, batch_sizes=(1,))
    variants = tuple(Variant(precision=precision, file=file, parity=parity) for precision, file in FILES.items())
    files = {file: bundles.sha256_of(folder / file) for file in (*FILES.values(), bundles.GOLDEN)}
    bundle = msgspec.structs.replace(bundles.load(folder), variants=variants, files=files)
    (folder / bundles.MANIFEST).write_bytes(msgspec.json.encode(bundle))
    return folder


@pytest.mark.parametrize("precision", FILES)
def test_it_is_carried_without_its_weights(tmp_path: Path, folder: Path, precision: Precision) -> None:
    """1. The packed files have none. 2. Unpacked, each has as many as before. 3. It is a bundle that is served."""
    target = tmp_path / "packed" / "digits"
    pack(folder, target, large=1000)
    assert max(file.stat().st_size for file in target.glob("*.onnx")) < 2000 < (folder / "model.onnx").stat().st_size
    assert not (target / bundles.GOLDEN).exists()
    unpacked = unpack(target, tmp_path / "to", precision, max_batch_size=64)
    assert {tuple(t.dims) for t in onnx.load(unpacked / "model.onnx").graph.initializer} >= {(784, 10)}
    bundle = bundles.load(unpacked)
    assert (bundle.max_batch_size, [v.precision for v in bundle.variants]) == (64, [precision])
    Loader(BatchPolicy(), 8, PerModel(None), Placement(), Metrics()).load(unpacked, bundle).close()


def test_small_models_keep_their_weights(tmp_path: Path, folder: Path) -> None:
    """With PyTorch's answers, and what export measured of every variant."""
    pack(folder, tmp_path / "packed")
    for precision in FILES:
        unpacked = unpack(tmp_path / "packed", tmp_path / precision, precision)
        bundle = bundles.load(unpacked)
        assert bundle.variants[0].parity.max_relative_error == 0.01
        golden, before = Golden.load(bundle, unpacked / bundles.GOLDEN), Golden.load(bundle, folder / bundles.GOLDEN)
        for mine, theirs in zip(golden.outputs, before.outputs, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_repository_is_packed_with_the_newest_of_every_model(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = folder.parent.parent
    publish_forecaster(repository)
    publish_detector(repository)
    publish_detector(repository)
    target = tmp_path / "packed"
    assert len(pack_repository(repository, target)) == 3
    assert {json.loads(path.read_text())["version"] for path in target.glob("*/bundle.json")} == {1, 2}
    variants = [(path.name, precision) for path, precision in found(target)]
    assert len(variants) == len(set(variants)) == 5
    assert packed.main([str(repository), str(tmp_path / "again")]) == 0
    assert "again: 3 bundles, 0 MB" in capsys.readouterr().out
    assert packed.main([str(tmp_path), str(tmp_path / "nothing")]) == 1
