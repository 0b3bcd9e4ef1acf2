"""A cache of valid ModelInfer requests, for requests that differ from them only in their id and their numbers.

Clients send the same message again and again with new numbers and a new id. Parsing and checking it takes longer than a
small model needs for a row. On the wire the model's name and version come first, then the id, and the raw contents
last. The bytes around the id and before the numbers are compared with those of a request that was valid.

Protobuf parses field after field. So a message with the same fields in the same order, an id between two of them, and
raw contents of the same lengths at the end has the same meaning, except for its own id and contents.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import Priority
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.scheduling.job import Arrays
from rafaga.server.services.open_inference.tensors import WantedOutput
from rafaga.tensors import on_wire
from rafaga.wire import field, head_of

_RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

# Bounds of the cache: requests, and bytes before the numbers.
_MAX_TEMPLATES = 256
_MAX_HEAD_BYTES = 4096

# Keys of the first three fields, and the first length that takes two bytes.
_NAME, _VERSION, _ID = 0x0A, 0x12, 0x1A
_LONG = 0x80


class InferOptions(NamedTuple):
    """A request without its id and numbers. flat: see `tensors.is_flat`. priority: None for that of the call.
    timeout_s: infinity without one."""

    name: str
    wanted: Sequence[WantedOutput]
    flat: bool = False
    priority: Priority | None = None
    timeout_s: float = math.inf


class _Place(NamedTuple):
    """The offset in bytes of one tensor's numbers in a request without id, and their layout."""

    offset: int
    elements: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


class Template(NamedTuple):
    """version: 0 for the newest. model: the model that the request was checked against; another version may have other
    tensors. marks: the bytes after the id that are not numbers, each with its offset in a request without id. places:
    in the model's order."""

    options: InferOptions
    version: int
    model: weakref.ref[ServedModel]
    marks: tuple[tuple[bytes, int], ...]
    places: tuple[_Place, ...]


class Match(NamedTuple):
    """rows: read-only views of the request, one per input of the model."""

    template: Template
    identity: str
    rows: Arrays


class RequestCache:
    """The requests of one server, shared by all its clients. Thread-safe."""

    def __init__(self) -> None:
        # By the length without the id, and the bytes before the id.
        self._templates: dict[tuple[int, bytes], Template] = {}

    def find(self, request: bytes) -> Match | None:
        beginning = _beginning(request)
        if beginning is None:
            return None
        at, identity, shift = beginning
        template = self._templates.get((len(request) - shift, request[:at]))
        if template is None:
            return None
        for mark, offset in template.marks:
            if not request.startswith(mark, offset + shift):
                return None
        rows = tuple(
            np.frombuffer(request, dtype, elements, offset + shift).reshape(shape)
            for offset, elements, dtype, shape in template.places
        )
        return Match(template, identity, rows)

    def add(
        self,
        request: bytes,
        parsed: pb.ModelInferRequest,
        options: InferOptions,
        version: int,
        model: ServedModel,
        rows: Arrays,
    ) -> None:
        """`rows`: the arrays in `parsed`, one per input in the model's order."""
        raw = parsed.raw_input_contents
        # Texts contain lengths, not every byte is a bool, and empty arrays have no place: parse these each time.
        if not model.batched or len(raw) != len(rows) or any(a.dtype.kind in "Ob" or not a.size for a in rows):
            return
        beginning = _beginning(request)
        if beginning is None:
            return
        start, _, shift = beginning
        request = request[:start] + request[start + shift :]
        tail = b"".join(field(_RAW, contents) for contents in raw)
        end = len(request) - len(tail)
        if not start <= end <= _MAX_HEAD_BYTES or not request.endswith(tail) or not _is_head(request[:end]):
            return
        marks, offsets = [(request[start:end], start)], []
        at = end
        for contents in raw:
            head = head_of(_RAW, len(contents))
            marks.append((head, at))
            offsets.append(at + len(head))
            at += len(head) + len(contents)
        order = {tensor.name: i for i, tensor in enumerate(parsed.inputs)}
        places = tuple(
            _Place(offsets[order[spec.name]], array.size, on_wire(array.dtype), array.shape)
            for spec, array in zip(model.bundle.inputs, rows, strict=True)
        )
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        template = Template(options, version, weakref.ref(model), tuple(marks), places)
        self._templates[len(request), request[:start]] = template


def _beginning(request: bytes) -> tuple[int, str, int] | None:
    """The end of the fields before the id, the id, and the size of its field (0 without one). None for a message with
    another beginning."""
    at = 0
    try:
        for key in (_NAME, _VERSION):
            if request[at] == key:
                if request[at + 1] >= _LONG:
                    return None
                at += 2 + request[at + 1]
        if request[at] != _ID:
            return at, "", 0
        size = request[at + 1]
        if size >= _LONG:
            return None
        return at, request[at + 2 : at + 2 + size].decode(), 2 + size
    except (IndexError, UnicodeDecodeError):
        return None


def _is_head(data: bytes) -> bool:
    """Whether `data` is a message of its own, without contents and without an id in another place."""
    try:
        message = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return False
    return not message.raw_input_contents and not message.id
