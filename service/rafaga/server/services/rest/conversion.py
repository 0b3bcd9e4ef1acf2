"""JSON to checked structures, and protobuf messages to what JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec import Meta

from rafaga.errors import InvalidRequest, InvalidTensor, RequestTooLarge

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=2**32 - 1)]

# Text takes a hundred times its size while it is read. This is more than any model looks back.
_MAX_TEXT_BYTES = 2**20


def decoded(data: bytes | memoryview, kind: type[T]) -> T:
    """`data` as JSON of that shape. Raises InvalidRequest, which names the place that is wrong."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"JSON: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise InvalidRequest("JSON: expected text in UTF-8, nested at most a few hundred levels") from None


def text_of(body: bytes) -> str:
    """Raises InvalidTensor or RequestTooLarge."""
    if len(body) > _MAX_TEXT_BYTES:
        raise RequestTooLarge(f"expected at most {_MAX_TEXT_BYTES} bytes of text, got {len(body)}: send JSON")
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidTensor("expected text in UTF-8, or JSON") from None


def plain(message: Message) -> dict[str, Any]:
    """All fields of `message` by name, except messages that are not set. Enums are names; bytes stay bytes, which
    msgspec writes in base64."""
    found = {}
    for name, convert, is_set in _converters(message.DESCRIPTOR):
        if is_set is None or is_set(message):
            found[name] = convert(getattr(message, name))
    return found


_Converter = tuple[str, Callable[[Any], Any], Callable[[Message], bool] | None]


@cache
def _converters(descriptor: Descriptor) -> tuple[_Converter, ...]:
    found: list[_Converter] = []
    for field in descriptor.fields:
        single = field.message_type is not None and not field.is_repeated
        is_set = (lambda message, name=field.name: message.HasField(name)) if single else None
        found.append((field.name, _converter(field), is_set))
    return tuple(found)


def _converter(field: FieldDescriptor) -> Callable[[Any], Any]:
    if is_map(field):
        return lambda entries: {key: plain(value) for key, value in entries.items()}
    if field.message_type is not None:
        convert = _time if is_time(field.message_type) else plain
        return (lambda messages: [convert(message) for message in messages]) if field.is_repeated else convert
    if field.enum_type is not None:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        return (lambda numbers: [names.get(n, n) for n in numbers]) if field.is_repeated else names.get
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return shortest if field.is_repeated else lambda value: shortest((value,))[0]
    return list if field.is_repeated else _same


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def is_time(descriptor: Descriptor) -> bool:
    return descriptor.full_name == "google.protobuf.Timestamp"


def _time(message: Timestamp) -> str:
    """RFC 3339, in UTC."""
    return message.ToJsonString()


def shortest(values: Iterable[float]) -> list[float]:
    """float32 as the numbers with the fewest digits that round to them: 0.1, where the nearest float64 is longer."""
    return [float(text) for text in np.fromiter(values, np.float32).astype(str).tolist()]


def _same(value: Any) -> Any:
    return value
