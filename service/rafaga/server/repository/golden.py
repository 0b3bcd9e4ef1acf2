"""golden.npz: inputs of a model, and PyTorch's outputs for them."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import Bundle
from rafaga.errors import BundleError
from rafaga.objects import paired
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import Engine, run_in_batches
from rafaga.server.engines.loading import Samples
from rafaga.server.scheduling.job import Arrays
from rafaga.tensors import relative_error

_MOST_BYTES = 2**29


class Golden(Samples):
    def __init__(self, bundle: Bundle | PlainModel, arrays: dict[str, NDArray[np.generic]]) -> None:
        """Raises BundleError when an input or output is missing."""
        try:
            super().__init__(tuple(arrays[f"input.{spec.name}"] for spec in bundle.inputs))
            self.outputs = tuple(arrays[f"output.{spec.name}"] for spec in bundle.outputs)
            self.objects = bundle.detection is not None  # in any order: see rafaga.objects
        except KeyError as missing:
            raise BundleError(f"{bundle.name}: golden.npz lacks {missing}") from None

    @classmethod
    def load(cls, bundle: Bundle, file: Path | BinaryIO) -> Golden:
        """Raises BundleError as the constructor, and if the archive does not hold plain arrays of `bundle`'s types."""
        dtypes = {f"input.{spec.name}": spec.dtype for spec in bundle.inputs}
        dtypes |= {f"output.{spec.name}": spec.dtype for spec in bundle.outputs}
        try:
            with zipfile.ZipFile(file) as archive:
                arrays = _read(archive, dtypes)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise BundleError(f"{bundle.name}: golden.npz cannot be read: {error}") from None
        return cls(bundle, arrays)

    def verify(self, engine: Engine, tolerance: float, max_rows: int) -> None:
        """Runs the inputs forwards and backwards. Raises BundleError when answers differ too much.

        The second run has other rows in the same buffers, so an engine that answers from stale ones is found.
        """
        for step in (1, -1):
            outputs = run_in_batches(engine, tuple(a[::step] for a in self.inputs), max_rows)
            self.check(tuple(o[::step] for o in outputs), tolerance)

    def check(self, outputs: Arrays, tolerance: float) -> None:
        """Raises BundleError when an output's relative error passes `tolerance` (see bundle.relative_error)."""
        for expected, got in zip(self.outputs, outputs, strict=True):
            if got.shape != expected.shape:
                raise BundleError(f"expected golden outputs of shape {expected.shape}, got {got.shape}")
        found, reference = paired(outputs, self.outputs) if self.objects else (outputs, self.outputs)
        for expected, got in zip(reference, found, strict=True):
            error = relative_error(got, expected)
            if not error <= tolerance:  # so that NaN fails too
                raise BundleError(f"golden outputs differ by {error:.2e} relative, allowed are {tolerance:.2e}")


def _read(archive: zipfile.ZipFile, dtypes: Mapping[str, str]) -> dict[str, NDArray[np.generic]]:
    """The arrays of these names, as far as they are there. Nothing is unpacked before all sizes are known."""
    found = {name: f"{name}.npy" for name in dtypes if f"{name}.npy" in archive.namelist()}
    total = sum(_size(archive, file, dtypes[name]) for name, file in found.items())
    if total > _MOST_BYTES:
        raise ValueError(f"expected at most {_MOST_BYTES} bytes of arrays, got {total}")
    arrays = {}
    for name, file in found.items():
        with archive.open(file) as member:
            arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def _size(archive: zipfile.ZipFile, file: str, dtype: str) -> int:
    """Bytes of an array, according to its head and to the archive's directory, which must agree."""
    with archive.open(file) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{file}: expected NumPy's format 1.0")
        shape, _, found = np.lib.format.read_array_header_1_0(member)
        size = math.prod(shape) * found.itemsize
        if found != np.dtype(dtype) or found.hasobject:
            raise ValueError(f"{file}: expected {dtype}, got {found}")
        if min(shape, default=1) < 0 or archive.getinfo(file).file_size != member.tell() + size:
            raise ValueError(f"{file}: an array of shape {shape} does not fit its size in the archive")
    return size
