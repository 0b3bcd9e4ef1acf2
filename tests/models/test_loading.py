"""Weights: where they come from, and what is said when they do not fit."""

from __future__ import annotations

import hashlib
import pickle
import re
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_weight

from models.entry import Shipped, Torchvision
from models.loading import UNTRAINED
from models.zoo import WeightsMismatch, WeightsUnavailable, catalogue, load_weights
from rafaga.bundle import sha256_of

LENET = catalogue()["lenet5-mnist"]


def test_shipped_weights_are_loaded_and_named() -> None:
    module = LENET.build()
    before = module.c1.weight.clone()
    note = load_weights(LENET, module)
    assert not torch.equal(module.c1.weight, before)
    assert note.trained
    assert note.source.startswith("models/weights/lenet5-mnist.safetensors")
    assert note.sha256 == sha256_of(LENET.weights.path)


def test_random_leaves_the_module_and_says_so() -> None:
    module = LENET.build()
    before = module.c1.weight.clone()
    assert load_weights(LENET, module, "random") == UNTRAINED
    assert not UNTRAINED.trained
    assert torch.equal(module.c1.weight, before)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "checkpoint.pt"])
def test_a_file_of_ones_own(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{suffix}"
    state = LENET.build().state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if suffix == "pth" else {"state_dict": state, "epoch": 3}, path)
    module = LENET.build()
    note = load_weights(LENET, module, path)
    assert torch.equal(module.output.weight, state["output.weight"])
    assert (note.trained, note.source, note.sha256) == (True, f"file {path.name}", sha256_of(path))


def test_half_precision_is_widened(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({k: v.half() for k, v in LENET.build().state_dict().items()}, path)
    module = LENET.build()
    load_weights(LENET, module, path)
    assert module.c1.weight.dtype == torch.float32


def test_a_file_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    state = LENET.build().state_dict()
    state["extra.weight"] = state.pop("c1.bias")
    state["output.weight"] = torch.zeros(3, 84)
    torch.save(state, path)
    with pytest.raises(WeightsMismatch) as caught:
        load_weights(LENET, LENET.build(), path)
    error = caught.value
    assert (error.missing, error.unexpected, error.reshaped) == (["c1.bias"], ["extra.weight"], ["output.weight"])
    for key in ("c1.bias", "extra.weight", "output.weight", "other.pth"):
        assert key in str(error)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save({"c1.weight": Evil()}, path)
    with pytest.raises(WeightsUnavailable, match="neither safetensors nor a torch state dict"):
        load_weights(LENET, LENET.build(), path)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(WeightsUnavailable):
        load_weights(LENET, LENET.build(), tmp_path / "bare.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_missing_and_broken_files_are_told_apart_from_bad_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="no such file"):
        load_weights(LENET, LENET.build(), tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(WeightsUnavailable, match="neither"):
        load_weights(LENET, LENET.build(), tmp_path / name)


def test_weights_that_nobody_published_are_asked_for() -> None:
    entry = catalogue()["plain34"]
    with pytest.raises(WeightsUnavailable, match="--weights FILE"):
        load_weights(entry, torch.nn.Identity())


def test_weights_that_are_trained_on_demand_name_their_command() -> None:
    entry = replace(LENET, weights=Shipped("absent-model.safetensors"))
    with pytest.raises(WeightsUnavailable, match=r"python -m models\.training absent-model"):
        load_weights(entry, LENET.build())


def test_offline_the_manual_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    entry = catalogue()["resnet50"]
    with pytest.raises(WeightsUnavailable) as caught:
        load_weights(entry, torch.nn.Identity())
    for part in ("no route to host", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth", "--weights"):
        assert part in str(caught.value)


@dataclass(frozen=True)
class Published:
    """What loading asks of a member of torchvision's weight enums."""

    url: str
    content: bytes = b""

    def fetch(self, *_: object) -> None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.content)


RESNET18 = catalogue()["resnet18"]
URL = "https://download.pytorch.org/models/resnet18-{}.pth"


def saved(module: torch.nn.Module) -> bytes:
    buffer = BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "downloaded"])
def test_a_checkpoint_with_the_hash_of_its_name_is_used(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, other = RESNET18.build(), RESNET18.build()
    content = saved(module)
    sha256 = hashlib.sha256(content).hexdigest()
    published = Published(URL.format(sha256[:8]), content)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    if cached:
        published.fetch()
        published = replace(published, content=b"never asked for")
    monkeypatch.setattr("torchvision.models.get_weight", lambda _: published)
    monkeypatch.setattr("models.loading.download", published.fetch)
    note = load_weights(RESNET18, other)
    assert torch.equal(other.conv1.weight, module.conv1.weight)
    assert note.source == "torchvision ResNet18_Weights.IMAGENET1K_V1"
    assert (note.trained, note.license, note.sha256) == (True, Torchvision("x").license, sha256)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "downloaded"])
def test_a_checkpoint_that_is_not_the_published_one_is_refused(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Published(URL.format("f37072fd"), saved(RESNET18.build()))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    if cached:
        published.fetch()  # put there by hand
    monkeypatch.setattr("torchvision.models.get_weight", lambda _: published)
    monkeypatch.setattr("models.loading.download", published.fetch)
    module = RESNET18.build()
    before = module.conv1.weight.clone()
    with pytest.raises(WeightsUnavailable) as caught:
        load_weights(RESNET18, module)
    for part in ("resnet18-f37072fd.pth is not the published file", "expected f37072fd", "Delete it", published.url):
        assert part in str(caught.value)
    assert torch.equal(module.conv1.weight, before)


def test_every_published_file_carries_its_hash_in_its_name() -> None:
    for entry in catalogue().values():
        if isinstance(entry.weights, Torchvision):
            url = get_weight(entry.weights.member).url
            assert re.fullmatch(r".*-[0-9a-f]{8}\.pth", url), url
