"""fp16 and int8 files: their contents, the accuracy gate, and which layers it returns to float."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import accuracy, engines, precisions
from export.accuracy import Measured
from export.arrays import Array
from export.engines import in_openvino
from export.evidence import ImageEvidence, Sources
from export.graph import serving_graph
from export.onnx import to_onnx
from export.precisions import Judge, LeftOut
from export.samples import ImageData, ImageSet
from export.variants import calibrated
from export.verify import ParityCase, open_session, tensor_specs
from models.entry import Entry, ImageInput
from models.progress import Silent
from rafaga.bundle import Precision, Task, Variant
from rafaga.errors import DeviceError
from rafaga.processor import instruction_set

SIZE = 8
SMALLER = (Precision.FP16, Precision.INT8)


class Outlier(nn.Module):
    """Separates dark from bright by a small signal next to a value a thousand times as large.

    `widen` puts both into one tensor, where 256 steps cannot hold them; `read` then sees steps only. The two layers
    around them may be quantised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.widen = nn.Conv2d(3, 4, 1)
        self.read = nn.Conv2d(4, 2, 1)
        self.last = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.first.weight[:] = torch.eye(3)[:, :, None, None]
            self.widen.weight[0, 0] = 1.0
            assert self.widen.bias is not None
            assert self.read.bias is not None
            self.widen.bias[3] = 1000.0
            self.read.weight[0, 0], self.read.weight[1, 0] = 1.0, -1.0
            self.read.bias[1] = 1.0
            self.last.weight[:] = 8 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.read(self.widen(self.first(image)))
        logits: Tensor = self.last(x.mean(dim=(2, 3)))
        return logits


INPUT = ImageInput(SIZE, SIZE, 3, mean=(0.0,) * 3, std=(1.0,) * 3)
ENTRY = Entry(
    "outlier", "four layers", Task.CLASSIFICATION, "brightness", Outlier, INPUT, labels=lambda: ("dark", "bright")
)


def images(count: int, seed: int) -> ImageSet:
    """Brightness from 30 to 225, dark below the middle. White noise stays well below the difference."""
    rng = np.random.default_rng(seed)
    level = np.where(np.arange(count) % 2, rng.uniform(150, 225, count), rng.uniform(30, 105, count))
    pixels = np.clip(level[:, None, None, None] + rng.normal(0, 3, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)

    def read(rows: Sequence[int]) -> Array:
        return pixels[np.asarray(rows)]

    return ImageSet(f"brightness {seed}", (np.arange(count) % 2).astype(np.int64), read)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Of the outlier network, with fp32 traced and measured."""
    path = tmp_path_factory.mktemp("outlier") / "model.onnx"
    graph = serving_graph(ENTRY, Outlier())
    evidence = ImageEvidence(ENTRY, INPUT, ImageData(images(200, 1), images(64, 2), images(100, 3)), Sources())
    to_onnx(graph, evidence.example(), path)
    cases = [ParityCase(inputs, graph.reference(inputs)) for inputs in evidence.batches()]
    baseline = evidence.measure(open_session(path), lambda *_: None)
    assert accuracy.value_of("top1", baseline.metrics) == 1.0
    return Judge(path, baseline, cases, evidence, trained=True, max_accuracy_drop=0.005, steps=Silent())


@pytest.fixture
def judge(traced: Judge, tmp_path: Path) -> Judge:
    """With a copy of the file, in a folder of the test's own."""
    return replace(traced, fp32=Path(shutil.copy(traced.fp32, tmp_path)))


@pytest.fixture(scope="module")
def variants(traced: Judge) -> dict[Precision, Variant]:
    return {variant.precision: variant for variant in traced.variants(SMALLER)[0]}


def test_fp16_holds_half_precision_and_keeps_the_softmax(traced: Judge, variants: dict[Precision, Variant]) -> None:
    expected = tensor_specs(open_session(traced.fp32))
    for variant in variants.values():
        assert tensor_specs(open_session(traced.fp32.with_name(variant.file))) == expected
    graph = onnx.load(traced.fp32.with_name(variants[Precision.FP16].file)).graph
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in graph.initializer if tensor.dims}
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    cast = next(node for node in graph.node if node.output[0] == softmax.input[0])
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)
    assert variants[Precision.FP16].parity.max_relative_error < 2e-2


def test_the_gate_returns_sensitive_layers_to_float(judge: Judge, variants: dict[Precision, Variant]) -> None:
    """Quantised as a whole the network fails; with the two sensitive layers in float it loses nothing."""
    with calibrated(judge.fp32, judge._images.calibration()) as graph:
        assert len(graph.layers) == 4
        _, widen, read, _ = graph.layers
        graph.quantise(judge.fp32.with_name("whole.onnx"))
        whole = judge.evidence.measure(open_session(judge.fp32.with_name("whole.onnx")), lambda *_: None)
    assert (accuracy.value_of("top1", whole.metrics) or 0) < 0.9
    int8 = variants[Precision.INT8]
    assert set(int8.float_layers) == {widen, read}
    assert accuracy.value_of("top1", int8.metrics) == 1.0
    assert int8.default_eligible


