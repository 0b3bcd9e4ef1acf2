"""What the proofs find: limits, maps and answers that are not right; and right models that they take."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import VisionTransformer

from export import limits, precisions
from export.arrays import Array
from export.extremes import extremes
from export.graph import serving_graph
from export.maps import require_maps
from export.verify import ParityCase, ProofFailed, open_session, read_golden
from models.entry import Entry
from rafaga import bundle as bundles
from rafaga.bundle import Precision, SequenceSpec
from tests.export import small
from tests.export.exporting import export, exported, publish_small, said


class Rows(nn.Module):
    """Next symbols, with a state from a buffer of 16 rows."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(3, 8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("state", torch.zeros(16, 1, 8))

    def forward(self, symbols: Tensor) -> Tensor:
        logits: Tensor = self.head(self.symbols(symbols).cumsum(1) + self.state[: len(symbols)])
        return logits


class Positions(nn.Module):
    """Next symbols, with a table of positions."""

    def __init__(self, positions: int = 128) -> None:
        super().__init__()
        self.symbols = nn.Embedding(3, 8)
        self.positions = nn.Embedding(positions, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, symbols: Tensor) -> Tensor:
        logits: Tensor = self.head(self.symbols(symbols) + self.positions(torch.arange(symbols.shape[1])))
        return logits


class Halving(small.SmallBackbone):
    """Halves images larger than 512 x 512; `by_area`: by a condition that torch.export does not report."""

    def __init__(self, by_area: bool) -> None:
        super().__init__()
        self.by_area = by_area

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        height, width = image.shape[-2:]
        large = height * width > 512 * 512 if self.by_area else height > 512 and width > 512
        return super().forward(interpolate(image, scale_factor=0.5) if large else image)


def sequences(build: Callable[[], nn.Module], max_length: int = 40) -> Entry:
    return replace(small.sequence_model(), build=build, input=SequenceSpec(max_length=max_length))


@pytest.mark.parametrize("name", ["small-classifier", "small-forecaster"])
def test_the_largest_batch_one_between_and_the_longest_input_are_proven(repository: Path, name: str) -> None:
    bundle = bundles.load(repository / name / "1")
    longest = (40,) if bundle.forecast else (16, 16, 3)
    for variant in bundle.variants:
        assert max(variant.parity.batch_sizes) == bundle.max_batch_size == 256
        assert variant.parity.largest_input == longest
    assert any(8 < size < 256 and size % 2 for size in bundle.variants[0].parity.batch_sizes)


def test_fewer_rows_are_declared_where_the_model_takes_no_more(tmp_path: Path) -> None:
    """1. ONNX Runtime fails at 17 rows: the bundle declares 16, and the export says so. 2. The same where torch.export
    found it. 3. Answers that depend on the batch are refused.
    """
    found = publish_small(sequences(Rows), tmp_path)
    assert found.bundle.max_batch_size == found.bundle.variants[0].parity.batch_sizes[-1] == 16
    (note,) = found.notes
    assert note.startswith("max_batch_size is 16, not 256: ONNX Runtime fails at 17 rows: ")
    session, golden = open_session(found.folder / "model.onnx"), read_golden(found.folder / "golden.npz")
    proven = limits.prove_batches(session, golden, 256, {"batch": 16})
    assert (proven.size, proven.why) == (16, "torch.export found that the model takes at most 16 rows")
    changed = ParityCase(golden.inputs, {"probabilities": golden.outputs["probabilities"][::-1]})
    with pytest.raises(ProofFailed, match="at a batch of 9: largest relative error"):
        limits.prove_batches(session, changed, 256, {})
    with pytest.raises(ProofFailed, match="at most 3 rows in a batch; expected at least 8: create states"):
        limits.require_small_batches({"batch": 3})


def test_a_length_beyond_the_position_table_is_refused(tmp_path: Path) -> None:
    message = r"max_length is 512, but the model takes at most 128 \(index.*\): declare 128"
    with pytest.raises(ProofFailed, match=message):
        publish_small(sequences(Positions, 512), tmp_path)
    assert publish_small(sequences(Positions, 128), tmp_path).bundle.sequence == SequenceSpec(max_length=128)


@pytest.mark.parametrize(
    ("by_area", "message"),
    [
        (False, "torch.export found that the model treats images beyond a height of 512 in another way"),
        (True, r"an image of 1021 x 1024: output fine has shape \(1, 4, 511, 512\), PyTorch's has \(1, 4, 255, 256\)"),
    ],
)
def test_large_images_that_are_treated_in_another_way(by_area: bool, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProofFailed, match=f"{message}.*: give it a fixed input size"):
        publish_small(replace(small.backbone(), build=lambda: Halving(by_area)), tmp_path)


