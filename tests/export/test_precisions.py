"""fp16 and int8 files: what is written, what the accuracy gate does, which layers it gives back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import accuracy, precisions
from export.arrays import Array
from export.evidence import ImageEvidence, Sources
from export.graph import serving_graph
from export.onnx import to_onnx
from export.precisions import Judge, LeftOut
from export.samples import ImageData, ImageSet
from export.variants import calibrated, to_fp16
from export.verify import ParityCase, open_session, tensor_specs
from models.entry import Entry, ImageInput
from models.progress import Silent
from rafaga.bundle import Precision, Task, Variant

SIZE = 8


class Outlier(nn.Module):
    """Tells dark from bright by a small signal that lies beside a value a thousand times as large.

    `widen` puts both into one tensor, where 256 steps cannot hold them; `read` then sees nothing but steps. The two
    layers around them do not mind being quantised.
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
            self.widen.bias[3] = 1000.0
            self.read.weight[0, 0], self.read.weight[1, 0] = 1.0, -1.0
            self.read.bias[1] = 1.0
            self.last.weight[:] = 8 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])

    def forward(self, image: Tensor) -> Tensor:
        x = self.read(self.widen(self.first(image)))
        return self.last(x.mean(dim=(2, 3)))


ENTRY = Entry(
    name="outlier",
    architecture="four layers",
    task=Task.CLASSIFICATION,
    dataset="brightness",
    build=Outlier,
    input=ImageInput(SIZE, SIZE, 3, mean=(0.0,) * 3, std=(1.0,) * 3),
    labels=lambda: ("dark", "bright"),
)


