"""Plain ONNX: a model.onnx without a bundle. Its graph describes it, and nothing verifies its answers.

The warm-up needs inputs with which the graph runs. Their sizes are tried, or are given by a file beside the model,
samples.json: `{"audio": [1, 16000]}`, the shapes of the inputs whose sizes matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rafaga.bundle import Frozen, TensorSpec
from rafaga.errors import BundleError
from rafaga.files import MOST_TEXT_BYTES, contents, opened, opened_in
from rafaga.onnx.model_pb2 import Model
from rafaga.plain_model import PlainModel
from rafaga.server.engines.batched import Session, SessionEngine
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.loading import Samples
from rafaga.server.repository.onnx_file import constants
from rafaga.server.repository.traps import fails_on_empty
from rafaga.server.scheduling.job import Arrays

MODEL = "model.onnx"
SHAPES = "samples.json"

_SAME = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16"
_DTYPES = {f"tensor({name})": name for name in _SAME.split()} | {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(string)": "object",
}
# Sizes to try for the free dimensions. The warm-up uses the first with which the graph runs. Others follow that occur
# in the graph: a window or a kernel that needs as many elements, the target of a Reshape.
_SIZES = (8, 32, 1, 64, 224, 512, 4096)
_MORE_SIZES = 40
_MOST_ELEMENTS = 2**22
# Values to try for the integers of each row, often indices or lengths. Different rows come first, because they show
# whether rows influence each other; equal rows are tried last, and then the size of the free dimensions.
_BATCHES = ((0, 1, 0), (1, 2, 1), (0, 0, 0), (1, 1, 1))
_ROWS = 3
_TOLERANCE = 1e-3


Shapes = Mapping[str, Sequence[int]]
"""By the name of the input."""


def read(path: Path) -> bytes:
    """An ONNX file, or the model.onnx of a version's folder. Raises BundleError, OSError."""
    return contents(opened(path) if path.is_file() else opened_in(path, MODEL))


def sample_shapes(folder: Path) -> Shapes:
    """What samples.json says; nothing without the file. Raises BundleError."""
    if not (folder / SHAPES).exists():
        return {}
    try:
        return msgspec.json.decode(contents(opened_in(folder, SHAPES, MOST_TEXT_BYTES)), type=dict[str, list[int]])
    except msgspec.DecodeError as error:
        raise BundleError(f'{folder / SHAPES}: expected shapes such as {{"audio": [1, 16000]}}: {error}') from None


class SampleRecipe(Frozen, frozen=True):
    """How to make samples. tails: the shapes of their rows. numbers: one for each row. valid: see Samples."""

    tails: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    valid: bool = True

    def samples(self, inputs: Sequence[TensorSpec]) -> Samples:
        """The same ones in every process."""
        rng = np.random.default_rng(0)
        specs = zip(inputs, self.tails, strict=True)
        arrays = tuple(_sample(np.dtype(spec.dtype), tail, self.numbers, rng) for spec, tail in specs)
        return Samples(arrays, self.valid)


