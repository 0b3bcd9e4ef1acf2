"""Loads the weights of an entry and records where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.download import download
from models.entry import Entry, Shipped, Torchvision, Trained
from models.progress import SILENT, Steps
from models.state import StateInvalid, fitted, read_state
from rafaga.bundle import Weights, sha256_of

AUTO, RANDOM, FACTORY = "auto", "random", "factory"

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

    `choice`: "auto" loads the entry's own weights, "random" and "factory" leave the module as built (the latter holds
    trained weights), anything else is a file: safetensors, or a torch state dict, which is read without running code
    from it. Keys must match exactly, but for the prefix of a wrapper. Floating-point tensors are converted to the
    module's precision. Raises WeightsUnavailable and WeightsMismatch.
    """
    if choice == RANDOM:
        return UNTRAINED
    if choice == FACTORY:
        return Weights(trained=True, source=f"built by {entry.architecture}", license="unknown")
    if choice != AUTO:
        path = Path(choice)
        state, entries = _read(path)
        state, prefix = fitted(state, module.state_dict().keys())
        _fill(module, state, path.name)
        source = ", ".join(part for part in (f"file {path.name}", entries, prefix) if part)
        return Weights(trained=True, source=source, license="unknown", sha256=sha256_of(path))
    match entry.weights:
        case Shipped() as shipped:
            if not shipped.path.is_file():
                raise WeightsUnavailable(
                    f"{entry.name} is not shipped: train it with python -m models.training {shipped.path.stem}, "
                    f"or give a file with --weights FILE, or --weights random for load tests"
                )
            _fill(module, _read(shipped.path)[0], shipped.file)
            return Weights(
                trained=True,
                source=f"models/weights/{shipped.file}, by python -m models.training {shipped.path.stem}",
                license=shipped.license,
                sha256=sha256_of(shipped.path),
            )
        case Trained() as trained:
            _fill(module, _read(trained.path)[0], trained.path.name)
            return Weights(trained=True, source=trained.command, license="unknown", sha256=sha256_of(trained.path))
        case Torchvision() as published:
            path, sha256 = _download(published, steps)
            _fill(module, _read(path)[0], published.member)
            return Weights(
                trained=True,
                source=f"torchvision {published.member}",
                license=published.license,
                sha256=sha256,
            )
        case None:
            raise WeightsUnavailable(
                f"{entry.name}: no published weights; give your own with --weights FILE, --weights factory if the "
                f"factory of --factory loads them, or --weights random for load tests"
            )


def _read(path: Path) -> tuple[Mapping[str, Tensor], str]:
    try:
        return read_state(path)
    except StateInvalid as error:
        raise WeightsUnavailable(str(error)) from error


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = module.state_dict()
    integers = [k for k, t in state.items() if k in own and own[k].is_floating_point() and not _is_float(t)]
    if integers:
        raise WeightsUnavailable(
            f"{source}: a quantised state dict ({state[integers[0]].dtype} in {integers[0]}); give the float weights"
        )
    try:
        # The module itself decides which keys it accepts (a published file may contain parts for training only). Its
        # error is one long text; the typed error repeats the comparison.
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
        raise WeightsMismatch(source, missing, unexpected, reshaped) from error


def _is_float(tensor: Tensor) -> bool:
    """Not of eight bits: their scales are tensors of their own, and copying the numbers would lose them."""
    return tensor.is_floating_point() and tensor.itemsize > 1


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