def images(count: int, seed: int) -> ImageSet:
    """Brightness from 30 to 225, dark below the middle. White noise stays well below the difference."""
    rng = np.random.default_rng(seed)
    level = np.where(np.arange(count) % 2, rng.uniform(150, 225, count), rng.uniform(30, 105, count))
    pixels = np.clip(level[:, None, None, None] + rng.normal(0, 3, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)

    def read(rows: Array) -> Array:
        return pixels[np.asarray(rows)]

    return ImageSet(f"brightness {seed}", (np.arange(count) % 2).astype(np.int64), read)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Of the outlier network, with fp32 traced and measured."""
    path = tmp_path_factory.mktemp("outlier") / "model.onnx"
    graph = serving_graph(ENTRY, Outlier())
    evidence = ImageEvidence(ENTRY, ENTRY.input, ImageData(images(200, 1), images(64, 2), images(100, 3)), Sources())  # type: ignore[arg-type]
    to_onnx(graph, evidence.example(), path)
    cases = [ParityCase(inputs, graph.reference(inputs)) for inputs in evidence.batches()]
    baseline = evidence.measure(open_session(path), lambda *_: None)
    assert accuracy.value_of("top1", baseline) == 1.0
    return Judge(path, baseline, cases, evidence, trained=True, max_accuracy_drop=0.005, steps=Silent())


@pytest.fixture(scope="module")
def variants(judge: Judge) -> dict[Precision, Variant]:
    return {variant.precision: variant for variant in judge.variants((Precision.FP16, Precision.INT8))[0]}


def test_inputs_and_outputs_stay(judge: Judge, variants: dict[Precision, Variant]) -> None:
    expected = tensor_specs(open_session(judge.fp32))
    for variant in variants.values():
        path = judge.fp32.with_name(variant.file)
        assert tensor_specs(open_session(path)) == expected
        assert path.stat().st_size > 0


def test_fp16_holds_half_precision_and_keeps_the_softmax(judge: Judge, variants: dict[Precision, Variant]) -> None:
    graph = onnx.load(judge.fp32.with_name(variants[Precision.FP16].file)).graph
    stored = {tensor.data_type for tensor in graph.initializer if tensor.dims}
    assert onnx.TensorProto.FLOAT16 in stored
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    cast = next(node for node in graph.node if node.output[0] == softmax.input[0])
    assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)
    assert variants[Precision.FP16].parity.max_relative_error < 2e-2


def test_the_gate_gives_sensitive_layers_back(judge: Judge, variants: dict[Precision, Variant]) -> None:
    with calibrated(judge.fp32, judge.evidence.calibration()) as graph:
        assert len(graph.layers) == 4
        path = judge.fp32.with_name("everything.onnx")
        graph.quantise(path)
        alone = judge.evidence.measure(open_session(path), lambda *_: None)
        _, widen, read, _ = graph.layers
    assert (accuracy.value_of("top1", alone) or 0) < 0.9, (
        "quantised as a whole the network must fail, or nothing is shown here"
    )
    int8 = variants[Precision.INT8]
    assert set(int8.float_layers) == {widen, read}
    assert accuracy.value_of("top1", int8.metrics) == 1.0
    assert int8.default_eligible
    quantised = onnx.load(judge.fp32.with_name(int8.file)).graph
    weights = {t.name: t.data_type for t in quantised.initializer if t.data_type == onnx.TensorProto.INT8}
    assert weights, "the other layers are int8"
    assert any(node.op_type == "QuantizeLinear" for node in quantised.node), "so are activations"
    dims = {t.name: tuple(t.dims) for t in quantised.initializer}
    read_back = [n.input for n in quantised.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert len(read_back) == 2
    for weight, scale, *_ in read_back:
        assert dims[scale] in {(3,), (2,)}, f"a scale per output channel of {weight}"


def test_what_loses_too_much_is_not_chosen(judge: Judge, tmp_path: Path) -> None:
    hopeless = Judge(
        judge.fp32, judge.baseline, judge.cases, judge.evidence, trained=True, max_accuracy_drop=-0.1, steps=Silent()
    )
    found, _ = hopeless.variants((Precision.FP16, Precision.INT8))
    assert [variant.default_eligible for variant in found] == [False, False]
    assert all(variant.metrics for variant in found)


def test_what_was_not_measured_is_not_chosen(judge: Judge) -> None:
    untrained = Judge(judge.fp32, (), judge.cases, judge.evidence, trained=False, max_accuracy_drop=1, steps=Silent())
    (int8,), _ = untrained.variants((Precision.INT8,))
    assert int8.metrics == ()
    assert not int8.default_eligible
    assert int8.float_layers == ()


def test_an_fp16_file_with_other_answers_is_not_kept(judge: Judge) -> None:
    wrong = [ParityCase(case.inputs, {"probabilities": 1 - case.outputs["probabilities"]}) for case in judge.cases]
    strict = Judge(judge.fp32, judge.baseline, wrong, judge.evidence, True, 0.005, Silent())
    made, (left_out,) = strict.variants((Precision.FP16,))
    assert made == []
    assert left_out.precision is Precision.FP16
    assert left_out.reason.startswith("parity with PyTorch: largest relative error")
    assert not judge.fp32.with_name("model.fp16.onnx").exists()
    to_fp16(judge.fp32, judge.fp32.with_name("model.fp16.onnx"))


def test_an_fp16_file_that_is_not_finite_is_not_kept(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not cost the model its other files."""

    def overflowing(source: Path, target: Path) -> None:
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT:
                array = np.full(tuple(tensor.dims), np.inf, np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(model, target)

    monkeypatch.setattr(precisions, "to_fp16", overflowing)
    untrained = replace(judge, trained=False, baseline=())
    made, left_out = untrained.variants((Precision.FP16, Precision.INT8))
    assert [variant.precision for variant in made] == ["int8"]
    assert left_out == [LeftOut(Precision.FP16, "output probabilities is not finite")]
    assert not judge.fp32.with_name("model.fp16.onnx").exists()
    to_fp16(judge.fp32, judge.fp32.with_name("model.fp16.onnx"))


@pytest.mark.parametrize(("step", "lost", "kept"), [("to_fp16", "fp16", "int8"), ("calibrated", "int8", "fp16")])
def test_a_converter_that_fails_costs_its_own_file_alone(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, lost: str, kept: str
) -> None:
    """A file that it had begun is not left behind."""
    here = replace(judge, fp32=Path(shutil.copy(judge.fp32, tmp_path)))
    begun = here.fp32.with_name(f"model.{lost}.onnx")

    def broken(*_: object) -> None:
        begun.write_bytes(b"half")
        raise NotImplementedError("no kernel for Whirl\nwith details")

    monkeypatch.setattr(precisions, step, broken)
    made, left_out = here.variants((Precision.FP16, Precision.INT8))
    assert [variant.precision for variant in made] == [kept]
    assert left_out == [LeftOut(Precision(lost), "NotImplementedError: no kernel for Whirl")]
    assert not begun.exists()
    assert here.fp32.with_name(f"model.{kept}.onnx").is_file()


def test_quantising_says_nothing(
    judge: Judge, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    judge.variants((Precision.FP16, Precision.INT8))
    output = capfd.readouterr()
    assert (output.out, output.err, [record.getMessage() for record in caplog.records]) == ("", "", [])


def test_measures_top1_and_top5(judge: Judge) -> None:
    session = open_session(judge.fp32)
    source = images(50, 9)
    flipped = ImageSet("half wrong", np.where(np.arange(50) < 25, source.labels, 1 - source.labels), source.read)
    progress: list[tuple[int, int]] = []
    (metric,) = accuracy.classify(session, flipped, advance=lambda *done: progress.append(done))
    assert (metric.name, metric.value, metric.samples, metric.dataset) == ("top1", 0.5, 50, "half wrong")
    assert progress[-1] == (50, 50)
    (limited,) = accuracy.classify(session, flipped, limit=10)
    assert limited.samples == 10
    assert limited.value == 0.5, "the rows are spread, not taken from the front"


def test_ties_count_against_the_model() -> None:
    ranks = accuracy._rank_of(np.array([1, 1]), np.array([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]))
    assert ranks.tolist() == [1, 0]
    assert accuracy._rank_of(np.array([0]), np.full((1, 3), np.nan)).tolist() == [2]
