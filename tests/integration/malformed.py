"""Requests of every kind, most of them wrong in some way, as hypothesis draws them.

A request is a valid message with up to two fields changed, whole, cut or with a changed byte, sent to its method or
another one; or any bytes at all.
"""

from __future__ import annotations

import functools
import json
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st

from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import forecasting_pb2, vision_pb2
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.test_every_method import METHODS

INFER = f"{messages.OPEN}ModelInfer"
UNARY = sorted(messages.METHODS.keys() - {messages.STREAM})
METHOD_OF = {messages.METHODS[path][0]: path for path in UNARY}
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

Metadata = tuple[tuple[str, str], ...]


class Request(NamedTuple):
    """Of a unary method."""

    method: str
    content: bytes
    metadata: Metadata


class Stream(NamedTuple):
    """`ends`: the caller wants the first error as the status of the stream."""

    contents: list[bytes]
    ends: bool
    metadata: Metadata


class HttpRequest(NamedTuple):
    path: str
    body: bytes
    headers: dict[str, str]


@st.composite
def _mostly(draw: st.DrawFn, often: st.SearchStrategy[Any], rarely: st.SearchStrategy[Any]) -> Any:
    """Nothing comes through when everything is wrong at once. `one_of` has no weights."""
    return draw(often) if draw(st.integers(0, 7)) else draw(rarely)


METADATA: st.SearchStrategy[Metadata] = _mostly(
    st.just(()),
    st.sampled_from(["high", "normal", "low", "", "HIGH", "~" * 200]).map(lambda word: (("rafaga-priority", word),)),
)


# --- Values of fields -------------------------------------------------------------------------------------------------

