"""`rafaga infer`: named tensors to any model, one served from a plain ONNX file too."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rafaga import Client, InvalidTensor, TensorDescription
from rafaga.cli._errors import ExitCode, UsageError
from rafaga.cli._output import show_json
from rafaga.errors import listed
from rafaga.options import did_you_mean
from rafaga.tensors import check_shape, describe

Array = npt.NDArray[Any]


def infer(args: Namespace, client: Client) -> int:
    model = client.model(args.model, version=args.model_version)
    inputs = {spec.name: spec for spec in model.inputs}
    found = client.infer(args.model, _arrays(args.input, inputs), version=args.model_version)
    if args.output is not None:
        with args.output.open("wb") as file:  # a file object, because savez would add .npz to a bare name
            np.savez(file, **found)  # type: ignore[arg-type]  # savez's own flag is a bool
    if args.json:
        outputs = {name: {"dtype": str(a.dtype), "shape": a.shape, "data": a} for name, a in found.items()}
        show_json({"model": model.name, "version": model.version, "outputs": outputs})
        return ExitCode.OK
    for name, array in found.items():
        print(TensorDescription(name, str(array.dtype), array.shape))
        print(np.array2string(array, max_line_width=80, threshold=64, separator=", "))
    return ExitCode.OK


def _arrays(given: Sequence[str], specs: Mapping[str, TensorDescription]) -> dict[str, Array]:
    """Of --input NAME=VALUE; without the name if the model has one input. Raises UsageError, InvalidTensor, OSError."""
    arrays: dict[str, Array] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals and len(specs) == 1:
            name, value = next(iter(specs)), text
        if name not in specs:
            raise UsageError(
                f"--input {text[:40]}: no input {name!r}{did_you_mean(name, specs)}; "
                f"expected NAME=VALUES or NAME=@FILE for {listed(specs.values())}"
            )
        if name in arrays:
            raise UsageError(f"--input {name} is given more than once")
        arrays[name] = _array(specs[name], value)
    return arrays


def _array(spec: TensorDescription, value: str) -> Array:
    array = _read(spec, value[1:]) if value.startswith("@") else _parsed(spec, value)
    if array.ndim == len(spec.shape) - 1 and spec.shape[0] is None:
        array = array[np.newaxis]  # one row
    check_shape(f"input {spec.name}", array.shape, spec.shape)
    return array


def _read(spec: TensorDescription, path: str) -> Array:
    if path.lower().endswith(".npy"):
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except ValueError as error:
            raise UsageError(f"--input {spec.name}: {path} is not an array of numbers: {error}") from None
    if spec.dtype != "string":
        raise UsageError(f"--input {spec.name}: {path}: expected a .npy file")
    return np.array(Path(path).read_bytes(), dtype=object).reshape([1] * len(spec.shape))


def _parsed(spec: TensorDescription, text: str) -> Array:
    """ "1,2,3", or nested as in JSON."""
    dtype = object if spec.dtype == "string" else None
    if dtype is object and not text.startswith("["):
        return _shaped(np.array(text.split(","), dtype), spec)
    try:
        array: Array = np.array(json.loads(text if text.startswith("[") else f"[{text}]"), dtype)
    except ValueError:
        raise UsageError(
            f"--input {spec.name}: {text[:40]!r} is not a list of values; expected 1,2,3 or [[1,2],[3,4]] or @FILE.npy"
        ) from None
    return _shaped(array, spec) if array.ndim == 1 else array


def _shaped(values: Array, spec: TensorDescription) -> Array:
    """A flat list fills the shape; the last free size holds what there is, other free ones are 1."""
    sizes = [1 if size is None else size for size in spec.shape]
    free = [axis for axis, size in enumerate(spec.shape) if size is None]
    if free:
        sizes[free[-1]] = -1
    try:
        return values.reshape(sizes)
    except ValueError:
        raise InvalidTensor(
            f"expected input {spec.name} of shape {describe(spec.shape)}, got {values.size} values"
        ) from None