def describe(
    name: str, version: int, session: Session, graph: Model, max_batch_size: int, shapes: Shapes
) -> tuple[PlainModel, SampleRecipe]:
    """The model that `session` runs, which `graph` is, and sample inputs for it: of the given `shapes`, or of sizes
    that are tried. They are not valid if the graph fails on all. Raises BundleError.

    A model takes batches if its graph has a free first dimension, the same for all inputs, and a trial confirms it: a
    batch must have as many output rows as input rows, with the same values as the rows alone.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    specs = tuple(map(_spec, inputs)), tuple(map(_spec, outputs))
    empty = not fails_on_empty(graph)
    alone = PlainModel(name, version, *specs, max_batch_size=0, empty_inputs=empty)
    if not inputs or not outputs:
        raise BundleError(f"{name}: expected a graph with inputs and outputs")
    _check_shapes(specs[0], shapes)
    if _may_batch(inputs, outputs):
        batched = PlainModel(name, version, *specs, max_batch_size=max_batch_size, empty_inputs=empty)
        recipe = _recipe(batched, SessionEngine(batched, session), shapes, graph)
        if recipe is not None and _rows_are_independent(SessionEngine(batched, session), recipe.samples(specs[0])):
            return batched, recipe
    recipe = _recipe(alone, SessionEngine(alone, session), shapes, graph)
    if recipe is not None:
        return alone, recipe
    if shapes:
        raise BundleError(f"{name}: the graph fails on inputs of the shapes in {SHAPES}: {dict(shapes)}")
    if all(None not in spec.shape and np.dtype(spec.dtype).kind == "f" for spec in specs[0]):
        raise BundleError(f"{name}: the graph fails on inputs of the only shapes that it takes")
    return alone, SampleRecipe(tails=tuple(tuple(s or 1 for s in i.shape) for i in specs[0]), numbers=(0,), valid=False)


def _spec(tensor: Any) -> TensorSpec:
    """Of an onnxruntime.NodeArg. A free dimension is a symbol, or None if it has no name."""
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise BundleError(f"{tensor.name}: {tensor.type} cannot be served; expected a tensor of numbers or strings")
    return TensorSpec(
        name=tensor.name, dtype=dtype, shape=tuple(size if isinstance(size, int) else None for size in tensor.shape)
    )


def _may_batch(inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
    if not all(tensor.shape and not isinstance(tensor.shape[0], int) for tensor in (*inputs, *outputs)):
        return False
    return len({tensor.shape[0] for tensor in inputs}) == 1


def _check_shapes(specs: Sequence[TensorSpec], shapes: Shapes) -> None:
    """Raises BundleError."""
    named = {spec.name: spec for spec in specs}
    for name, shape in shapes.items():
        spec = named.get(name)
        if spec is None:
            raise BundleError(f"{SHAPES}: no input {name!r}, expected {', '.join(named)}")
        fits = len(shape) == len(spec.shape) and min(shape, default=1) > 0
        if not fits or any(fixed not in (None, size) for fixed, size in zip(spec.shape, shape, strict=True)):
            raise BundleError(f"{SHAPES}: {name}: expected a shape such as {list(spec.shape)}, got {list(shape)}")


def _recipe(model: PlainModel, engine: Engine, shapes: Shapes, graph: Model) -> SampleRecipe | None:
    """Inputs with which the graph runs; None if it fails on all that are tried."""
    for size, numbers in _attempts(model, shapes, graph):
        tails = tuple(_tail(spec, model, size, shapes.get(spec.name)) for spec in model.inputs)
        if max(math.prod(tail) for tail in tails) > _MOST_ELEMENTS and not shapes:
            continue
        recipe = SampleRecipe(tails=tails, numbers=tuple(numbers))
        try:
            run(engine, recipe.samples(model.inputs).inputs)
        except Exception:  # onnxruntime raises bare exceptions of many kinds
            continue
        return recipe
    return None


def _attempts(model: PlainModel, shapes: Shapes, graph: Model) -> Iterator[tuple[int, Sequence[int]]]:
    """A size for the free dimensions, and an integer for each row."""
    batched = model.max_batch_size > 0
    first = 1 if batched else 0
    free = any(size is None for spec in model.inputs if spec.name not in shapes for size in spec.shape[first:])
    numbers: Sequence[Sequence[int]] = _BATCHES if batched else ((0,), (1,))
    integers = any(np.dtype(spec.dtype).kind != "f" for spec in model.inputs)
    for size in _sizes(graph) if free else [max((s[-1] for s in shapes.values() if s), default=_SIZES[0])]:
        yield from ((size, of_rows) for of_rows in (numbers if integers else numbers[:1]))
        if integers:
            yield size, (size,) * len(numbers[0])


def _sizes(graph: Model) -> Iterator[int]:
    yield from _SIZES
    # Larger ones first: what a graph lacks is most often a minimal length.
    yield from sorted(constants(graph) - set(_SIZES), reverse=True)[:_MORE_SIZES]


def _tail(spec: TensorSpec, model: PlainModel, size: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes without the batch."""
    sizes = tuple(size if s is None else s for s in spec.shape) if shape is None else tuple(shape)
    return sizes[1:] if model.max_batch_size else sizes


def _sample(
    dtype: np.dtype[np.generic], tail: Sequence[int], numbers: Sequence[int], rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """One row for each of `numbers`: random floats, the number itself, or a text of that length."""
    if dtype.kind == "f":
        return rng.random((len(numbers), *tail)).astype(dtype)
    if dtype.kind == "O":
        of_rows = np.array(["a" * number for number in numbers], dtype)
    else:
        of_rows = np.array(numbers).astype(dtype)  # a size may be too large for a byte
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
