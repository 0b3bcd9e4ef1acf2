"""golden.npz: inputs of a model, and PyTorch's outputs for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import Bundle, relative_error
from rafaga.errors import BundleError
from rafaga.objects import paired
from rafaga.server.engines.contract import Engine, run_in_batches
from rafaga.server.engines.loading import Samples
from rafaga.server.scheduling.job import Arrays


class Golden(Samples):
    def __init__(self, bundle: Bundle, arrays: dict[str, NDArray[np.generic]]) -> None:
        """Raises BundleError when an input or output is missing."""
        try:
            super().__init__(tuple(arrays[f"input.{spec.name}"] for spec in bundle.inputs))
            self.outputs = tuple(arrays[f"output.{spec.name}"] for spec in bundle.outputs)
            self.objects = bundle.detection is not None  # in any order: see rafaga.objects
        except KeyError as missing:
            raise BundleError(f"{bundle.name}: golden.npz lacks {missing}") from None

    @classmethod
    def load(cls, bundle: Bundle, path: Path) -> Golden:
        with np.load(path, allow_pickle=False) as file:
            return cls(bundle, dict(file))

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
