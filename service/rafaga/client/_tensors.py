"""Raw tensors over the Open Inference Protocol: what `infer` sends and returns.

Messages are written and read field by field. The protocol's own module would clash with tritonclient's: two modules
that define its symbols cannot live in one process. The head of a tensor (name, datatype, shape) has the fields of
catalog_pb2.Tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from rafaga.client._calls import UnaryCall
from rafaga.client._images import Prepared
from rafaga.client._many import MAX_MESSAGE_BYTES, Bulk
from rafaga.client._models import ModelDescription
from rafaga.errors import InternalError, InvalidRequest, InvalidTensor
from rafaga.tensors import DATATYPES, length_prefixed, on_wire, to_wire, with_lengths
from rafaga.v1 import catalog_pb2
from rafaga.wire import field, fields, head_of

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}

# Field numbers of ModelInferRequest (the requested output's name is its field 1) and ModelInferResponse.
_MODEL, _VERSION, _INPUTS, _OUTPUTS, _RAW_INPUTS = 1, 2, 5, 6, 7
_RESULTS, _RAW_RESULTS = 5, 6


class Inference:
    """The inputs of one `infer`, checked, and its messages: one, or several with some of the rows each.

    rows: how many can be told apart; 1 if the model has no batches or the inputs disagree.
    """

    def __init__(
        self, inputs: Mapping[str, npt.ArrayLike], outputs: Sequence[str], version: int | None, model: ModelDescription
    ) -> None:
        if not isinstance(inputs, Mapping) or not inputs:
            names = ", ".join(repr(tensor.name) for tensor in model.inputs)
            raise InvalidRequest(f"expected a dictionary of arrays; the model's inputs are {names}")
        dtypes = {tensor.name: tensor.dtype for tensor in model.inputs}
        self._arrays = {name: _array(name, values, dtypes.get(name)) for name, values in inputs.items()}
        self._outputs = outputs
        self.model, self.version = model.name, version
        lengths = {len(array) if array.ndim else 0 for array in self._arrays.values()}
        self.rows = max(1, *lengths) if model.max_batch_size and len(lengths) == 1 else 1
        size = sum(map(_size, self._arrays.values()))
        self._row_bytes = size // self.rows
        self._batch = max(1, model.max_batch_size)
        self.fits = self.rows <= self._batch and (self.rows == 1 or size <= MAX_MESSAGE_BYTES)

    def whole(self) -> UnaryCall[Arrays]:
        return _call(self._arrays, self._outputs, self.model, self.version)

    def parts(self) -> Bulk[Arrays]:
        """Messages of a batch each, or of half the rows if the whole would fit; `joined` puts the answers together."""
        most = (self.rows + 1) // 2 if self.fits else self._batch
        return Bulk(range(self.rows), self._prepared, self._part, most, strict=True)

    def _prepared(self, row: int) -> Prepared:
        return Prepared(row, None, self._row_bytes)

    def _part(self, rows: Sequence[int]) -> UnaryCall[list[Arrays]]:
        """Of consecutive rows; an answer for each."""
        chosen = slice(rows[0], rows[-1] + 1)
        part = {name: array[chosen] for name, array in self._arrays.items()}
        call = _call(part, self._outputs, self.model, self.version)

        def read(reply: bytes) -> list[Arrays]:
            found = call.read(reply)
            if any(array.shape[:1] != (len(rows),) for array in found.values()):
                raise InternalError(f"expected {len(rows)} rows in every output")
            return [{name: array[i : i + 1] for name, array in found.items()} for i in range(len(rows))]

        return UnaryCall(call.method, call.request, read)


def joined(rows: Iterable[Arrays]) -> Arrays:
    first, *others = rows
    return {name: np.concatenate([first[name], *(row[name] for row in others)]) for name in first}


def _call(arrays: Arrays, outputs: Sequence[str], model: str, version: int | None) -> UnaryCall[Arrays]:
    parts = [field(_MODEL, model.encode())]
    if version:
        parts.append(field(_VERSION, str(version).encode()))
    for name, array in arrays.items():
        head = catalog_pb2.Tensor(name=name, dtype=_NAMES[array.dtype], shape=array.shape)
        parts.append(field(_INPUTS, head.SerializeToString()))
    parts += [field(_OUTPUTS, field(1, name.encode())) for name in outputs]
    for array in arrays.values():
        contents = with_lengths(map(_encoded, array.flat)) if array.dtype.kind == "O" else to_wire(array)
        parts += [head_of(_RAW_INPUTS, len(contents)), contents]
    return UnaryCall("/inference.GRPCInferenceService/ModelInfer", b"".join(parts), _read)


def _read(reply: bytes) -> Arrays:
    heads: list[catalog_pb2.Tensor] = []
    contents: list[memoryview] = []
    try:
        for number, value in fields(memoryview(reply)):
            if number == _RESULTS and isinstance(value, memoryview):
                heads.append(catalog_pb2.Tensor.FromString(bytes(value)))
            elif number == _RAW_RESULTS and isinstance(value, memoryview):
                contents.append(value)
    except (IndexError, ValueError):
        raise DecodeError from None
    if len(heads) != len(contents):
        raise InternalError(f"expected raw contents of {len(heads)} outputs, the reply has {len(contents)}")
    return {head.name: _output(head, raw) for head, raw in zip(heads, contents, strict=True)}


def _output(head: catalog_pb2.Tensor, raw: memoryview) -> npt.NDArray[Any]:
    dtype, shape = DATATYPES.get(head.dtype), tuple(head.shape)
    if dtype is None:
        raise InternalError(f"output {head.name}: datatype {head.dtype!r} is unknown to this client")
    try:
        if dtype.kind == "O":
            return np.array([text.decode() for text in length_prefixed(raw)], dtype=object).reshape(shape)
        return np.array(np.frombuffer(raw, on_wire(dtype)).reshape(shape), dtype)
    except (ValueError, InvalidTensor):
        raise InternalError(f"output {head.name}: {len(raw)} bytes are not {head.dtype} {list(shape)}") from None


def _size(array: npt.NDArray[Any]) -> int:
    return sum(map(len, array.flat)) if array.dtype.kind == "O" else array.nbytes


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _array(name: str, values: npt.ArrayLike, dtype: str | None) -> npt.NDArray[Any]:
    """`values` in the dtype of the model (None: unknown), if no more than the precision of floats is lost by it.

    Text and bytes become an array of objects. Raises InvalidTensor.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind in "SU" and not isinstance(values, np.ndarray):
            array = np.array(values, dtype=object)  # numpy's own bytes lose zeros at the end
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTensor(f"input {name}: expected an array: {error}") from None
    if array.dtype.kind in "SUO":
        if not all(isinstance(each, str | bytes) for each in array.flat):
            raise InvalidTensor(f"input {name}: expected numbers of one type, or only text and bytes")
        return array.astype(object)
    if dtype not in (None, "string") and array.dtype != dtype:
        return _converted(name, values, array, np.dtype(dtype))
    if array.dtype not in _NAMES:
        raise InvalidTensor(f"input {name}: {array.dtype} cannot be sent; expected {', '.join(map(str, _NAMES))}")
    return array


def _converted(name: str, values: npt.ArrayLike, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """`values` as `dtype`. `array`: them in the dtype that numpy chose, float64 for integers over 2**63."""
    if array.dtype.kind not in "biuf" and not np.can_cast(array.dtype, dtype):
        raise InvalidTensor(f"input {name}: expected {dtype}, got {array.dtype}")
    try:
        with np.errstate(over="raise", invalid="raise"):
            converted = np.asarray(values, dtype)
    except (ArithmeticError, ValueError):
        converted = None
    if converted is None or not (dtype.kind == "f" or np.array_equal(converted, array)):
        raise InvalidTensor(f"input {name}: expected {dtype}, got {array.dtype} with values that it cannot hold")
    return converted
