"""Tensors of the Open Inference Protocol: a request's inputs, checked against the model, and a reply's outputs."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import Bundle, TensorSpec
from rafaga.errors import InvalidRequest, InvalidTensor, Unsupported, listed
from rafaga.inference import open_inference_pb2 as pb
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.scheduling.job import Arrays
from rafaga.server.services.decoding import RequestLimits
from rafaga.server.services.open_inference.parameters import integer
from rafaga.tensors import check_shape, from_wire, to_wire
from rafaga.wire import field

# The protocol's name of each dtype, numpy's name, and the field of typed contents with the dtype of its elements (None:
# raw contents only).
_TYPES: tuple[tuple[str, str, tuple[str, str] | None], ...] = (
    ("BOOL", "bool", ("bool_contents", "bool")),
    ("UINT8", "uint8", ("uint_contents", "uint32")),
    ("UINT16", "uint16", ("uint_contents", "uint32")),
    ("UINT32", "uint32", ("uint_contents", "uint32")),
    ("UINT64", "uint64", ("uint64_contents", "uint64")),
    ("INT8", "int8", ("int_contents", "int32")),
    ("INT16", "int16", ("int_contents", "int32")),
    ("INT32", "int32", ("int_contents", "int32")),
    ("INT64", "int64", ("int64_contents", "int64")),
    ("FP16", "float16", None),
    ("FP32", "float32", ("fp32_contents", "float32")),
    ("FP64", "float64", ("fp64_contents", "float64")),
    ("BYTES", "object", ("bytes_contents", "object")),
)
_DATATYPE = {numpy_name: name for name, numpy_name, _ in _TYPES}
_DTYPES = {name: np.dtype(numpy_name) for name, numpy_name, _ in _TYPES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CONTENTS = {name: contents for name, _, contents in _TYPES}

# The product of an empty tensor's other sizes. They cost the client nothing, but a model may allocate by them.
_MAX_EMPTY_SIZE = 2**18


def datatype(spec: TensorSpec) -> str:
    """The protocol's name: "FP32" for float32."""
    return _DATATYPE[spec.dtype]


def shape(spec: TensorSpec, batched: bool = True) -> list[int]:
    """With the batch dimension. One number per row is declared as [-1, 1]: Triton's clients expect a size per row."""
    sizes = [-1 if size is None else size for size in spec.shape]
    return [*sizes, 1] if batched and len(sizes) == 1 else sizes


_ID = pb.ModelInferResponse.ID_FIELD_NUMBER
_RAW = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER


class WantedOutput:
    """A requested output: its index in the model, and how many classes to return instead of the tensor (0: none)."""

    __slots__ = ("classes", "index", "spec")

    def __init__(self, index: int, spec: TensorSpec, classes: int = 0) -> None:
        self.index = index
        self.spec = spec
        self.classes = classes


def wanted_outputs(request: pb.ModelInferRequest, model: ServedModel) -> list[WantedOutput]:
    specs, requested = model.bundle.outputs, request.outputs
    if not requested:
        return [WantedOutput(i, spec) for i, spec in enumerate(specs)]
    names = [output.name for output in requested]
    if len(set(names)) < len(names):
        raise InvalidRequest("expected every output to be requested once")
    index = {spec.name: i for i, spec in enumerate(specs)}
    wanted = []
    for name, output in zip(names, requested, strict=True):
        at = index.get(name)
        if at is None:
            raise InvalidRequest(f"no output {name[:63]!r}; available: {listed(index)}")
        classes = 0
        parameters = output.parameters
        _refuse_shared_memory(parameters)
        if "classification" in parameters:
            classes = integer("classification", parameters["classification"])
            if classes < 1 or not _has_classes(specs[at], model.bundle):
                raise InvalidRequest(
                    "classification: expected a count of at least 1, on an output of shape [N, classes]"
                )
        wanted.append(WantedOutput(at, specs[at], classes))
    return wanted


def _has_classes(spec: TensorSpec, bundle: Bundle | PlainModel) -> bool:
    """Whether an output has one score per class. A detector's scores are per object, whatever their shape."""
    if len(spec.shape) != 2 or spec.dtype == "object" or bundle.detection is not None:
        return False
    return not bundle.labels or spec.shape[1] == len(bundle.labels)


