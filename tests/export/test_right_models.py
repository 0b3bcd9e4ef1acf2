"""Right models that were refused for reasons of the export's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from export.evidence import Sources
from export.publish import ExportRequest, publish
from models.entry import Entry
from models.progress import Silent
from rafaga.bundle import Precision
from tests.export import small


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


class WeightNorm(small.SmallClassifier):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv2)
        nn.utils.parametrizations.spectral_norm(self.output)


class OldWeightNorm(small.SmallClassifier):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.conv2)


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
        (small.classifier(), WeightNorm),
        (small.classifier(), OldWeightNorm),
        (small.classifier(), vision_transformer),
        (small.segmenter(), WithAuxiliaryHead),
    ],
    ids=lambda value: "" if isinstance(value, Entry) else value.__name__,
)
def test_published(entry: Entry, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    request = ExportRequest(tmp_path, "random", precisions=(Precision.FP32,))
    assert publish(replace(entry, build=build), request, Sources(), Silent()).bundle.variants