UINT32 = st.integers(0, 40) | st.sampled_from([784, 65535, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
INT64 = st.integers(-2, 40) | st.sampled_from([-(2**63), 2**32, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
INT32 = st.integers(-2, 40) | st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(width=32) | st.floats(-1e3, 1e3, width=32)
_KNOWN = """digits backbone series fragile detector segmenter letters plain digits.encoded
    image history length symbols x probabilities map quantiles boxes scores labels y UINT8 FP32 FP16 INT64 BYTES
    priority timeout sequence_id sequence_start sequence_end unknown classification binary_data shared_memory_region
    shared_memory_byte_size D h MS -1D 0D a b 0 1 -1 2 ² / .. ../digits digits/1 /etc/passwd Digits 日本
    rafaga.v1.Vision rafaga/v1/vision.proto *"""
WORDS = st.sampled_from([*_KNOWN.split(), "", "digits\0", "\u202e", "a" * 5000])
_OF_TYPE: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_UINT32: UINT32,
    FieldDescriptor.TYPE_UINT64: st.integers(0, 5) | st.just(2**64 - 1),
    FieldDescriptor.TYPE_INT32: INT32,
    FieldDescriptor.TYPE_INT64: INT64,
    FieldDescriptor.TYPE_FLOAT: FLOATS,
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: WORDS | st.text(max_size=80),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=200),
}


def _damaged(file: bytes, cut: int, flip: int) -> bytes:
    """The first `cut` bytes, one bit of them turned."""
    content = bytearray(file[: max(cut, 1)])
    content[flip % len(content)] ^= 1 << flip % 8
    return bytes(content)


_PHOTO = messages.random_photo(0, 24, 24)[0]
IMAGE_FILES = st.one_of(
    st.binary(max_size=200),
    st.builds(messages.black_png, st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([(16_385, 1), (1, 16_385), (49_000_000, 1), (8000, 8000)]).map(lambda s: messages.black_png(*s)),
    st.sampled_from([1, 90, 1000]).map(messages.many_scans),
    st.builds(
        _damaged,
        st.sampled_from([messages.jpeg(_PHOTO), messages.png(_PHOTO)]),
        st.integers(0, 2000),
        st.integers(0, 2000),
    ),
)


@st.composite
def _pixels(draw: st.DrawFn) -> vision_pb2.ImageTensor:
    """A shape whose data fits it for one of several dtypes."""
    shape = [draw(st.integers(0, 40)), *(draw(st.sampled_from(sizes)) for sizes in ((1, 8, 28), (8, 28), (0, 1, 3)))]
    size = int(np.prod(shape)) * draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    batch, height, width, channels = shape
    return vision_pb2.ImageTensor(data=bytes(size), batch=batch, height=height, width=width, channels=channels)


@functools.cache
def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """All that fits the type of `field`."""
    kind = field.message_type
    if kind is None:
        one = IMAGE_FILES if field.name == "images" else _OF_TYPE[field.type]
    elif kind.GetOptions().map_entry:
        return st.dictionaries(WORDS, _values(kind.fields_by_name["value"]), max_size=3)
    else:
        one = _any_message(message_factory.GetMessageClass(kind))
    return st.lists(one, max_size=3 if kind or field.type == field.TYPE_BYTES else 30) if field.is_repeated else one


@st.composite
def _any_message(draw: st.DrawFn, kind: type[Message]) -> Message:
    """Any values in up to three of its fields."""
    if kind is vision_pb2.ImageTensor and draw(st.booleans()):
        return draw(_pixels())
    message = kind()
    for field in draw(st.lists(st.sampled_from(list(kind.DESCRIPTOR.fields)), max_size=3)):
        _set(message, field, draw(_values(field)))
    return message


def _set(message: Message, field: FieldDescriptor, value: object) -> None:
    message.ClearField(field.name)
    message.MergeFrom(type(message)(**{field.name: value}))


def _parts(message: Message) -> Iterator[Message]:
    """It and all messages in it, except those under a name."""
    yield message
    for field, value in message.ListFields():
        if field.message_type and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                yield from _parts(part)


@st.composite
def _changed(draw: st.DrawFn, valid: st.SearchStrategy[Message]) -> Message:
    """Up to two fields, at any depth, have another value or none."""
    original = draw(valid)
    message = type(original).FromString(original.SerializeToString())
    for _ in range(draw(st.integers(0, 2))):
        parts = [part for part in _parts(message) if part.DESCRIPTOR.fields]
        if parts:
            part = draw(st.sampled_from(parts))
            field = draw(st.sampled_from(list(part.DESCRIPTOR.fields)))
            _set(part, field, draw(_mostly(_values(field), st.none())))
    return message


@st.composite
def _spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Mostly as it is; cut, or with a byte changed."""
    match draw(st.integers(0, 9)):
        case 0:
            return content[: draw(st.integers(0, len(content)))]
        case 1 if content:
            changed = bytearray(content)
            changed[draw(st.integers(0, min(len(content), 64) - 1))] = draw(st.integers(0, 255))
            return bytes(changed)
        case _:
            return content


# --- Over gRPC --------------------------------------------------------------------------------------------------------


@st.composite
def _valid_infer_requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    rows, seed = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    typed = draw(st.booleans())
    match draw(st.integers(0, 6)):
        case 0:
            return oip.images(messages.random_digits(seed, rows), typed=typed)
        case 1:
            return oip.images(messages.random_photo(seed, 8, 6, rows), "backbone", typed=typed)
        case 2:
            history = np.stack([messages.random_history(seed, draw(st.integers(2, 64)))] * rows)
            return oip.request("series", typed=typed, history=history)
        case 3:
            return oip.request("plain", typed=typed, x=np.full((rows, 3), draw(FLOATS), np.float32))
        case 4:
            symbols = np.array([[draw(st.integers(-1, 4)) for _ in range(5)]] * rows)
            return oip.request("letters", typed=typed, symbols=symbols)
        case 5:
            model = draw(st.sampled_from(["digits", "digits.encoded", "segmenter", "detector.encoded"]))
            files = draw(st.lists(IMAGE_FILES, min_size=1, max_size=3))
            return oip.files(*files, model=model, raw=typed, column=draw(st.booleans()))
        case _:
            return oip.images(np.full((rows, 1, 1, 1), draw(st.integers(0, 20)), np.uint8), "fragile", typed=typed)


_OUTPUTS = st.sampled_from(["probabilities", "map", "quantiles", "y", "labels"])
_INFER = _changed(_valid_infer_requests() | st.builds(oip.asking_for, _valid_infer_requests(), _OUTPUTS))
_SERIES = st.builds(
    forecasting_pb2.Series,
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=10, max_size=30),
    start=st.none() | st.integers(0, 40).map(lambda day: {"seconds": day * 86_400}),
    missing=st.sampled_from([[], [3], [4, 5]]),
)
_FORECASTS = st.builds(
    forecasting_pb2.ForecastRequest,
    model=st.just("series"),
    series=st.lists(_SERIES, min_size=1, max_size=3),
    frequency=st.just("D"),
    check_last=st.integers(0, 3),
    horizon=st.integers(0, 40),
)
_REQUESTS = st.one_of(
    _INFER,
    _changed(_FORECASTS),
    _changed(st.sampled_from([method.request for method in METHODS.values() if not method.model])),
    *(_changed(st.just(method.request)) for method in METHODS.values() if method.model),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    metadata = draw(METADATA)
    if draw(st.integers(0, 9)) == 0:
        return Request(draw(st.sampled_from(UNARY)), draw(st.binary(max_size=300)), metadata)
    message = draw(_REQUESTS)
    method = draw(st.sampled_from(UNARY)) if draw(st.integers(0, 9)) == 0 else METHOD_OF[type(message)]
    return Request(method, draw(_spoilt(message.SerializeToString())), metadata)


@st.composite
def public_requests(draw: st.DrawFn) -> Request:
    """Of health and reflection, which grpcio's own server answers."""
    method = draw(st.sampled_from([f"{HEALTH}Check", f"{HEALTH}Watch", REFLECTION]))
    kind = reflection_pb2.ServerReflectionRequest if method == REFLECTION else health_pb2.HealthCheckRequest
    own = draw(_any_message(kind)).SerializeToString()
    return Request(method, draw(_mostly(_spoilt(own), st.binary(max_size=100))), ())


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    contents = [draw(_spoilt(draw(_INFER).SerializeToString())) for _ in range(draw(st.integers(0, 4)))]
    ends = draw(st.booleans())
    # Which of several errors ends the stream, and what is answered before, is chance.
    return Stream(contents[:1] if ends else contents, ends, draw(METADATA))


# --- Over HTTP --------------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_X = {"name": "x", "datatype": "FP32", "shape": [1, 3]}
_GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/models/digits:classify": [
        {"images": [b64encode(messages.black_png(9, 9)).decode()], "top_k": 3},
        {"pixels": {"shape": [1, 28, 28, 1], "data": b64encode(bytes(784)).decode()}},
    ],
    "/v1/models/series:forecast": [{"history": [1, 2.5], "horizon": 2}, {"series": [[1, 2], [3, 4]]}],
    "/v1/models/letters:predict": [{"symbols": ["a", "b"]}, {"sequences": [["a"]], "top_k": 1}],
    "/v2/models/plain/infer": [
        {"inputs": [_X | {"data": [1, 2, 3]}], "id": "a"},
        {"inputs": [_X | {"parameters": {"binary_data_size": 12}}]},
        {
            "inputs": [_X | {"data": [[1, 2, 3]]}],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
            "parameters": {"timeout": 10**9},
        },
    ],
    "/v2/repository/index": [{"ready": True}],
}
_HEADERS = st.one_of(
    st.just({}),
    st.sampled_from(["", "1S", "9m", "x", "1" * 30]).map(lambda text: {"Grpc-Timeout": text}),
    st.sampled_from(["high", "urgent"]).map(lambda text: {"Rafaga-Priority": text}),
    st.integers(-1, 200).map(lambda length: {"Inference-Header-Content-Length": str(length)}),
)


@st.composite
def http_requests(draw: st.DrawFn) -> HttpRequest:
    """Bodies that fit, with a value replaced, cut, damaged, of another path, or of any bytes; with binary tensors."""
    path = draw(st.sampled_from(sorted(_GOOD)))
    of = draw(_mostly(st.just(path), st.sampled_from(sorted(_GOOD))))
    body: dict[str, Any] = dict(draw(st.sampled_from(_GOOD[of])))
    if not draw(st.integers(0, 2)):
        body[draw(st.sampled_from([*body, "other"]))] = draw(_JSON)
    text = json.dumps(body).encode()
    headers = dict(draw(_HEADERS))
    if b"binary_data_size" in text and draw(st.booleans()):
        headers = {"Inference-Header-Content-Length": str(len(text))}
        text += bytes(draw(_mostly(st.just(12), st.integers(0, 20))))
    whole = draw(_mostly(st.just(text), st.binary(max_size=50)))
    if whole and not draw(st.integers(0, 7)):
        whole = _damaged(whole, draw(st.integers(0, len(whole))), draw(st.integers(0, 2000)))
    query = draw(_mostly(st.just(""), st.sampled_from(["?top_k=2", "?top_k=x", "?horizon=1", "?=", "?%ff=%00"])))
    return HttpRequest(path + query, whole, headers)
