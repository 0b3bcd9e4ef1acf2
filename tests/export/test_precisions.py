"""fp16 and int8 files: their contents, the accuracy gate, layers that return to float, losses that a mean hides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import accuracy, engines, precisions
from export.accuracy import Answers, Measured, Part
from export.arrays import Array
from export.engines import in_openvino
from export.losses import Criterion, allowed_loss
from export.precisions import AGREEMENT, TOP1, Judge, LeftOut
from export.samples import ImageData, ImageSet
from export.variants import calibrated
from export.verify import open_session, tensor_specs
from models.entry import Entry, ImageInput
from rafaga.bundle import Metric, Precision, Task, Variant
from rafaga.errors import DeviceError
from rafaga.processor import instruction_set
from tests.export.exporting import traced_judge

SMALLER = (Precision.FP16, Precision.INT8)
SIZE = 8
INPUT = ImageInput(SIZE, SIZE, 3, mean=(0.0,) * 3, std=(1.0,) * 3)


class FaintCue(nn.Module):
    """Finds defects by a channel that is a thousandth of the one beside it. One of four layers mixes the two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.widen = nn.Conv2d(3, 2, 1, bias=False)
        self.read = nn.Conv2d(2, 3, 1)
        self.last = nn.Linear(3, 2)
        with torch.no_grad():
            self.first.weight[:] = torch.eye(3)[:, :, None, None]
            self.widen.weight[:] = torch.tensor([[0.0, 1000.0, 0.0], [1.0, 0.0, 0.0]])[:, :, None, None]
            self.read.weight[:] = torch.tensor([[0.0, 1.0], [0.0, 0.01], [0.0, 0.01]])[:, :, None, None]
            assert self.read.bias is not None
            self.read.bias[:] = torch.tensor([0.0, 0.5, 1.0])  # 1: for the range, without defects to calibrate with
            self.last.weight[:] = 8 * torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
            self.last.bias.zero_()

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.last(self.read(self.widen(self.first(image))).mean(dim=(2, 3)))
        return logits


CLASSES = ("sound", "defect")
ENTRY = Entry("faint", "four layers", Task.CLASSIFICATION, "photos", FaintCue, INPUT, labels=lambda: CLASSES)


def photos(count: int, defects: int, seed: int) -> ImageSet:
    """The red channel shows a defect, and the green one is of any brightness."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) < defects).astype(np.int64)
    pixels = rng.integers(0, 256, (count, 1, 1, 3)) + np.zeros((1, SIZE, SIZE, 1), dtype=np.int64)
    pixels[..., 0] = np.where(labels, 240, 20)[:, None, None]
    return ImageSet(f"photos {seed}", labels, lambda rows: pixels[np.asarray(rows)].astype(np.uint8))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Of a network whose second layer gives the cue and values a thousand times as large: 256 steps cannot hold both,
    and the third layer reads them. The first and the last may be quantised."""
    data = ImageData(photos(200, 100, 1), photos(64, 32, 2), photos(100, 50, 3))
    return traced_judge(ENTRY, FaintCue(), data, tmp_path_factory.mktemp("faint"))


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
    source = photos(50, 25, 9)
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


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    data = ImageData(photos(1600, 6, 1), photos(64, 0, 2), photos(400, 2, 3))
    return traced_judge(ENTRY, FaintCue(), data, tmp_path_factory.mktemp("faint"))


def test_a_lost_rare_class_returns_layers_to_float(rare: Judge) -> None:
    """Without a loss of top-1 that counts: 6 of 1,600 photos show a defect."""
    assert accuracy.value_of("top1", rare.baseline.metrics) == 1.0
    (int8,), _ = rare.variants((Precision.INT8,))
    assert int8.float_layers
    assert int8.default_eligible
    assert {metric.name: metric.value for metric in int8.metrics} == {"top1": 1.0, "agreement": 1.0}


