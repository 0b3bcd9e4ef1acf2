"""ModelInfer requests that differ from an earlier one in nothing but the numbers of their tensors.

A caller sends the same message again and again, with other numbers in it. To parse and check it takes longer than a
small model's row does. Raw contents are the last field on the wire: whatever stands before the numbers is compared,
as bytes, with an earlier request that was found good.

Protobuf reads field after field. So a message that begins with the bytes of a whole message and goes on with raw
contents of the same lengths means what that message means, with those contents.
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
from rafaga.server.job import Arrays
from rafaga.server.model import ServedModel
from rafaga.server.services.open_inference_tensors import WantedOutput, head_of
from rafaga.tensors import on_wire

_RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

# What is kept of strangers' requests is bounded: so many, with so many bytes before the numbers.
_MAX_KEPT = 256
_MAX_HEAD_BYTES = 4096
# Requests are looked up by their length and these first bytes, which hold the model's name.
_KEY_BYTES = 48


class Meaning(NamedTuple):
    """What a request asks for, beside its numbers. priority: None where it is for the metadata to say. timeout_s:
    infinity without one."""

    name: str
    identity: str
    wanted: Sequence[WantedOutput]
    priority: Priority | None = None
    timeout_s: float = math.inf


class _Place(NamedTuple):
    """Where the numbers of one tensor lie in the request, in bytes, and what they are."""

    offset: int
    elements: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


class Template(NamedTuple):
    """version: 0 for the newest. model: the one that the request was checked against; another version has other
    tensors. marks: bytes that are not numbers, and where they must stand. places: in the model's order."""

    meaning: Meaning
    version: int
    model: weakref.ref[ServedModel]
    marks: tuple[tuple[bytes, int], ...]
    places: tuple[_Place, ...]

    def rows(self, request: bytes) -> Arrays:
        """Read-only views of `request`, one per input of the model."""
        return tuple(np.frombuffer(request, p.dtype, p.elements, p.offset).reshape(p.shape) for p in self.places)


class Templates:
    """Those of one server, from all its callers. Any thread may use it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bytes], Template] = {}

    def find(self, request: bytes) -> Template | None:
        template = self._kept.get((len(request), request[:_KEY_BYTES]))
        if template is None or not all(request.startswith(mark, at) for mark, at in template.marks):
            return None
        return template

    def keep(
        self,
        request: bytes,
        parsed: pb.ModelInferRequest,
        meaning: Meaning,
        version: int,
        model: ServedModel,
        rows: Arrays,
    ) -> None:
        """`rows`: what `parsed` holds, in the model's order, one array per input."""
        raw = parsed.raw_input_contents
        # An id is another one in the next request. Texts have lengths among them.
        if meaning.identity or not model.batched or len(raw) != len(rows) or any(a.dtype == object for a in rows):
            return
        heads = [head_of(_RAW, len(contents)) for contents in raw]
        end = len(request) - sum(map(len, heads)) - sum(map(len, raw))
        if not 0 < end <= _MAX_HEAD_BYTES or not _whole(request[:end]):
            return
        marks, offsets = [], []
        mark, at = request[:end], 0
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
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        key = len(request), request[:_KEY_BYTES]
        self._kept[key] = Template(meaning, version, weakref.ref(model), tuple(marks), places)


def _whole(head: bytes) -> bool:
    """Whether `head` is a message by itself, without contents."""
    try:
        return not pb.ModelInferRequest.FromString(head).raw_input_contents
    except DecodeError:
        return False
