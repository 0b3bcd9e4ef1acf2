"""Tensors of the Open Inference Protocol: a request's inputs, checked against the model, and a reply's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import Bundle, TensorSpec
from rafaga.errors import InvalidRequest, InvalidTensor, Unsupported, listed, quoted
from rafaga.inference import open_inference_pb2 as pb
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.scheduling.job import Arrays
from rafaga.server.services.open_inference.parameters import integer
from rafaga.server.services.submission import RequestLimits, best_of
from rafaga.tensors import DATATYPES, check_shape, from_wire, in_wire_order, length_prefixed, with_lengths
from rafaga.wire import field, head_of

InputTensor = pb.ModelInferRequest.InferInputTensor

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}

# The field of typed contents; FP16 has none.
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}

# The product of an empty tensor's other sizes. They cost the client nothing, but a model may allocate by them.
_MAX_EMPTY_SIZE = 2**18


def datatype(spec: TensorSpec) -> str:
    """The protocol's name: "FP32" for float32."""
    return _NAMES[np.dtype(spec.dtype)]


def shape(spec: TensorSpec, batched: bool = True) -> list[int]:
    """With the batch dimension. One number per row is declared as [-1, 1]: Triton's clients expect a size per row. A
    request may also have it as [N], as the graph has; see `is_flat`."""
    sizes = [-1 if size is None else size for size in spec.shape]
    return [*sizes, 1] if batched and len(sizes) == 1 else sizes


_ID = pb.ModelInferResponse.ID_FIELD_NUMBER
_RAW = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER


class WantedOutput(NamedTuple):
    """A requested output: its position in the model, and how many classes to return instead of the tensor (0: none)."""

    position: int
    spec: TensorSpec
    classes: int = 0


def wanted_outputs(request: pb.ModelInferRequest, model: ServedModel) -> list[WantedOutput]:
    """Raises InvalidRequest, or Unsupported for shared memory."""
    specs = model.bundle.outputs
    if not request.outputs:
        return [WantedOutput(i, spec) for i, spec in enumerate(specs)]
    if len({output.name for output in request.outputs}) < len(request.outputs):
        raise InvalidRequest("expected every output to be requested once")
    index = {spec.name: i for i, spec in enumerate(specs)}
    wanted = []
    for output in request.outputs:
        if output.name not in index:
            raise InvalidRequest(f"no output {quoted(output.name)}; available: {listed(index)}")
        _refuse_shared_memory(output.parameters)
        at = index[output.name]
        classes = integer(output.parameters, "classification")
        if "classification" in output.parameters and not (classes and _has_classes(specs[at], model.bundle)):
            raise InvalidRequest("classification: expected a count of at least 1, on an output of shape [N, classes]")
        wanted.append(WantedOutput(at, specs[at], classes))
    return wanted


def _has_classes(spec: TensorSpec, bundle: Bundle | PlainModel) -> bool:
    """Whether an output has one score per class. A detector's scores are per object, whatever their shape."""
    if len(spec.shape) != 2 or spec.dtype == "object" or bundle.detection is not None:
        return False
    return not bundle.labels or spec.shape[1] == len(bundle.labels)


def is_flat(request: pb.ModelInferRequest) -> bool:
    """Whether the client sends one number per row as [N]. It gets outputs so too."""
    return any(len(tensor.shape) == 1 for tensor in request.inputs)


def inputs(request: pb.ModelInferRequest, model: ServedModel, limits: RequestLimits) -> Arrays:
    """The input arrays in the model's order, checked against its bundle; one row for a model without batches.

    Raises InvalidTensor.
    """
    raw = _raw_contents(request)
    specs, ragged = model.bundle.inputs, model.ragged
    expected, got = [spec.name for spec in specs], [tensor.name for tensor in request.inputs]
    without_lengths = ragged and got == expected[:1] and len(expected) == 2
    if sorted(got) != sorted(expected) and not without_lengths:
        names = listed(name[:63] for name in got) or "none"
        raise InvalidTensor(f"expected the inputs {listed(expected)}; got {names}")
    index = {name: i for i, name in enumerate(got)}
    arrays: list[NDArray[np.generic]] = []
    for spec in specs[: len(got)]:
        i = index[spec.name]
        try:
            arrays.append(_array(request.inputs[i], raw[i] if raw else None, spec, model.batched))
        except InvalidTensor as error:
            raise InvalidTensor(f"input {spec.name}: {error.message}") from None
    if without_lengths:  # every series is as long as the array
        arrays.append(np.full(len(arrays[0]), arrays[0].shape[1], dtype=specs[1].dtype))
    if isinstance(model.bundle, PlainModel) and not model.bundle.empty_inputs and any(not a.size for a in arrays):
        raise InvalidTensor("expected elements in every input: an operator of this model does not take empty ones")
    if not model.batched:
        return tuple(array[np.newaxis] for array in arrays)
    rows = len(arrays[0])
    if len(arrays) > 1 and any(len(array) != rows for array in arrays):
        raise InvalidTensor(f"expected equally many rows in every input, got {[len(a) for a in arrays]}")
    limits.check_rows(rows)
    if model.bundle.image is not None:
        if not arrays[0].size:
            raise InvalidTensor(f"expected at least one pixel, got shape {list(arrays[0].shape)}")
        limits.check_free_size(model.bundle.image, *arrays[0].shape[1:3])
    return ragged_rows(arrays, model.bundle) if ragged else tuple(arrays)