def inputs(request: pb.ModelInferRequest, model: ServedModel, limits: RequestLimits) -> Arrays:
    """The input arrays in the model's order, checked against its bundle; one row for a model without batches.

    Raises InvalidTensor.
    """
    raw = _raw_contents(request)
    given = {tensor.name: i for i, tensor in enumerate(request.inputs)}
    specs, ragged = model.bundle.inputs, model.bundle.ragged
    arrays: list[NDArray[np.generic]] = []
    used = 0
    for spec in specs:
        i = given.get(spec.name)
        if i is not None:
            used += 1
            arrays.append(_array(request.inputs[i], raw[i] if raw else None, spec, model.batched))
        elif arrays and ragged:  # without lengths every series is as long as the array
            arrays.append(np.full(len(arrays[0]), arrays[0].shape[1], dtype=spec.dtype))
        else:
            raise _wrong_names(request, specs)
    if used < len(request.inputs):
        raise _wrong_names(request, specs)
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


def _wrong_names(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> InvalidTensor:
    expected, got = listed(s.name for s in specs), listed(t.name[:63] for t in request.inputs)
    return InvalidTensor(f"expected the inputs {expected}; got {got or 'none'}")


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


def _array(
    tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, spec: TensorSpec, batched: bool
) -> NDArray[np.generic]:
    expected = datatype(spec)
    if tensor.datatype != expected:
        raise InvalidTensor(f"input {spec.name}: expected datatype {expected}, got {tensor.datatype[:16]!r}")
    sizes = tuple(tensor.shape)
    if sizes and min(sizes) < 0:
        raise InvalidTensor(f"input {spec.name}: expected sizes of zero or more, got {list(sizes)}")
    if batched and len(spec.shape) == 1 and len(sizes) == 2 and sizes[1] == 1:
        sizes = sizes[:1]  # see `shape`
    check_shape(f"input {spec.name}", sizes, spec.shape)
    if 0 in sizes:
        return _empty(tensor, raw, spec, sizes, batched)
    if expected == "BYTES":
        return _strings(tensor, raw, spec.name, sizes)
    if raw is not None:
        return from_wire(raw, _DTYPES[expected], sizes)
    return _from_contents(tensor, spec.name, sizes)


def _empty(
    tensor: pb.ModelInferRequest.InferInputTensor,
    raw: bytes | None,
    spec: TensorSpec,
    sizes: tuple[int, ...],
    batched: bool,
) -> NDArray[np.generic]:
    """A tensor without elements, as a graph without edges has one: any free size but the batch may be zero."""
    if batched and not sizes[0]:
        raise InvalidTensor(f"input {spec.name}: expected at least one row, got shape {list(sizes)}")
    if math.prod(size for size in sizes if size) > _MAX_EMPTY_SIZE:
        raise InvalidTensor(f"input {spec.name}: expected sizes of at most {_MAX_EMPTY_SIZE} beside a zero")
    if raw or tensor.contents.ByteSize():
        raise InvalidTensor(f"input {spec.name}: expected no contents for shape {list(sizes)}")
    return np.empty(sizes, _DTYPES[tensor.datatype])


def _from_contents(
    tensor: pb.ModelInferRequest.InferInputTensor, name: str, sizes: tuple[int, ...]
) -> NDArray[np.generic]:
    dtype, contents = _DTYPES[tensor.datatype], _CONTENTS[tensor.datatype]
    if contents is None:
        raise InvalidTensor(f"input {name}: {tensor.datatype} comes as raw_input_contents only")
    name_of_field, element = contents
    values = getattr(tensor.contents, name_of_field)
    if len(values) != math.prod(sizes):
        raise InvalidTensor(
            f"input {name}: expected {math.prod(sizes)} elements in {name_of_field} for shape {list(sizes)}, "
            f"got {len(values)}"
        )
    wide = np.array(values, dtype=element)
    array = wide.astype(dtype, copy=False)
    if dtype != wide.dtype and not np.array_equal(array, wide):
        raise InvalidTensor(f"input {name}: a value does not fit {tensor.datatype}")
    return array.reshape(sizes)


def ragged_rows(arrays: Sequence[NDArray[np.generic]], bundle: Bundle | PlainModel) -> Arrays:
    """Values and lengths, checked. Values beyond a row's length become zeros, the padding that the model expects.

    Raises InvalidTensor.
    """
    values, length = arrays
    shortest, longest, what = _limits_of(bundle)
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
    if bundle.forecast is not None and not np.isfinite(values).all():
        raise InvalidTensor("expected finite numbers in the history: fill the gaps first")
    if bundle.sequence is not None and not (values.min() >= 0 and values.max() < len(bundle.labels)):
        raise InvalidTensor(f"expected symbols from 0 to {len(bundle.labels) - 1}: indices into the model's labels")
    return values, length


def _limits_of(bundle: Bundle | PlainModel) -> tuple[int, int, str]:
    """Fewest and most values in a row, and the word for them."""
    if bundle.forecast is not None:
        return bundle.forecast.min_history, bundle.forecast.max_history, "observations"
    assert bundle.sequence is not None  # only these two are ragged
    return 1, bundle.sequence.max_length, "symbols"


def bytes_input(request: pb.ModelInferRequest, model: ServedModel) -> list[bytes]:
    """The elements of the one BYTES input, of shape [N] or [N, 1]."""
    tensor, name = request.inputs[0], model.bundle.inputs[0].name
    if tensor.name != name:
        raise InvalidTensor(f"expected the input {name}, got {tensor.name[:63]!r}")
    if len(tensor.shape) not in (1, 2) or (len(tensor.shape) == 2 and tensor.shape[1] != 1):
        raise InvalidTensor(f"input {name}: expected encoded images of shape [N, 1], got {list(tensor.shape)}")
    raw = _raw_contents(request)
    return _elements(tensor, raw[0] if raw else None, name, tensor.shape[0])


def _elements(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, name: str, count: int) -> list[bytes]:
    elements = list(tensor.contents.bytes_contents if raw is None else _length_prefixed(raw))
    if len(elements) != count:
        raise InvalidTensor(f"input {name}: expected {count} elements, got {len(elements)}")
    return elements


def _strings(
    tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, name: str, sizes: Sequence[int]
) -> NDArray[np.generic]:
    elements = _elements(tensor, raw, name, math.prod(sizes))
    array = np.empty(len(elements), dtype=object)
    try:
        array[:] = [element.decode() for element in elements]
    except UnicodeDecodeError:
        raise InvalidTensor(f"input {name}: expected text in UTF-8") from None
    return array.reshape(sizes)


def _length_prefixed(raw: bytes) -> Iterator[bytes]:
    """BYTES on the wire: each element after its length in four bytes, little-endian. Raises InvalidTensor."""
    at = 0
    while at < len(raw):
        if len(raw) - at < 4:
            raise InvalidTensor("BYTES: expected four bytes of length before each element")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if length > len(raw) - at:
            raise InvalidTensor(f"BYTES: expected an element of {length} bytes, got {len(raw) - at}")
        yield raw[at : at + length]
        at += length


def response(name: str, identity: str, model: ServedModel, wanted: Sequence[WantedOutput], outputs: Arrays) -> bytes:
    """A serialised ModelInferResponse.

    Written field by field after a head that all replies of one shape share. Building a message takes four times as
    long, which is more than the run of a small model.
    """
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    raw: list[bytes] = []
    for output in wanted:
        array = outputs[output.index] if model.batched else outputs[output.index][0, ...]
        if output.classes:
            text = _classes(array, output.classes, model.bundle.labels)
            tensors.append((output.spec.name, "BYTES", (len(array), min(output.classes, array.shape[1]))))
            raw.append(_with_lengths(text))
        else:
            sizes = (*array.shape, 1) if model.batched and array.ndim == 1 else array.shape  # see `shape`
            tensors.append((output.spec.name, _NAMES[array.dtype], sizes))
            strings = array.dtype == object
            raw.append(_with_lengths(str(s).encode() for s in array.ravel()) if strings else to_wire(array))
    fields = [_head(name, str(model.bundle.version), tuple(tensors))]
    if identity:
        fields.append(field(_ID, identity.encode()))
    fields += [field(_RAW, contents) for contents in raw]
    return b"".join(fields)


@lru_cache(maxsize=1024)
def _head(name: str, version: str, tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The beginning of all replies with these names and shapes."""
    described = [
        pb.ModelInferResponse.InferOutputTensor(name=tensor, datatype=kind, shape=sizes)
        for tensor, kind, sizes in tensors
    ]
    return pb.ModelInferResponse(model_name=name, model_version=version, outputs=described).SerializeToString()


def _with_lengths(elements: Iterable[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _classes(scores: NDArray[np.generic], count: int, labels: Sequence[str]) -> list[bytes]:
    """ "score:index:label" for the best of each row, row after row."""
    values = scores.astype(np.float32, copy=False)
    best = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return [
        f"{values[row, i]:f}:{i}{f':{labels[i]}' if labels else ''}".encode()
        for row, indices in enumerate(best.tolist())
        for i in indices
    ]
