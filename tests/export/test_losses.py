"""A loss that a mean hides: one class, one channel, one part of the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import accuracy
from export.accuracy import Answers, Measured, Part
from export.arrays import Array
from export.evidence import ImageEvidence, Sources
from export.graph import serving_graph
from export.losses import Criterion, allowed_loss
from export.onnx import to_onnx
from export.precisions import AGREEMENT, TOP1, Judge
from export.samples import ImageData, ImageSet
from export.verify import ParityCase, open_session
from models.entry import Entry, ImageInput
from models.progress import Silent
from rafaga.bundle import Metric, Precision, Task

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


ENTRY = Entry(
    "faint", "four layers", Task.CLASSIFICATION, "photos", FaintCue, INPUT, labels=lambda: ("sound", "defect")
)


def photos(count: int, defects: int, seed: int) -> ImageSet:
    """The red channel shows a defect, and the green one is of any brightness."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) < defects).astype(np.int64)
    pixels = rng.integers(0, 256, (count, 1, 1, 3)) + np.zeros((1, SIZE, SIZE, 1), dtype=np.int64)
    pixels[..., 0] = np.where(labels, 240, 20)[:, None, None]
    pixels = pixels.astype(np.uint8)

    def read(rows: Sequence[int]) -> Array:
        return pixels[np.asarray(rows)]

    return ImageSet(f"photos {seed}", labels, read)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    path = tmp_path_factory.mktemp("faint") / "model.onnx"
    graph = serving_graph(ENTRY, FaintCue())
    evidence = ImageEvidence(
        ENTRY, INPUT, ImageData(photos(1600, 6, 1), photos(64, 0, 2), photos(400, 2, 3)), Sources()
    )
    to_onnx(graph, evidence.example(), path)
    cases = [ParityCase(inputs, graph.reference(inputs)) for inputs in evidence.batches()]
    baseline = evidence.measure(open_session(path), lambda *_: None)
    assert accuracy.value_of("top1", baseline.metrics) == 1.0
    return Judge(path, baseline, cases, evidence, trained=True, max_accuracy_drop=None, steps=Silent())


def test_a_lost_rare_class_returns_layers_to_float(judge: Judge) -> None:
    """Without a loss of top-1 that counts: 6 of 1,600 photos show a defect."""
    (int8,), _ = judge.variants((Precision.INT8,))
    assert int8.float_layers
    assert int8.default_eligible
    assert {metric.name: metric.value for metric in int8.metrics} == {"top1": 1.0, "agreement": 1.0}


def test_a_lost_rare_class_is_not_eligible_where_nothing_decides(judge: Judge) -> None:
    """No photo that chooses shows a defect, so the file stays quantised as a whole."""
    data = replace(judge._images.data, choosing=photos(400, 0, 3))
    (int8,), _ = replace(judge, evidence=replace(judge._images, data=data)).variants((Precision.INT8,))
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
    _, ball, ground, edge = (*AGREEMENT.losses(Measured(metrics, parts=parts), Measured(), ("ground", "ball", "edge")),)
    assert (ball.metric, ball.within) == ("recall of ball", False)
    assert {ground.metric: ground.within, edge.metric: edge.within} == {
        "recall of ground": True,
        "recall of edge": True,
    }


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
