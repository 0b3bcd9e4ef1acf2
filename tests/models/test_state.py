"""Weights files as people have them, and one line with the reason for those that cannot be taken."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from export.__main__ import main
from models.entry import Entry
from models.loading import WeightsMismatch, WeightsUnavailable, load_weights
from rafaga import bundle as bundles
from tests.export import small

ENTRY: Entry = small.classifier()


def trained() -> nn.Module:
    torch.manual_seed(5)
    return small.SmallClassifier()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in trained().state_dict().items()}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (prefixed("module."), ", prefix module. stripped"),
        (prefixed("model."), ", prefix model. stripped"),
        (prefixed("_orig_mod.module."), ", prefix _orig_mod.module. stripped"),
        ({"model": prefixed(""), "args": argparse.Namespace(lr=0.1)}, ", model"),
        ({"model_state_dict": prefixed("module."), "epoch": 3}, ", model_state_dict, prefix module. stripped"),
        ({"ema": {"state_dict": prefixed("")}, "optimizer": {}}, ", ema.state_dict"),
        ({**prefixed("model."), "loss.weight": torch.ones(3)}, ", prefix model. stripped, left out: loss.weight"),
        ({"n_averaged": torch.tensor(7), **prefixed("module.")}, ", prefix module. stripped, left out: n_averaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrapped_weights_are_taken_with_a_note(content: object, note: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "my.pth")
    module = small.SmallClassifier()
    assert load_weights(ENTRY, module, tmp_path / "my.pth").source == f"file my.pth{note}"
    for key, value in trained().state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "model.bin")
    assert load_weights(ENTRY, small.SmallClassifier(), tmp_path / "model.bin").trained


def test_a_prefix_hides_no_mismatch(tmp_path: Path) -> None:
    """One missing key is named alone, not all of them."""
    state = prefixed("module.")
    del state["module.conv2.bias"]
    torch.save(state, tmp_path / "my.pth")
    with pytest.raises(WeightsMismatch) as caught:
        load_weights(ENTRY, small.SmallClassifier(), tmp_path / "my.pth")
    assert (caught.value.missing, caught.value.unexpected) == (["conv2.bias"], [])


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
        (lambda path: torch.save({"model": trained().state_dict(), "x": Path()}, path), r"besides tensors \(pathlib"),
        (lambda path: torch.save({"epoch": 3}, path), "holds int under 'epoch'"),
        (lambda path: torch.save({}, path), "holds an empty dict"),
        (lambda path: path.mkdir(), "a folder"),
    ],
)
def test_what_cannot_be_taken_is_said_in_one_line(write: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "my.pth"
    write(path)
    with pytest.raises(WeightsUnavailable, match=reason) as caught:
        load_weights(ENTRY, small.SmallClassifier(), path)
    assert "my.pth" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_factory_that_holds_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--factory", "tests.models.test_state:trained", "--name", "my-net", "--input-size", "16"]
    command += ["--weights", "factory", "--license", "MIT", "--precisions", "fp32", "--output", str(tmp_path)]
    assert main(command) == 0
    weights = bundles.load(tmp_path / "my-net" / "1").weights
    assert (weights.trained, weights.license) == (True, "MIT")
    assert weights.source == "built by tests.models.test_state:trained"
    assert f"weights: {weights.source}" in capsys.readouterr().out


def test_a_model_of_the_catalogue_has_no_factory_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lenet5-mnist", "--weights", "factory"])
    assert "--weights factory needs --factory" in capsys.readouterr().err
