"""Loads the weights of an entry and records where they come from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.download import download
from models.entry import Entry, Shipped, Torchvision, Trained
from models.progress import SILENT, Steps
from rafaga.bundle import Weights, sha256_of

AUTO, RANDOM = "auto", "random"

# Untrained; the licence is the project's own.
UNTRAINED = Weights(trained=False, source="random initialisation", license="Apache-2.0")


class WeightsError(Exception):
    """The requested weights are not available, or do not fit the model."""


class WeightsUnavailable(WeightsError):
    """No file, or the download failed; the message says what to do."""


class WeightsMismatch(WeightsError):
    """The file's tensors do not fit the module. `missing`, `unexpected` and `reshaped` name them."""

    def __init__(self, source: str, missing: list[str], unexpected: list[str], reshaped: list[str]) -> None:
        self.missing, self.unexpected, self.reshaped = missing, unexpected, reshaped
        parts = (("missing", missing), ("unexpected", unexpected), ("with another shape", reshaped))
        what = "; ".join(f"{len(keys)} {label}: {_shortened(keys)}" for label, keys in parts if keys)
        super().__init__(f"{source} does not fit this model. {what}")


def load_weights(entry: Entry, module: nn.Module, choice: str | Path = AUTO, steps: Steps = SILENT) -> Weights:
    """Loads weights into `module` and returns their origin.

    `choice`: "auto" loads the entry's own weights, "random" leaves the module as built, anything else is a file:
    safetensors, or a torch state dict, which is read without running code from it. Keys must match exactly.
    Floating-point tensors are converted to the module's precision. Raises WeightsUnavailable and WeightsMismatch.
    """
    if choice == RANDOM:
        return UNTRAINED
    if choice != AUTO:
        path = Path(choice)
        _fill(module, read_state(path), path.name)
        return Weights(trained=True, source=f"file {path.name}", license="unknown", sha256=sha256_of(path))
    match entry.weights:
        case Shipped() as shipped:
            if not shipped.path.is_file():
                raise WeightsUnavailable(
                    f"{entry.name} is not shipped: train it with python -m models.training {shipped.path.stem}, "
                    f"or give a file with --weights FILE, or --weights random for load tests"
                )
            _fill(module, read_state(shipped.path), shipped.file)
            return Weights(
                trained=True,
                source=f"models/weights/{shipped.file}, by python -m models.training {shipped.path.stem}",
                license=shipped.license,
                sha256=sha256_of(shipped.path),
            )
        case Trained() as trained:
            _fill(module, read_state(trained.path), trained.path.name)
            return Weights(trained=True, source=trained.command, license="unknown", sha256=sha256_of(trained.path))
        case Torchvision() as published:
            path, sha256 = _download(published, steps)
            _fill(module, read_state(path), published.member)
            return Weights(
                trained=True,
                source=f"torchvision {published.member}",
                license=published.license,
                sha256=sha256,
            )
        case None:
            raise WeightsUnavailable(
                f"{entry.name}: no published weights; give your own with --weights FILE, "
                f"or --weights random for load tests"
            )


def read_state(path: Path) -> Mapping[str, Tensor]:
    """A state dict from safetensors or from torch.save, the latter restricted to tensors. Raises WeightsUnavailable."""
    if not path.is_file():
        raise WeightsUnavailable(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise WeightsUnavailable(
            f"{path}: neither safetensors nor a torch state dict ({_first_line(error)})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # checkpoints often also contain the optimiser
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsUnavailable(f"{path}: holds {type(state).__name__}, not a state dict of tensors")
    return state


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = module.state_dict()
    try:
        # The module itself decides which keys it accepts (a published file may contain parts for training only). Its
        # error is one long text; the typed error repeats the comparison.
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
        raise WeightsMismatch(source, missing, unexpected, reshaped) from error


def _download(published: Torchvision, steps: Steps) -> tuple[Path, str]:
    """The checkpoint in torch's cache folder, downloaded if absent, and its sha256.

    A cached file is verified too: its hash must begin with the digits at the end of its name. Raises
    WeightsUnavailable.
    """
    from torchvision.models import get_weight

    weights = get_weight(published.member)
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(weights.url).rpartition("/")[2]
    if not path.is_file():
        try:
            download(weights.url, path, steps)
        except OSError as error:
            raise WeightsUnavailable(
                f"{published.member} could not be downloaded ({_first_line(error)}). To do it by hand: download "
                f"{weights.url} on a machine with access and pass --weights {path.name}, or put it into {path.parent}"
            ) from error
    sha256 = sha256_of(path)
    beginning = path.stem.rpartition("-")[2]
    if not sha256.startswith(beginning):
        raise WeightsUnavailable(
            f"{path} is not the published file: its sha256 begins with {sha256[: len(beginning)]}, expected "
            f"{beginning}. Delete it to download it again, or replace it by {weights.url}; for weights of your own use "
            f"--weights FILE"
        )
    return path, sha256


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shortened(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