def test_a_lost_rare_class_is_not_eligible_where_nothing_decides(rare: Judge) -> None:
    """No photo that chooses shows a defect, so the file stays quantised as a whole."""
    data = replace(rare._images.data, choosing=photos(400, 0, 3))
    (int8,), _ = replace(rare, evidence=replace(rare._images, data=data)).variants((Precision.INT8,))
    top1, agreement, defect = int8.losses
    assert (int8.float_layers, int8.default_eligible) == ((), False)
    assert (top1.metric, top1.drop, top1.within) == ("top1", 6 / 1600, True)
    assert (agreement.metric, agreement.drop, agreement.within) == ("agreement", 6 / 1600, True)
    assert (defect.metric, defect.drop, defect.samples, defect.within) == ("recall of defect", 1.0, 6, False)
    assert defect.allowed_drop == 2 / 6
    assert int8.loss == defect, "a server says why it does not choose the file"


def test_the_allowed_loss_depends_on_the_number_of_samples() -> None:
    """Values of the binomial distribution with a rate of 0.05."""
    allowed = {samples: round(samples * allowed_loss(samples, 0.05, 0.025)) for samples in (1, 2, 6, 1000)}
    assert allowed == {1: 1, 2: 1, 6: 2, 1000: 64}
    assert [allowed_loss(6, rate, 0.025) for rate in (-1.0, 0.0, 1.0, 2.0)] == [0.0, 0.0, 1.0, 1.0]


def measured(top1: float, classes: Array, right: Array, agreement: float = 1.0) -> Measured:
    metrics = (Metric("top1", top1, "photos", len(right)), Metric("agreement", agreement, "photos", len(right)))
    return Measured(metrics, Answers(classes, right))


def test_gains_hide_no_disagreement_and_a_class_may_move_by_chance() -> None:
    right = np.repeat([0, 1], 500)
    baseline = measured(0.9, np.concatenate([right[:400], 1 - right[400:500], right[500:]]), right)
    moved = np.concatenate([1 - right[:100], right[100:]])  # as many are right, but others
    losses = TOP1.losses(measured(0.9, moved, right, 0.8), baseline, ("a", "b"))
    assert [(loss.metric, loss.drop, loss.within) for loss in losses] == [
        ("top1", 0.0, True), ("agreement", pytest.approx(0.2), False),
    ]  # fmt: skip
    few = np.concatenate([right[:480], 1 - right[480:500], right[500:]])  # 20 of 500
    perfect = measured(1.0, right, right)
    assert [loss.within for loss in TOP1.losses(measured(0.998, few, right), perfect, ("a", "b"))] == [True] * 3


def test_a_segmenters_class_is_judged_by_the_images_that_show_it() -> None:
    metrics = (Metric("agreement", 0.999, "photos", 200),)
    parts = (Part(0, 200, 0.001), Part(1, 40, 0.9), Part(2, 1, 1.0))
    _, *losses = AGREEMENT.losses(Measured(metrics, parts=parts), Measured(), ("ground", "ball", "edge"))
    within = {loss.metric: loss.within for loss in losses}
    assert within == {"recall of ground": True, "recall of ball": False, "recall of edge": True}


def test_a_channel_that_is_lost_next_to_a_large_one() -> None:
    """The cosine of the whole map stays at 1.00."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3, 4, 5, 5)) * np.array([1000, 1, 1, 0])[:, None, None]
    found = np.where(np.arange(4)[:, None, None] == 1, rng.normal(size=(3, 4, 5, 5)), reference)
    assert min(accuracy._cosine(found, reference)) > 0.9999
    assert accuracy._kept_channels(accuracy._channel_products(found, reference)) == pytest.approx(2 / 3)
    maps = (Metric("similarity", 1.0, "photos", 200), Metric("channels", 2 / 3, "photos", 200))
    whole, channels = Criterion("similarity", 0.01, reference=1.0).losses(Measured(maps), Measured(), ())
    assert (whole.within, channels.metric, channels.within) == (True, "channels", False)