def test_the_other_layers_are_int8_with_a_scale_per_channel(traced: Judge, variants: dict[Precision, Variant]) -> None:
    quantised = onnx.load(traced.fp32.with_name(variants[Precision.INT8].file)).graph
    weights = {t.name for t in quantised.initializer if t.data_type == onnx.TensorProto.INT8}
    assert any(node.op_type == "QuantizeLinear" for node in quantised.node), "activations are quantised too"
    dims = {t.name: tuple(t.dims) for t in quantised.initializer}
    dequantised = [n.input for n in quantised.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert sorted(dims[scale] for _, scale, *_ in dequantised) == [(2,), (3,)]


def test_variants_that_lose_too_much_or_are_unmeasured_are_not_chosen(judge: Judge) -> None:
    found, _ = replace(judge, max_accuracy_drop=-0.1).variants(SMALLER)
    assert [(variant.default_eligible, bool(variant.metrics)) for variant in found] == [(False, True)] * 2
    (int8,), _ = replace(judge, trained=False, baseline=Measured(), max_accuracy_drop=1).variants((Precision.INT8,))
    assert (int8.metrics, int8.default_eligible, int8.float_layers) == ((), False, ())


def test_an_fp16_file_that_is_not_finite_is_not_kept(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model keeps its other files."""

    def overflowing(source: Path, target: Path) -> None:
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT:
                array = np.full(tuple(tensor.dims), np.inf, np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(model, target)

    monkeypatch.setattr(precisions, "to_fp16", overflowing)
    made, left_out = replace(judge, trained=False, baseline=Measured()).variants(SMALLER)
    assert [variant.precision for variant in made] == ["int8"]
    assert left_out == [LeftOut(Precision.FP16, "output probabilities is not finite")]
    assert not judge.fp32.with_name("model.fp16.onnx").exists()


@pytest.mark.parametrize(("step", "lost", "kept"), [("to_fp16", "fp16", "int8"), ("calibrated", "int8", "fp16")])
def test_a_failing_converter_affects_only_its_own_file(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, step: str, lost: str, kept: str
) -> None:
    """A partial file is removed."""
    partial = judge.fp32.with_name(f"model.{lost}.onnx")

    def broken(*_: object, **__: object) -> None:
        partial.write_bytes(b"half")
        raise NotImplementedError("no kernel for Whirl\nwith details")

    monkeypatch.setattr(precisions, step, broken)
    made, left_out = judge.variants(SMALLER)
    assert [variant.precision for variant in made] == [kept]
    assert left_out == [LeftOut(Precision(lost), "NotImplementedError: no kernel for Whirl")]
    assert not partial.exists()
    assert judge.fp32.with_name(f"model.{kept}.onnx").is_file()


def test_openvino_is_measured_like_a_file(
    judge: Judge, variants: dict[Precision, Variant], traced: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(engines, "has_bf16", lambda: True)  # without its instructions OpenVINO computes in float32
    files = (Variant(precision=Precision.FP32, file="model.onnx", parity=variants[Precision.FP16].parity),)
    found, reasons = in_openvino(traced, (*files, *variants.values()), bf16=True)
    assert ([e.precision for e in found], reasons) == (["fp32", "int8", "bf16"], {})
    for engine in found:
        assert (engine.engine, engine.instruction_set) == ("openvino", instruction_set(engine.precision))
        assert accuracy.value_of("top1", engine.metrics) == 1.0
        assert (engine.default_eligible, engine.loss) == (True, engine.losses[0])
    strict, _ = in_openvino(replace(judge, max_accuracy_drop=-0.1), files, bf16=True)
    assert [e.default_eligible for e in strict] == [True, False], "fp32 is proven by its parity"
    assert strict[0].parity.max_relative_error < 1e-5


def test_bf16_needs_openvino_and_its_instructions(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_bf16", lambda: False)
    monkeypatch.setattr(engines, "runtime", lambda: None)
    lacking = {Precision.BF16: "this processor has no instructions for bf16"}
    assert in_openvino(judge, (), bf16=True) == ([], lacking)

    def missing() -> None:
        raise DeviceError("OpenVINO is not installed")

    monkeypatch.setattr(engines, "runtime", missing)
    assert in_openvino(judge, (), bf16=True) == ([], {Precision.BF16: "OpenVINO is not installed"})
    assert in_openvino(judge, (), bf16=False) == ([], {})


def test_top1_and_its_progress(traced: Judge) -> None:
    session = open_session(traced.fp32)
    source = images(50, 9)
    flipped = ImageSet("half wrong", np.where(np.arange(50) < 25, source.labels, 1 - source.labels), source.read)
    progress: list[tuple[int, int]] = []
    (metric,) = accuracy.classify(session, flipped, advance=lambda *done: progress.append(done)).metrics
    assert (metric.name, metric.value, metric.samples, metric.dataset) == ("top1", 0.5, 50, "half wrong")
    assert progress[-1] == (50, 50)
    (limited,) = accuracy.classify(session, flipped, limit=10).metrics
    assert (limited.samples, limited.value) == (10, 0.5), "rows are spread over the whole set"


def test_ties_count_against_the_model() -> None:
    ranks = accuracy._rank_of(np.array([1, 1]), np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]))
    assert ranks.tolist() == [1, 0]
    assert accuracy._rank_of(np.array([0]), np.full((1, 3), np.nan)).tolist() == [2]
