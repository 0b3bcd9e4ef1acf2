"""What is read from an ONNX file without ONNX Runtime: whether it is complete, and the sizes that occur in it.

Files are parsed by protobuf, as in ONNX Runtime: a parser of our own could see other fields than it does. Models whose
tensors are stored in other files ("external data") are refused: the model's hash does not cover those files, and a
model could read files that it should not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from rafaga.errors import BundleError
from rafaga.onnx.model_pb2 import Attribute, Function, Graph, Model, SparseTensor, Tensor

Block = Graph | Function
"""A list of nodes."""

INTEGERS: dict[int, np.dtype[Any]] = {6: np.dtype("<i4"), 7: np.dtype("<i8")}
"""By TensorProto.DataType."""

_MOST_VALUES = 32  # of a tensor that may hold sizes
_LARGEST_SIZE = 2**17


def parse(content: bytes) -> Model:
    """A serialised ModelProto. Raises BundleError if it is none, or is not complete in itself."""
    try:
        model = Model.FromString(content)
    except DecodeError:
        raise BundleError("the file is not an ONNX model") from None
    if any(tensor.external_data or tensor.data_location for tensor in _tensors(model)):
        raise BundleError("the model takes tensors from other files (external data): save it as one file")
    return model


def blocks(model: Model) -> Iterator[Block]:
    """The main graph first, then all that runs inside it, each before those that it contains."""
    yield from _with_inner(model.graph, *model.functions)


def constants(model: Model) -> set[int]:
    """Integers that may be sizes of an input: dimensions of tensors, values of small tensors and of attributes."""
    found: set[int] = set()
    for tensor in _tensors(model):
        found.update(tensor.dims)
        if math.prod(tensor.dims) <= _MOST_VALUES:
            found.update(integers(tensor))
    for block in blocks(model):
        for attribute in _attributes(block):
            found.update((attribute.i, *attribute.ints))
    return {size for size in found if 1 < size <= _LARGEST_SIZE}


def integers(tensor: Tensor) -> list[int]:
    """The values of a tensor of int32 or int64; none of any other."""
    dtype = INTEGERS.get(tensor.data_type)
    if dtype is None:
        return []
    raw = tensor.raw_data[: len(tensor.raw_data) // dtype.itemsize * dtype.itemsize]
    return [*tensor.int32_data, *tensor.int64_data, *np.frombuffer(raw, dtype).tolist()]


def _with_inner(*outer: Block) -> Iterator[Block]:
    pending = list(outer)
    for block in pending:  # grows
        yield block
        for attribute in _attributes(block):
            pending += [attribute.g] if attribute.HasField("g") else []
            pending += attribute.graphs


def _attributes(block: Block) -> Iterator[Attribute]:
    for node in block.nodes:
        yield from node.attributes
    if isinstance(block, Function):
        yield from block.attribute_defaults


def _tensors(model: Model) -> Iterator[Tensor]:
    """All, also those that only training uses."""
    training = [graph for part in model.training for graph in (part.initialization, part.algorithm)]
    for block in _with_inner(model.graph, *model.functions, *training):
        sparse: list[SparseTensor] = []
        if isinstance(block, Graph):
            yield from block.initializers
            sparse += block.sparse_initializers
        for attribute in _attributes(block):
            yield from (attribute.t, *attribute.tensors)
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)
