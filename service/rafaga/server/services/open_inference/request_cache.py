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
from rafaga.wire import head_of

_RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

# Bounds of the cache: keys, templates per key, and bytes before the numbers.
_MAX_KEYS = 256
_MAX_TEMPLATES = 4
_MAX_HEAD_BYTES = 4096

# Keys of the first three fields, and the first length that takes two bytes.
_NAME, _VERSION, _ID = 0x0A, 0x12, 0x1A
_LONG = 0x80


class InferOptions(NamedTuple):
    """A request without its id and numbers. priority: None if the request has none of its own. timeout_s: infinity
    without one."""

    name: str
    wanted: Sequence[WantedOutput]
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
    """A request and the template that it matches. shift: the size of its id field in bytes."""

    template: Template
    request: bytes
    identity: str
    shift: int

    def rows(self) -> Arrays:
        """Read-only views of the request, one per input of the model."""
        request, shift = self.request, self.shift
        return tuple(
            np.frombuffer(request, dtype, elements, offset + shift).reshape(shape)
            for offset, elements, dtype, shape in self.template.places
        )


class RequestCache:
    """The requests of one server, shared by all its clients. Thread-safe."""

    def __init__(self) -> None:
        # By the length without the id, and the bytes before the id.
        self._templates: dict[tuple[int, bytes], tuple[Template, ...]] = {}

    def find(self, request: bytes) -> Match | None:
        beginning = _beginning(request)
        if beginning is None:
            return None
        at, identity, shift = beginning
        for template in self._templates.get((len(request) - shift, request[:at]), ()):
            for mark, place in template.marks:
                if not request.startswith(mark, place + shift):
                    break
            else:
                return Match(template, request, identity, shift)
        return None

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
        if beginning is None or beginning[1] != parsed.id:
            return
        start, _, shift = beginning
        request = request[:start] + request[start + shift :]
        heads = [head_of(_RAW, len(contents)) for contents in raw]
        end = len(request) - sum(map(len, heads)) - sum(map(len, raw))
        if not start <= end <= _MAX_HEAD_BYTES or not _whole(request[:end]):
            return
        marks, offsets = [], []
        mark, at = request[start:end], start
        for head, contents in zip(heads, raw, strict=True):
            mark += head
            if not request.startswith(mark, at):  # the fields came in another order
                return
            marks.append((mark, at))
            offsets.append(at + len(mark))
            mark, at = b"", at + len(mark) + len(contents)
        order = {tensor.name: i for i, tensor in enumerate(parsed.inputs)}
        places = tuple(
            _Place(offsets[order[spec.name]], array.size, on_wire(array.dtype), array.shape)
            for spec, array in zip(model.bundle.inputs, rows, strict=True)
        )
        if len(self._templates) >= _MAX_KEYS:
            self._templates.clear()
        key = len(request), request[:start]
        template = Template(options, version, weakref.ref(model), tuple(marks), places)
        # Drop templates of models that are gone, and an older template with the same marks.
        others = [t for t in self._templates.get(key, ()) if t.model() is not None and t.marks != template.marks]
        self._templates[key] = (template, *others[: _MAX_TEMPLATES - 1])


def _beginning(request: bytes) -> tuple[int, str, int] | None:
    """The end of the fields before the id, the id, and the size of its field (0 without one). None for a message with
    another beginning."""
    try:
        if request[0] != _NAME or request[1] >= _LONG:
            return None
        at = 2 + request[1]
        if request[at] == _VERSION:
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


def _whole(head: bytes) -> bool:
    """Whether `head` parses as a message of its own, without contents and id."""
    try:
        message = pb.ModelInferRequest.FromString(head)
    except DecodeError:
        return False
    return not message.raw_input_contents and not message.id