class Crowded:
    """A session whose other threads compute for 0.2 s in each run, as they do on a busy machine."""

    def __init__(self, session: InferenceSession) -> None:
        self.get_outputs = session.get_outputs
        self._run = session.run

    def run(self, names: list[str], inputs: dict[str, Array]) -> Any:
        other = Thread(target=self._compute)
        other.start()
        other.join()
        return self._run(names, inputs)

    def _compute(self) -> None:
        started = time.thread_time()
        while time.thread_time() - started < 0.2:
            pass


def test_other_work_on_the_machine_does_not_shorten_the_proof(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository / "small-classifier" / "1"
    session: Any = Crowded(open_session(folder / "model.onnx"))
    monkeypatch.setattr(limits, "BUDGET_S", 0.2)
    assert limits.prove_batches(session, read_golden(folder / "golden.npz"), 256, {}).size == 256


def test_less_is_declared_where_the_proof_costs_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET_S", 0.0)
    found = publish_small(sequences(lambda: Positions(2000), 2000), tmp_path)
    assert found.bundle.max_batch_size == 17
    assert found.bundle.sequence is not None
    assert 40 < found.bundle.sequence.max_length < 2000
    assert ["too much memory" in note for note in found.notes] == [True, True]


class Pyramid(nn.Module):
    """c2 and c3 at strides 2 and 4, without padding: their sizes are not input size / stride."""

    names = ("c2", "c3")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5, stride=2)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        fine = self.conv1(image).relu()
        return OrderedDict(zip(self.names, (fine, self.conv2(fine)), strict=True))


class Numbered(Pyramid):
    names = ("0", "pool")


class Patches(nn.Module):
    """One map of a module that takes 16 x 16 only."""

    def forward(self, image: Tensor) -> Tensor:
        return image.reshape(-1, 3, 4, 4, 16)[..., 0]


def backbone(model: type[nn.Module], size: int | None = None, **strides: int) -> Entry:
    return replace(small.backbone(), build=model, input=small.small_image_input(size), strides=strides)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (backbone(Pyramid, c2=2, c3=4), None),
        (backbone(Pyramid, c3=4), None),
        (backbone(Pyramid, 30, c2=2, c3=4), None),
        (backbone(Numbered, p2=2, p3=4), None),
        (backbone(Patches, 16, p=4), None),
        (small.backbone(), None),
        (backbone(Pyramid, p2=4, p3=32), "the model names its outputs c2, c3; expected p2, p3"),
        (backbone(Pyramid, c2=4, c3=4), "map c2 has stride 2; declared: 4"),
        (backbone(Pyramid, c2=2, c3=32), "map c3 has stride 4; declared: 32"),
        (backbone(Numbered, p2=2, p3=8), "map p3 has stride 4; declared: 8"),
        (backbone(Patches, 16, p=8), "map p has stride 4; declared: 8"),
        (backbone(Patches, 16, p=0), r"output p has 4 axes; stride 0 expects \[N, D\]"),
        (backbone(lambda: nn.AdaptiveAvgPool2d(4), m=16), "map m has stride none"),  # type: ignore[arg-type]
        (backbone(nn.Flatten, 16, e=4), "output e has 2 axes; stride 4 expects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_maps_are_refused(entry: Entry, message: str | None) -> None:
    graph = serving_graph(entry, entry.build())
    if message is None:
        require_maps(entry, graph)
    else:
        with pytest.raises(ProofFailed, match=message):
            require_maps(entry, graph)


def test_the_command_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for maps, message in (
        ("p2:4,p3:32", "the model names its outputs c2, c3; expected p2, p3"),
        ("c2:4,c3:32", "map c2 has stride 2; declared: 4"),
    ):
        options = ["--task", "features", "--maps", maps]
        assert export(tmp_path, "test_proofs:Pyramid", *options, size="any", labels=None) == 1
        assert message in said(capsys)
    assert not (tmp_path / "repository" / "my-net").exists()


class Normalising(small.SmallClassifier):
    """Divides by the deviation of each image."""

    def forward(self, image: Tensor) -> Tensor:
        mean, deviation = image.mean((1, 2, 3), keepdim=True), image.std((1, 2, 3), keepdim=True)
        return super().forward((image - mean) / deviation)


def test_a_model_that_gives_nan_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "test_proofs:Normalising", "--normalize", "none") == 0
    warning = "OUTPUTS ARE NOT FINITE for a black image, a white image, a grey image, a grey image again:"
    assert warning in said(capsys)
    assert not exported(tmp_path).allow_non_finite
    assert export(tmp_path, "test_proofs:Normalising", "--normalize", "none", "--allow-non-finite") == 0
    assert "NOT FINITE" not in said(capsys)
    assert exported(tmp_path, 2).allow_non_finite


