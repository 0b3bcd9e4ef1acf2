"""State dicts as they are published: checkpoints of training loops, prefixes of wrappers, and files that hold none."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Where training loops put the weights, beside the optimiser. The first one found is taken.
_ENTRIES = ("state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "model_ema")
# DataParallel, Lightning and torch.compile prepend these to every key.
_WRAPPERS = re.compile(r"(?:module|model|_orig_mod)\.")
_OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"<!doctype html", "an HTML page, not weights: the download was answered with a web page"),
    (b"<html", "an HTML page, not weights: the download was answered with a web page"),
    (b"\x89hdf", "an HDF5 file of Keras; expected safetensors or a torch state dict"),
)


class StateInvalid(Exception):
    """The file holds no state dict that can be read; the message is one line with the reason."""


def read_state(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """A state dict from safetensors or from torch.save, and where in the file it was ("" if the file holds no more).

    Reads tensors only and runs no code of the file. Raises StateInvalid.
    """
    if not path.is_file():
        raise StateInvalid(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        beginning = file.read(64)
    for magic, reason in _OTHER_FILES:
        if beginning.lstrip().lower().startswith(magic):
            raise StateInvalid(f"{path}: {reason}")
    try:
        if beginning[8:9] == b"{":  # after the length of the header
            return load_file(path), ""
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # plain data
            warnings.simplefilter("ignore", UserWarning)  # what it says of other files is in the error too
            found: object = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise StateInvalid(f"{path}: {_why_not_read(path, error)}") from error
    entries: list[str] = []
    while isinstance(found, dict) and (entry := next((e for e in _ENTRIES if isinstance(found.get(e), dict)), None)):
        entries.append(entry)
        found = found[entry]
    where = ".".join(entries)
    return _of_tensors(found, f"{path}{': ' + where if where else ''}"), where


def _of_tensors(found: object, where: str) -> Mapping[str, Tensor]:
    if not isinstance(found, dict) or not found:
        what = "an empty dict" if isinstance(found, dict) else type(found).__name__
        raise StateInvalid(f"{where}: holds {what}, not a state dict of tensors")
    if any("_packed_params" in str(key) for key in found) or any(
        isinstance(value, Tensor) and value.is_quantized for value in found.values()
    ):
        raise StateInvalid(
            f"{where}: a quantised state dict; give the float weights, export makes the int8 file itself"
        )
    other = next((key for key, value in found.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        kind = type(found[other]).__name__
        raise StateInvalid(f"{where}: holds {kind} under {other!r}, not a state dict of tensors")
    return found


def _why_not_read(path: Path, error: Exception) -> str:
    if "TorchScript" in str(error):
        return "a TorchScript archive; save model.state_dict() of the module it was made from"
    if isinstance(error, pickle.UnpicklingError) and str(error).startswith("Weights only load failed"):
        try:
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # not a file of torch.save in the current format; the parser raises many kinds of errors
            classes = []
        if any(name.startswith("torch.nn.modules.") for name in classes):
            return "a pickled module, which cannot be read without running its code; save model.state_dict() instead"
        if classes:
            names = ", ".join(sorted(set(classes) - {"argparse.Namespace"})[:3])
            return f"holds objects besides tensors ({names}), which are not read; save model.state_dict() alone"
    return f"neither safetensors nor a torch state dict ({(str(error).splitlines() or [type(error).__name__])[0]})"


def fitted(state: Mapping[str, Tensor], own: Collection[str]) -> tuple[Mapping[str, Tensor], str]:
    """`state` without the prefix of a wrapper, where more of the module's `own` keys are then found; and a note.

    Keys without that prefix (the loss's, the counter of an average) are left out and named in the note.
    """
    prefixes = {""}
    for key in state:
        end = 0
        while match := _WRAPPERS.match(key, end):
            prefixes.add(key[: (end := match.end())])
    found = {prefix: sum(prefix + key in state for key in own) for prefix in prefixes}
    prefix = max(sorted(prefixes, key=len), key=found.__getitem__)
    if not prefix:
        return state, ""
    note = f"prefix {prefix} stripped"
    if others := [key for key in state if not key.startswith(prefix)]:
        note += f", left out: {', '.join(others[:3])}" + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, note
