"""Weights: where they come from, and the errors when they do not fit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file

from models.entry import Shipped, Torchvision
from models.loading import UNTRAINED, WeightsMismatch, WeightsUnavailable, load_weights
from models.zoo import catalogue
from rafaga.bundle import sha256_of

LENET, RESNET18 = catalogue()["lenet5-mnist"], catalogue()["resnet18"]
URL = "https://download.pytorch.org/models/resnet18-{}.pth"


def lenet() -> Any:
    return LENET.build()


def test_shipped_weights_are_loaded_and_random_ones_left_alone() -> None:
    module = lenet()
    before = module.c1.weight.clone()
    assert load_weights(LENET, module, "random") == UNTRAINED
    assert not UNTRAINED.trained
    assert torch.equal(module.c1.weight, before)
    note = load_weights(LENET, module)
    assert not torch.equal(module.c1.weight, before)
    assert note.trained
    assert note.source.startswith("models/weights/lenet5-mnist.safetensors")
    assert isinstance(LENET.weights, Shipped)
    assert note.sha256 == sha256_of(LENET.weights.path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "checkpoint.pt"])
def test_a_file_of_your_own_in_half_precision(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{suffix}"
    state = {key: value.half() for key, value in lenet().state_dict().items()}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if suffix == "pth" else {"state_dict": state, "epoch": 3}, path)
    module = lenet()
    note = load_weights(LENET, module, path)
    assert torch.equal(module.output.weight, state["output.weight"].float())
    assert module.c1.weight.dtype == torch.float32
    entry = ", state_dict" if suffix == "checkpoint.pt" else ""
    assert (note.trained, note.source, note.sha256) == (True, f"file {path.name}{entry}", sha256_of(path))


def test_a_file_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    state = lenet().state_dict()
    state["extra.weight"] = state.pop("c1.bias")
    state["output.weight"] = torch.zeros(3, 84)
    torch.save(state, path)
    with pytest.raises(WeightsMismatch) as caught:
        load_weights(LENET, lenet(), path)
    error = caught.value
    assert (error.missing, error.unexpected, error.reshaped) == (["c1.bias"], ["extra.weight"], ["output.weight"])
    for key in ("c1.bias", "extra.weight", "output.weight", "other.pth"):
        assert key in str(error)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("executed"),))


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"c1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsUnavailable, match=r"holds objects besides tensors \(.*Path.*\), which are not read"):
        load_weights(LENET, lenet(), tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_missing_and_broken_files_are_distinguished(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="no such file"):
        load_weights(LENET, lenet(), tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(WeightsUnavailable, match="neither"):
        load_weights(LENET, lenet(), tmp_path / name)


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    unpublished, untrained = catalogue()["plain34"], replace(LENET, weights=Shipped("absent-model.safetensors"))
    offline = r"no route to host[\s\S]*https://download\.pytorch\.org/models/resnet50-11ad3fa6\.pth[\s\S]*--weights"
    for entry, message in (
        (unpublished, "--weights FILE"),
        (untrained, r"python -m models\.training absent-model"),
        (catalogue()["resnet50"], offline),
    ):
        with pytest.raises(WeightsUnavailable, match=message):
            load_weights(entry, torch.nn.Identity())


@dataclass(frozen=True)
class Published:
    """What loading reads of a member of torchvision's weight enums; `fetch` stands for the download."""

    url: str
    content: bytes = b""

    def fetch(self, *_: object) -> None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.content)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "downloaded"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_checkpoint_must_have_the_hash_in_its_name(
    cached: bool, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = RESNET18.build()
    before = module.conv1.weight.clone()
    buffer = BytesIO()
    torch.save(RESNET18.build().state_dict(), buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    published = Published(URL.format(sha256[:8] if right else "f37072fd"), buffer.getvalue())
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    if cached:
        published.fetch()
        published = replace(published, content=b"never asked for")
    monkeypatch.setattr("torchvision.models.get_weight", lambda _: published)
    monkeypatch.setattr("models.loading.download", published.fetch)
    if right:
        note = load_weights(RESNET18, module)
        assert note.source == "torchvision ResNet18_Weights.IMAGENET1K_V1"
        assert (note.trained, note.license, note.sha256) == (True, Torchvision("x").license, sha256)
    else:
        with pytest.raises(
            WeightsUnavailable, match=r"resnet18-f37072fd\.pth is not[\s\S]*expected f37072fd"
        ) as caught:
            load_weights(RESNET18, module)
        assert published.url in str(caught.value)
    assert torch.equal(module.conv1.weight, before) == (not right)
