"""Weights: where they come from, files as people have them, and one line with the reason for those that do not fit."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.entry import Shipped, Torchvision
from models.loading import UNTRAINED, WeightsMismatch, WeightsUnavailable, load_weights
from models.zoo import catalogue
from rafaga.bundle import sha256_of
from tests.export import small

ENTRY, LENET = small.classifier(), catalogue()["lenet5-mnist"]


def trained() -> nn.Module:
    torch.manual_seed(5)
    return small.SmallClassifier()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    """In half precision."""
    return {prefix + key: value.half() for key, value in trained().state_dict().items()}


def test_shipped_weights_are_loaded_and_random_ones_left_alone() -> None:
    module: Any = LENET.build()
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


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (prefixed(""), ""),
        (prefixed("module."), ", prefix module. stripped"),
        (prefixed("model."), ", prefix model. stripped"),
        (prefixed("_orig_mod.module."), ", prefix _orig_mod.module. stripped"),
        ({"state_dict": prefixed(""), "epoch": 3}, ", state_dict"),
        ({"model": prefixed(""), "args": argparse.Namespace(lr=0.1)}, ", model"),
        ({"model_state_dict": prefixed("module."), "epoch": 3}, ", model_state_dict, prefix module. stripped"),
        ({"ema": {"state_dict": prefixed("")}, "optimizer": {}}, ", ema.state_dict"),
        ({**prefixed("model."), "loss.weight": torch.ones(3)}, ", prefix model. stripped, left out: loss.weight"),
        ({"n_averaged": torch.tensor(7), **prefixed("module.")}, ", prefix module. stripped, left out: n_averaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_your_own_is_taken_with_a_note(content: object, note: str, tmp_path: Path) -> None:
    path, module = tmp_path / "my.pth", small.SmallClassifier()
    torch.save(content, path)
    found = load_weights(ENTRY, module, path)
    assert (found.trained, found.source, found.sha256) == (True, f"file my.pth{note}", sha256_of(path))
    for key, value in prefixed("").items():
        assert torch.equal(module.state_dict()[key], value.to(module.state_dict()[key].dtype)), key
        assert module.state_dict()[key].dtype != torch.float16


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "model.bin")
    module = small.SmallClassifier()
    assert load_weights(ENTRY, module, tmp_path / "model.bin").trained
    assert torch.equal(module.conv1.weight, prefixed("")["conv1.weight"].float())


def test_a_file_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    """All that differ and no others, also below a prefix."""
    state = prefixed("module.")
    state["module.extra.weight"] = state.pop("module.conv2.bias")
    state["module.output.weight"] = torch.zeros(3, 84)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsMismatch) as caught:
        load_weights(ENTRY, small.SmallClassifier(), tmp_path / "other.pth")
    error = caught.value
    assert (error.missing, error.unexpected, error.reshaped) == (["conv2.bias"], ["extra.weight"], ["output.weight"])
    for key in ("conv2.bias", "extra.weight", "output.weight", "other.pth"):
        assert key in str(error)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("executed"),))


def quantised(path: Path) -> None:
    scale = torch.quantize_per_tensor(torch.ones(3, 8), 0.1, 0, torch.qint8)
    torch.save({**prefixed(""), "output.weight": scale}, path)


def with_integers(path: Path) -> None:
    torch.save({**prefixed(""), "output.weight": torch.ones(3, 8, dtype=torch.int8)}, path)


def scripted(path: Path) -> None:
    torch.jit.trace(nn.Identity(), torch.ones(1)).save(str(path))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*quantiz:UserWarning")
@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (quantised, "a quantised state dict; give the float weights"),
        (with_integers, r"a quantised state dict \(torch.int8 in output.weight\)"),
        (lambda path: torch.save(trained(), path), "a pickled module.*; save model.state_dict"),
        (scripted, "a TorchScript archive"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
        (lambda path: path.write_text("\n<!DOCTYPE html>\n<title>Sign in</title>"), "an HTML page"),
        (lambda path: torch.save({"model": prefixed(""), "x": Path()}, path), r"besides tensors \(pathlib"),
        (lambda path: torch.save({"conv1.weight": Evil()}, path), r"besides tensors \(.*Path.*\), which are not read"),
        (lambda path: torch.save({"epoch": 3}, path), "holds int under 'epoch'"),
        (lambda path: torch.save({}, path), "holds an empty dict"),
        (lambda path: path.write_bytes(b"not weights at all"), "neither"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_cannot_be_taken_is_said_in_one_line(
    write: Callable[[Path], object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code in a file never runs."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my.pth")
    with pytest.raises(WeightsUnavailable, match=reason) as caught:
        load_weights(ENTRY, small.SmallClassifier(), tmp_path / "my.pth")
    assert "my.pth" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "executed").exists()


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
            load_weights(entry, nn.Identity())


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "downloaded"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_checkpoint_must_have_the_hash_in_its_name(
    cached: bool, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(trained().state_dict(), tmp_path / "published")
    sha256 = hashlib.sha256((tmp_path / "published").read_bytes()).hexdigest()
    name = f"net-{sha256[:8] if right else 'f37072fd'}.pth"
    url = f"https://download.pytorch.org/models/{name}"

    def fetch(*_: object) -> None:
        (tmp_path / "published").rename(tmp_path / "checkpoints" / name)  # the second time it is gone

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models.get_weight", lambda _: SimpleNamespace(url=url))
    monkeypatch.setattr("models.loading.download", fetch)
    if cached:
        fetch()
    entry, module = replace(ENTRY, weights=Torchvision("Net_Weights.V1")), small.SmallClassifier()
    before = module.conv1.weight.clone()
    if right:
        note = load_weights(entry, module)
        assert (note.trained, note.source, note.sha256) == (True, "torchvision Net_Weights.V1", sha256)
        assert note.license == Torchvision("x").license
    else:
        with pytest.raises(WeightsUnavailable, match=r"net-f37072fd\.pth is not[\s\S]*expected f37072fd") as caught:
            load_weights(entry, module)
        assert url in str(caught.value)
    assert torch.equal(module.conv1.weight, before) == (not right)