def test_a_smaller_file_that_overflows_for_a_white_image_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As half precision does beyond 65,504 on processors that compute in it."""

    def overflowing(source: Path, target: Path) -> None:
        model = onnx.load(source)
        softmax = model.graph.node.pop()
        assert softmax.op_type == "Softmax"
        constants = {"_axes": np.array([1, 2, 3]), "_column": np.array([-1, 1]), "_bright": np.float32(254.9)}
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
        model.graph.node.extend(
            [
                helper.make_node("Cast", ["image"], ["_pixels"], to=1),
                helper.make_node("ReduceMean", ["_pixels", "_axes"], ["_brightness"], keepdims=0),
                helper.make_node("Sub", ["_bright", "_brightness"], ["_below"]),
                helper.make_node("Sqrt", ["_below"], ["_root"]),
                helper.make_node("Reshape", ["_root", "_column"], ["_shift"]),
                helper.make_node("Add", [softmax.input[0], "_shift"], ["_shifted"]),  # no probability changes, or NaN
                helper.make_node("Softmax", ["_shifted"], softmax.output, axis=1),
            ]
        )
        onnx.save(model, target)

    monkeypatch.setattr(precisions, "to_fp16", overflowing)
    published = publish_small(small.classifier(), tmp_path, Precision.FP16)
    assert [variant.precision for variant in published.bundle.variants] == [Precision.FP32]
    assert "not finite on uniform or extreme images" in published.left_out[0].reason
    assert not (published.folder / "model.fp16.onnx").exists()


@pytest.mark.parametrize(
    "entry", [small.classifier(), small.backbone(), small.segmenter(), small.forecaster(), small.sequence_model()]
)
def test_every_kind_of_input_has_extremes(entry: Entry) -> None:
    names, inputs = extremes(entry)
    assert {len(array) for array in inputs.values()} == {len(names)}
    assert len(set(names)) == len(names)
    answers = serving_graph(entry, entry.build()).reference(inputs)
    assert all(np.isfinite(answer).all() for answer in answers.values())


class InPlaceImages(small.SmallClassifier):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.mul_(0.5).add_(0.1))


class InPlaceHistory(nn.Module):
    """history [N, T], length [N] -> quantiles [N, 4, 3], by the last observation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 12)

    def forward(self, history: Tensor, length: Tensor) -> Tensor:
        last = history.div_(2).gather(1, (length - 1)[:, None])  # [N, 1]
        quantiles: Tensor = self.head(last).reshape(-1, 4, 3)
        return quantiles


class FusedTransformer(nn.Module):
    """symbols int64 [N, T] -> logits [N, T, 3]; works in place; in evaluation PyTorch runs it by a fused kernel."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=self.batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=self.batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, symbols: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(symbols.shape[1])
        x = self.embed(symbols.add_(1).remainder_(3))  # [N, T, 8]
        x = self.encoder(x, mask) if self.batch_first else self.encoder(x.transpose(0, 1), mask).transpose(0, 1)
        logits: Tensor = self.head(x)
        return logits


class LookingTransformer(FusedTransformer):
    """Looks at the values of its mask to see whether it is causal."""

    batch_first = False


def weight_norm() -> nn.Module:
    model = small.SmallClassifier()
    nn.utils.parametrizations.weight_norm(model.conv2)
    nn.utils.parametrizations.spectral_norm(model.output)
    return model


def old_weight_norm() -> nn.Module:
    model = small.SmallClassifier()
    nn.utils.weight_norm(model.conv2)
    return model


class WithAuxiliaryHead(small.SmallSegmenter):
    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:  # type: ignore[override]
        (scores,) = super().forward(image)
        return OrderedDict(aux=-scores, out=scores)


def vision_transformer() -> nn.Module:
    """Its head begins at zero, as that of torchvision's vit_b_16."""
    return VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("entry", "build"),
    [
        (small.classifier(), InPlaceImages),
        (small.forecaster(), InPlaceHistory),
        (small.sequence_model(), FusedTransformer),
        (small.sequence_model(), LookingTransformer),
        (small.classifier(), weight_norm),
        (small.classifier(), old_weight_norm),
        (small.classifier(), vision_transformer),
        (small.segmenter(), WithAuxiliaryHead),
    ],
    ids=lambda value: "" if isinstance(value, Entry) else value.__name__,
)
def test_published(entry: Entry, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert publish_small(replace(entry, build=build), tmp_path).bundle.variants