def _raw_contents(request: pb.ModelInferRequest) -> Sequence[bytes]:
    """One per input, or none: the inputs then carry their contents."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidTensor(f"expected {len(request.inputs)} raw_input_contents, one per input, got {len(raw)}")
    for tensor in request.inputs:
        _refuse_shared_memory(tensor.parameters)
        if raw and tensor.HasField("contents"):
            raise InvalidTensor("expected either raw_input_contents or contents, got both")
    return raw


def _refuse_shared_memory(parameters: Mapping[str, pb.InferParameter]) -> None:
    if "shared_memory_region" in parameters:
        raise Unsupported("expected tensors in the request: shared memory is not supported")


def _array(tensor: InputTensor, raw: bytes | None, spec: TensorSpec, batched: bool) -> NDArray[np.generic]:
    expected = datatype(spec)
    if tensor.datatype != expected:
        raise InvalidTensor(f"expected datatype {expected}, got {tensor.datatype[:16]!r}")
    sizes = tuple(tensor.shape)
    if sizes and min(sizes) < 0:
        raise InvalidTensor(f"expected sizes of zero or more, got {list(sizes)}")
    if batched and len(spec.shape) == 1 and len(sizes) == 2 and sizes[1] == 1:
        sizes = sizes[:1]  # see `shape`
    check_shape("a tensor", sizes, spec.shape)
    if 0 in sizes:
        return _empty(tensor, raw, sizes, batched)
    if expected == "BYTES":
        return _strings(tensor, raw, sizes)
    if raw is not None:
        return from_wire(raw, DATATYPES[expected], sizes)
    return _from_contents(tensor, sizes)


def _empty(tensor: InputTensor, raw: bytes | None, sizes: Sequence[int], batched: bool) -> NDArray[np.generic]:
    """A tensor without elements, such as the edges of a graph without any. Any free size but the batch may be zero."""
    if batched and not sizes[0]:
        raise InvalidTensor(f"expected at least one row, got shape {list(sizes)}")
    if math.prod(size for size in sizes if size) > _MAX_EMPTY_SIZE:
        raise InvalidTensor(f"expected other sizes of at most {_MAX_EMPTY_SIZE} in an empty tensor")
    if raw or tensor.contents.ByteSize():
        raise InvalidTensor(f"expected no contents for shape {list(sizes)}")
    return np.empty(sizes, DATATYPES[tensor.datatype])


def _from_contents(tensor: InputTensor, sizes: Sequence[int]) -> NDArray[np.generic]:
    field_name = _CONTENTS.get(tensor.datatype)
    if field_name is None:
        raise InvalidTensor(f"{tensor.datatype} comes as raw_input_contents only")
    values, count = list(getattr(tensor.contents, field_name)), math.prod(sizes)
    if len(values) != count:
        raise InvalidTensor(f"expected {count} elements in {field_name} for shape {list(sizes)}, got {len(values)}")
    try:
        return np.array(values, DATATYPES[tensor.datatype]).reshape(sizes)
    except OverflowError:
        raise InvalidTensor(f"a value does not fit {tensor.datatype}") from None


def ragged_rows(arrays: Sequence[NDArray[np.generic]], bundle: Bundle | PlainModel) -> Arrays:
    """Values and lengths, checked. Values beyond a row's length become zeros, the padding that the model expects.

    Raises InvalidTensor.
    """
    values, length, *covariates = arrays
    forecast, sequence = bundle.forecast, bundle.sequence
    if forecast is not None:
        shortest, longest, what = forecast.min_history, forecast.max_history, "observations"
    else:
        assert sequence is not None  # only these two are ragged
        shortest, longest, what = 1, sequence.max_length, "symbols"
    if values.shape[1] > longest:
        raise InvalidTensor(f"expected at most {longest} {what}, got {values.shape[1]}")
    low, high = int(length.min()), int(length.max())
    if low < shortest or high > values.shape[1]:
        raise InvalidTensor(
            f"expected lengths from {shortest} to {values.shape[1]}, as many as given; got {low} to {high}"
        )
    if low < values.shape[1]:
        padding = np.less_equal.outer(length, np.arange(values.shape[1]))
        values = np.where(padding, values.dtype.type(0), values)
    if forecast is not None and not np.isfinite(values).all():
        raise InvalidTensor("expected finite numbers in the history: fill the gaps first")
    if covariates:
        past, future = covariates
        if past.shape[1] != values.shape[1]:
            raise InvalidTensor(f"expected past_covariates of {values.shape[1]} steps, as history; got {past.shape[1]}")
        padding = np.less_equal.outer(length, np.arange(past.shape[1]))
        past = np.where(padding[:, :, np.newaxis], past.dtype.type(0), past)
        if not (np.isfinite(past).all() and np.isfinite(future).all()):
            raise InvalidTensor("expected finite numbers in the covariates")
        return values, length, past, future
    if sequence is not None and not (values.min() >= 0 and values.max() < len(bundle.labels)):
        raise InvalidTensor(f"expected symbols from 0 to {len(bundle.labels) - 1}: indices into the model's labels")
    return values, length


def bytes_input(request: pb.ModelInferRequest, model: ServedModel) -> list[bytes]:
    """The elements of the one BYTES input, of shape [N] or [N, 1]."""
    tensor, name = request.inputs[0], model.bundle.inputs[0].name
    if tensor.name != name:
        raise InvalidTensor(f"expected the input {name}, got {quoted(tensor.name)}")
    if len(tensor.shape) not in (1, 2) or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
        raise InvalidTensor(f"input {name}: expected encoded images of shape [N, 1], got {list(tensor.shape)}")
    raw = _raw_contents(request)
    return _elements(tensor, raw[0] if raw else None, tensor.shape[0])


def _elements(tensor: InputTensor, raw: bytes | None, count: int) -> list[bytes]:
    elements = list(tensor.contents.bytes_contents if raw is None else length_prefixed(raw))
    if len(elements) != count:
        raise InvalidTensor(f"BYTES: expected {count} elements, got {len(elements)}")
    return elements


def _strings(tensor: InputTensor, raw: bytes | None, sizes: Sequence[int]) -> NDArray[np.generic]:
    elements = _elements(tensor, raw, math.prod(sizes))
    try:
        return np.array([element.decode() for element in elements], dtype=object).reshape(sizes)
    except UnicodeDecodeError:
        raise InvalidTensor("expected text in UTF-8") from None


def response(
    name: str, identity: str, model: ServedModel, wanted: Sequence[WantedOutput], outputs: Arrays, *, flat: bool
) -> bytes:
    """A serialised ModelInferResponse. `flat`: one number per row comes as [N], otherwise as [N, 1].

    Written field by field after a head that all replies of one shape share. Building a message takes four times as
    long, which is more than the run of a small model.
    """
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    raw: list[bytes | memoryview] = []  # copied once, into the reply
    for output in wanted:
        array = outputs[output.position] if model.batched else outputs[output.position][0, ...]
        if output.classes:
            text = _classes(array, output.classes, model.bundle.labels)
            tensors.append((output.spec.name, "BYTES", (len(array), min(output.classes, array.shape[1]))))
            raw.append(with_lengths(text))
        else:
            sizes = (*array.shape, 1) if model.batched and array.ndim == 1 and not flat else array.shape  # see `shape`
            tensors.append((output.spec.name, _NAMES[array.dtype], sizes))
            strings = array.dtype == object
            raw.append(with_lengths(str(s).encode() for s in array.ravel()) if strings else in_wire_order(array).data)
    fields: list[bytes | memoryview] = [_head(name, str(model.bundle.version), tuple(tensors))]
    if identity:
        fields.append(field(_ID, identity.encode()))
    for contents in raw:
        fields += (head_of(_RAW, memoryview(contents).nbytes), contents)
    return b"".join(fields)


@lru_cache(maxsize=1024)
def _head(name: str, version: str, tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The beginning of all replies with these names and shapes."""
    described = [
        pb.ModelInferResponse.InferOutputTensor(name=tensor, datatype=kind, shape=sizes)
        for tensor, kind, sizes in tensors
    ]
    return pb.ModelInferResponse(model_name=name, model_version=version, outputs=described).SerializeToString()


def _classes(scores: NDArray[np.generic], count: int, labels: Sequence[str]) -> list[bytes]:
    """ "score:index:label" for the best of each row, row after row."""
    return [
        f"{score:f}:{index}{f':{labels[index]}' if labels else ''}".encode()
        for best in best_of(scores, count)
        for index, score in best
    ]
