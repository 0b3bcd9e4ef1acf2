"""A small model for every task: traced in a second each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.entry import Entry, ImageInput
from models.suppression import best_objects, surest
from rafaga.bundle import DetectionSpec, ForecastSpec, SequenceSpec, Task

CLASSES = ("alpha", "beta", "gamma")
Layer = Callable[[Tensor], Tensor]


def unchanged(outputs: Tensor) -> Tensor:
    return outputs


class SmallClassifier(nn.Module):
    """float32 [N, 3, H, W] -> logits [N, 3], or what `after` makes of them."""

    def __init__(self, width: int = 8, after: Layer = unchanged) -> None:
        super().__init__()
        self.after = after
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.output = nn.Linear(width, len(CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.conv1(image)).relu()
        x = (x + self.conv2(x)).relu()
        return self.after(self.output(x.mean(dim=(2, 3))))


class DataDependent(SmallClassifier):
    """Branches on the values of its input: cannot be traced."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image if image.sum() > 0 else -image)


class SmallBackbone(nn.Module):
    """Two maps, strides 2 and 8; odd sizes are rounded up, as by any convolution with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=4, padding=1)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        fine = self.conv1(image).relu()
        return OrderedDict(fine=fine, coarse=self.conv2(fine))


class SmallForecaster(nn.Module):
    """history [N, T], length [N] -> quantiles [N, 4, 3]: an LSTM read at the last observation of each row."""

    def __init__(self, reads_padding: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 8, batch_first=True)
        self.head = nn.Linear(8, 12)
        self.reads_padding = reads_padding

    def forward(self, history: Tensor, length: Tensor) -> Tensor:
        states, _ = self.lstm(history[..., None] / 100)
        last = states[:, -1] if self.reads_padding else states[torch.arange(len(length)), length - 1]
        if self.reads_padding:
            last = last + 0 * length[:, None]
        quantiles: Tensor = self.head(last).reshape(-1, 4, 3)
        return quantiles + history[:, :1, None]


class SmallDetector(nn.Module):
    """float32 [N, 3, H, W] -> 8 objects of three classes: boxes of 12 pixels, eight apart."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv2d(3, 3, 9, stride=8, padding=4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.scores(image)  # [N, 3, H/8, W/8]
        n, classes, rows, columns = logits.shape
        y, x = torch.arange(rows)[:, None].expand(rows, columns), torch.arange(columns)[None].expand(rows, columns)
        corner = torch.stack([x, y, x, y], -1).reshape(-1, 4) * 8.0
        boxes = (corner + torch.tensor([0.0, 0.0, 12.0, 12.0])).expand(n, classes, -1, -1)  # [N, 3, B, 4]
        scores = (2 * logits).sigmoid().flatten(2)  # [N, 3, B]
        kept = surest(boxes.flatten(0, 1), scores.flatten(0, 1)[:, None], 0.1, 0.5)
        return best_objects(boxes, kept.reshape(scores.shape), 8)


class SmallSegmenter(nn.Module):
    """float32 [N, 3, H, W] -> scores [N, 3, H, W]."""

    def __init__(self, after: Layer = unchanged) -> None:
        super().__init__()
        self.after = after
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.after(self.conv2(self.conv1(image).relu())),)


class SmallSequenceModel(nn.Module):
    """symbols int64 [N, T] -> logits [N, T, 3]."""

    def __init__(self, after: Layer = unchanged) -> None:
        super().__init__()
        self.after = after
        self.lstm = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, symbols: Tensor) -> Tensor:
        states, _ = self.lstm(nn.functional.one_hot(symbols, 3).float())
        return self.after(self.head(4 * states))


def small_image_input(size: int | None = 16) -> ImageInput:
    return ImageInput(height=size, width=size, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


def classifier(name: str = "small-classifier") -> Entry:
    kind, image = Task.CLASSIFICATION, small_image_input()
    return Entry(name, "two convolutions", kind, "none", SmallClassifier, image, labels=lambda: CLASSES)


def backbone() -> Entry:
    image, strides = small_image_input(None), {"fine": 2, "coarse": 8}
    return Entry("small-backbone", "two convolutions", Task.FEATURES, "none", SmallBackbone, image, strides=strides)


SERIES = ForecastSpec(
    min_history=5,
    max_history=40,
    max_horizon=4,
    quantile_levels=(0.1, 0.5, 0.9),
    season=3,
    step="hour",
    unit="MW",
    frequency="h",
)


def forecaster() -> Entry:
    return Entry("small-forecaster", "LSTM", Task.FORECASTING, "none", SmallForecaster, SERIES)


def detector() -> Entry:
    kind, image = Task.DETECTION, replace(small_image_input(None), resize_shorter=64, max_longer=100)
    limits = DetectionSpec(max_objects=8, score_threshold=0.5, iou_threshold=0.1)
    named = Entry("small-detector", "one convolution", kind, "none", SmallDetector, image, detection=limits)
    return replace(named, labels=lambda: ("nothing", *CLASSES))


def segmenter() -> Entry:
    kind, image = Task.SEGMENTATION, small_image_input(None)
    return Entry("small-segmenter", "two convolutions", kind, "none", SmallSegmenter, image, labels=lambda: CLASSES)


def sequence_model() -> Entry:
    kind, symbols = Task.SEQUENCE, SequenceSpec(max_length=40)
    return Entry("small-sequences", "LSTM", kind, "none", SmallSequenceModel, symbols, labels=lambda: CLASSES)
