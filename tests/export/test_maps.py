"""Names and strides of a backbone's maps: matched and measured, or refused."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

from export.__main__ import main
from export.graph import serving_graph
from export.maps import require_maps
from export.verify import ProofFailed
from models.entry import Entry
from tests.export import small


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


def check(entry: Entry) -> None:
    require_maps(entry, serving_graph(entry, entry.build()))


@pytest.mark.parametrize(
    "entry",
    [
        backbone(Pyramid, c2=2, c3=4),
        backbone(Pyramid, c3=4),
        backbone(Pyramid, 30, c2=2, c3=4),
        backbone(Numbered, p2=2, p3=4),
        backbone(Patches, 16, p=4),
        small.backbone(),
    ],
    ids=lambda entry: f"{entry.build.__name__}-{dict(entry.strides)}",
)
def test_right_maps(entry: Entry) -> None:
    check(entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
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
def test_wrong_maps_are_refused(entry: Entry, message: str) -> None:
    with pytest.raises(ProofFailed, match=message):
        check(entry)


def test_the_command_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--factory", "tests.export.test_maps:Pyramid", "--name", "net", "--task", "features", "--input-size"]
    command += ["any", "--weights", "random", "--output", str(tmp_path), "--maps"]
    assert main([*command, "p2:4,p3:32"]) == 1
    assert main([*command, "c2:4,c3:32"]) == 1
    printed = capsys.readouterr().out
    assert "the model names its outputs c2, c3; expected p2, p3" in printed
    assert "map c2 has stride 2; declared: 4" in printed
    assert not (tmp_path / "net").exists()
