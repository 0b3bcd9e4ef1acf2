"""Plain ONNX: a model.onnx without a bundle. Its graph describes it, and nothing verifies its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from rafaga.bundle import TensorSpec
from rafaga.errors import BundleError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.loading import Samples
from rafaga.server.engines.onnxruntime import SessionEngine
from rafaga.server.scheduling.job import Arrays

MODEL = "model.onnx"

_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(string)": "object",
}
# Sizes to try for the free dimensions. The warm-up uses the first with which the graph runs.
_SIZES = (8, 32, 1, 64, 224)
# Values to try for the integers of each row, often indices or lengths. Different rows come first, because they show
# whether rows influence each other; equal rows are tried last.
_BATCHES = ((0, 1, 0), (1, 2, 1), (0, 0, 0), (1, 1, 1))
_ROWS = 3
_TOLERANCE = 1e-3


class GraphTensor(Protocol):
    """onnxruntime.NodeArg. A free dimension is a symbol, or None if it has no name."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class DescribedSession(Protocol):
    def get_inputs(self) -> Sequence[GraphTensor]: ...

    def get_outputs(self) -> Sequence[GraphTensor]: ...


def describe(name: str, version: int, session: DescribedSession, max_batch_size: int) -> tuple[PlainModel, Samples]:
    """The model that `session` runs, and sample inputs for it. Raises BundleError.

    A model takes batches if its graph has a free first dimension, the same for all inputs, and a trial confirms it: a
    batch must have as many output rows as input rows, with the same values as the rows alone.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    specs = tuple(map(_spec, inputs)), tuple(map(_spec, outputs))
    alone = PlainModel(name, version, *specs, max_batch_size=0)
    if not inputs or not outputs:
        raise BundleError(f"{name}: expected a graph with inputs and outputs")
    if _may_batch(inputs, outputs):
        batched = PlainModel(name, version, *specs, max_batch_size=max_batch_size)
        samples = _samples(batched, SessionEngine(batched, session))
        if samples is not None and _rows_are_independent(SessionEngine(batched, session), samples):
            return batched, samples
    samples = _samples(alone, SessionEngine(alone, session))
    if samples is None:
        raise BundleError(f"{name}: the graph fails on every input that was tried, with free dimensions of {_SIZES}")
    return alone, samples


def _spec(tensor: GraphTensor) -> TensorSpec:
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise BundleError(f"{tensor.name}: {tensor.type} cannot be served; expected a tensor of numbers or strings")
    return TensorSpec(
        name=tensor.name, dtype=dtype, shape=tuple(size if isinstance(size, int) else None for size in tensor.shape)
    )


def _may_batch(inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> bool:
    if not all(tensor.shape and not isinstance(tensor.shape[0], int) for tensor in (*inputs, *outputs)):
        return False
    return len({tensor.shape[0] for tensor in inputs}) == 1


def _samples(model: PlainModel, engine: Engine) -> Samples | None:
    """Inputs with which the graph runs; None if it fails on all that are tried."""
    for size, numbers in _attempts(model):
        rng = np.random.default_rng(0)
        samples = Samples(tuple(_sample(spec, model, size, numbers, rng) for spec in model.inputs))
        try:
            run(engine, samples.inputs)
        except Exception:  # onnxruntime raises bare exceptions of many kinds
            continue
        return samples
    return None


def _attempts(model: PlainModel) -> Iterator[tuple[int, Sequence[int]]]:
    """A size for the free dimensions, and an integer for each row."""
    batched = model.max_batch_size > 0
    free = any(size is None for spec in model.inputs for size in spec.shape[1 if batched else 0 :])
    numbers: Sequence[Sequence[int]] = _BATCHES if batched else ((0,), (1,))
    if all(np.dtype(spec.dtype).kind == "f" for spec in model.inputs):
        numbers = numbers[:1]
    for size in _SIZES if free else _SIZES[:1]:
        for of_rows in numbers:
            yield size, of_rows


def _sample(
    spec: TensorSpec, model: PlainModel, size: int, numbers: Sequence[int], rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """One row for each of `numbers`: random floats, the number itself, or a text of that length."""
    tail = [size if s is None else s for s in (spec.shape[1:] if model.max_batch_size else spec.shape)]
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.random((len(numbers), *tail)).astype(dtype)
    of_rows = np.array(["a" * number for number in numbers] if dtype.kind == "O" else numbers, dtype)
    return np.broadcast_to(of_rows.reshape(-1, *(1 for _ in tail)), (len(numbers), *tail)).copy()


def _rows_are_independent(engine: Engine, samples: Samples) -> bool:
    def alone(row: int) -> Arrays:
        return run(engine, tuple(a[row : row + 1] for a in samples.inputs))

    try:
        together = run(engine, samples.inputs)
        apart = list(zip(*map(alone, range(_ROWS)), strict=True))
    except Exception:  # onnxruntime raises bare exceptions of many kinds
        return False
    if any(output.shape[:1] != (_ROWS,) for output in together):
        return False
    return all(
        all(part.shape[1:] == one.shape[1:] for part in parts) and _same(one, np.concatenate(parts))
        for one, parts in zip(together, apart, strict=True)
    )


def _same(
    a: np.ndarray[tuple[int, ...], np.dtype[np.generic]], b: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> bool:
    if a.shape != b.shape or a.dtype.kind not in "fiu":
        return np.array_equal(a, b)
    return bool(np.allclose(a.astype(np.float64), b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True))
