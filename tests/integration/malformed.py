"""Requests of every kind, most of them wrong in some way, as hypothesis draws them.

A request is a message for its method or another one, whole, cut or with a changed byte; or any bytes at all.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st

from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2
from tests.integration import messages
from tests.integration import open_inference as oip

INFER = f"{messages.OPEN}ModelInfer"
UNARY = sorted(messages.METHODS.keys() - {messages.STREAM})
METHOD_OF = {messages.METHODS[path][0]: path for path in UNARY}

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


# --- Names and numbers ------------------------------------------------------------------------------------------------

UINT32 = st.one_of(
    st.integers(0, 40), st.sampled_from([28, 784, 65535, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
INT64 = st.one_of(
    st.integers(-2, 40), st.sampled_from([-(2**63), 2**31, 2**32, 2**62, 2**63 - 1]), st.integers(-(2**63), 2**63 - 1)
)
_STRANGE = ["", "..", "../digits", "digits/1", "/etc/passwd", "digits\0", "Digits", "日本", "\u202e", "a" * 5000]


@st.composite
def _mostly(draw: st.DrawFn, often: st.SearchStrategy[Any], rarely: st.SearchStrategy[Any]) -> Any:
    """Nothing comes through when everything is wrong at once. `one_of` has no weights."""
    return draw(often) if draw(st.integers(0, 7)) else draw(rarely)


def _names(*known: str) -> st.SearchStrategy[str]:
    """Mostly of models that take such a request."""
    others = ["digits", "backbone", "series", "fragile", "detector", "segmenter", "letters", "plain", "digits.encoded"]
    return _mostly(
        st.sampled_from(known), st.one_of(st.sampled_from(others), st.sampled_from(_STRANGE), st.text(max_size=80))
    )


VERSIONS = _mostly(st.sampled_from([0, 1]), UINT32)
VERSION_TEXTS = _mostly(
    st.sampled_from(["", "1"]), st.one_of(st.sampled_from(["0", "-1", "2", "1 ", "²", "9" * 99]), st.text())
)
FLOATS = st.one_of(st.floats(width=32), st.floats(-1e3, 1e3, width=32))

METADATA: st.SearchStrategy[Metadata] = _mostly(
    st.just(()),
    st.sampled_from(["high", "normal", "low", "", "HIGH", "~" * 200]).map(lambda word: (("rafaga-priority", word),)),
)


# --- Images -----------------------------------------------------------------------------------------------------------


def _damaged(file: bytes, cut: int, flip: int) -> bytes:
    """The first `cut` bytes, one bit of them turned."""
    content = bytearray(file[: max(cut, 1)])
    content[flip % len(content)] ^= 1 << flip % 8
    return bytes(content)


IMAGE_FILES = st.one_of(
    st.binary(max_size=200),
    st.builds(messages.black_png, st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from(
        [
            *(messages.black_png(*size) for size in ((16_385, 1), (1, 16_385), (49_000_000, 1), (8000, 8000))),
            *(messages.many_scans(scans) for scans in (1, 90, 1000)),
        ]
    ),
    st.builds(
        lambda seed, cut, flip: _damaged(messages.jpeg(messages.random_photo(seed, 24, 24)[0]), cut, flip),
        st.integers(0, 9),
        st.integers(0, 2000),
        st.integers(0, 2000),
    ),
    st.builds(
        lambda seed, cut, flip: _damaged(messages.png(messages.random_photo(seed, 12, 12)[0]), cut, flip),
        st.integers(0, 9),
        st.integers(0, 800),
        st.integers(0, 800),
    ),
)


@st.composite
def _pixels(draw: st.DrawFn) -> vision_pb2.ImageTensor:
    """Any shape with any data, or a shape whose data fits it for one of several dtypes."""
    if draw(st.booleans()):
        batch, height, width, channels = (draw(UINT32) for _ in range(4))
        size = draw(st.integers(0, 5000))
    else:
        batch = draw(st.integers(0, 40))
        height = draw(st.sampled_from([1, 8, 28, 31]))
        width = draw(st.sampled_from([height, 2 * height]))
        channels = draw(st.sampled_from([0, 1, 3, 4]))
        size = batch * height * width * channels * draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    data = bytes([draw(st.integers(0, 255))]) * size
    return vision_pb2.ImageTensor(data=data, batch=batch, height=height, width=width, channels=channels)


_ENCODED = st.builds(vision_pb2.EncodedImages, images=st.lists(IMAGE_FILES, max_size=4))


def _fitting(height: int, width: int, channels: int) -> st.SearchStrategy[vision_pb2.ImageTensor]:
    return st.builds(
        lambda rows, seed: messages.tensor(
            np.random.default_rng(seed).integers(0, 10, (rows, height, width, channels), np.uint8)
        ),
        st.integers(1, 5),
        st.integers(0, 9),
    )


def _vision(
    kind: type[Any], model: str, size: tuple[int, int, int], **fields: st.SearchStrategy[Any]
) -> st.SearchStrategy[Message]:
    """`size`: height, width and channels of an image that the model takes."""
    pixels = _mostly(_fitting(*size), _pixels())
    inputs = st.one_of(pixels.map(lambda t: {"pixels": t}), _ENCODED.map(lambda files: {"encoded": files}))
    return st.builds(
        lambda name, version, given, more: kind(model=name, version=version, **given, **more),
        _names(model),
        VERSIONS,
        _mostly(inputs, st.just({})),
        st.fixed_dictionaries(fields),
    )


# --- The Open Inference Protocol --------------------------------------------------------------------------------------

PARAMETERS = st.one_of(
    st.builds(pb.InferParameter, bool_param=st.booleans()),
    st.builds(pb.InferParameter, int64_param=INT64),
    st.builds(pb.InferParameter, uint64_param=st.one_of(st.integers(0, 5), st.just(2**64 - 1))),
    st.builds(pb.InferParameter, double_param=st.floats()),
    st.builds(pb.InferParameter, string_param=st.text(max_size=20)),
    st.just(pb.InferParameter()),
)
_GIVEN = _mostly(
    st.just({}),
    st.dictionaries(
        st.sampled_from(["priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "unknown", ""]),
        PARAMETERS,
        max_size=3,
    ),
)
_OF_TENSORS = _mostly(
    st.just({}),
    st.dictionaries(
        st.sampled_from(["classification", "binary_data", "shared_memory_region", "shared_memory_byte_size"]),
        PARAMETERS,
        max_size=2,
    ),
)
_DATATYPES = st.one_of(
    st.sampled_from(["UINT8", "FP32", "INT64", "BYTES"]),
    st.sampled_from([*oip.CONTENTS, "FP16", "BF16", "", "uint8", "日本"]),
)
_TENSOR_NAMES = st.one_of(st.sampled_from(["image", "history", "length", "symbols", "x"]), st.text(max_size=10))
_OUTPUT_NAMES = st.one_of(
    st.sampled_from(["probabilities", "map", "quantiles", "boxes", "scores", "labels", "y"]), st.text(max_size=10)
)
_SHAPES = st.one_of(st.lists(INT64, max_size=5), st.lists(st.integers(0, 4), max_size=5))


@st.composite
def _valid(draw: st.DrawFn) -> pb.ModelInferRequest:
    """Right, as far as model and tensors go."""
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
            x = np.full((rows, 3), draw(FLOATS), np.float32)
            return oip.request("plain", typed=typed, x=x)
        case 4:
            symbols = np.array([[draw(st.integers(-1, 4)) for _ in range(5)]] * rows)
            return oip.request("letters", typed=typed, symbols=symbols)
        case 5:
            model = draw(st.sampled_from(["digits", "digits.encoded", "segmenter", "detector.encoded"]))
            files = draw(st.lists(IMAGE_FILES, min_size=1, max_size=3))
            return oip.files(*files, model=model, raw=draw(st.booleans()), column=draw(st.booleans()))
        case _:
            return oip.images(np.full((rows, 1, 1, 1), draw(st.integers(0, 20)), np.uint8), "fragile", typed=typed)


_CONTENTS = st.lists(st.binary(max_size=100), max_size=3)
_NUMBERS = st.sampled_from(["int64_contents", "fp32_contents", "uint_contents"])


@st.composite
def infer_requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    """Valid ones, and such with one or two things changed."""
    message = draw(_valid())
    message.id = draw(st.one_of(st.just(""), st.text(max_size=10)))
    _give(message, draw(_GIVEN))
    for _ in range(draw(st.integers(0, 2))):
        tensor = message.inputs[0] if message.inputs else message.inputs.add()
        numbers = tensor.contents
        changes: list[Callable[[], object]] = [
            lambda: setattr(message, "model_name", draw(_names("digits", "plain"))),
            lambda: setattr(message, "model_version", draw(VERSION_TEXTS)),
            lambda tensor=tensor: setattr(tensor, "name", draw(_TENSOR_NAMES)),
            lambda tensor=tensor: setattr(tensor, "datatype", draw(_DATATYPES)),
            lambda tensor=tensor: _replace(tensor.shape, draw(_SHAPES)),
            lambda: _replace(message.raw_input_contents, draw(_CONTENTS)),
            lambda numbers=numbers: numbers.bytes_contents.append(b"x"),
            lambda numbers=numbers: getattr(numbers, draw(_NUMBERS)).extend([1, 2]),
            lambda: message.inputs.add(name=draw(_TENSOR_NAMES), datatype=draw(_DATATYPES), shape=draw(_SHAPES)),
            lambda tensor=tensor: _give(tensor, draw(_OF_TENSORS)),
            lambda: _give(message.outputs.add(name=draw(_OUTPUT_NAMES)), draw(_OF_TENSORS)),
        ]
        draw(st.sampled_from(changes))()
    return message


def _replace(field: Any, values: Iterable[Any]) -> None:
    del field[:]
    field.extend(values)


def _give(thing: Any, parameters: Mapping[str, pb.InferParameter]) -> None:
    for name, parameter in parameters.items():
        thing.parameters[name].CopyFrom(parameter)


def _about(kind: type[Any]) -> st.SearchStrategy[Message]:
    return st.builds(kind, name=_names("digits"), version=VERSION_TEXTS)


# --- Series -----------------------------------------------------------------------------------------------------------

_TIMES = _mostly(
    st.builds(Timestamp, seconds=st.integers(0, 40).map(lambda day: day * 86_400)),
    st.builds(Timestamp, seconds=INT64, nanos=st.integers(-(2**31), 2**31 - 1)),
)
_SERIES = st.builds(
    forecasting_pb2.Series,
    values=_mostly(st.lists(st.floats(-1e3, 1e3, width=32), min_size=10, max_size=30), st.lists(FLOATS, max_size=30)),
    id=st.text(max_size=5),
    start=_mostly(st.none(), _TIMES),
    timestamps=_mostly(st.just([]), st.lists(_TIMES, max_size=30)),
    missing=_mostly(st.lists(st.integers(0, 9), max_size=2, unique=True).map(sorted), st.lists(UINT32, max_size=3)),
    covariates=_mostly(
        st.just({}),
        st.dictionaries(
            st.text(max_size=5), st.builds(forecasting_pb2.Covariate, values=st.lists(FLOATS, max_size=40)), max_size=2
        ),
    ),
)


# --- All of them ------------------------------------------------------------------------------------------------------

WELL_FORMED: st.SearchStrategy[Message] = st.one_of(
    _vision(
        vision_pb2.ClassifyRequest,
        "digits",
        (28, 28, 1),
        top_k=UINT32,
        min_probability=_mostly(st.floats(0, 1, width=32), FLOATS),
    ),
    _vision(vision_pb2.ClassifyRequest, "fragile", (1, 1, 1), top_k=UINT32),
    _vision(vision_pb2.ExtractFeaturesRequest, "backbone", (8, 6, 3)),
    _vision(
        vision_pb2.DetectRequest,
        "detector",
        (8, 16, 3),
        min_score=_mostly(st.floats(0, 1, width=32), FLOATS),
        max_objects=UINT32,
    ),
    _vision(vision_pb2.SegmentRequest, "segmenter", (8, 6, 3), with_probabilities=st.booleans()),
    st.builds(
        forecasting_pb2.ForecastRequest,
        model=_names("series"),
        version=VERSIONS,
        history=_mostly(st.lists(st.floats(-1e3, 1e3, width=32), max_size=64), st.lists(FLOATS, max_size=80)),
        horizon=st.one_of(st.integers(0, 6), UINT32),
    ),
    st.builds(
        forecasting_pb2.ForecastRequest,
        model=_names("series"),
        series=_mostly(st.lists(_SERIES, min_size=1, max_size=3), st.just([])),
        frequency=_mostly(st.sampled_from(["", "D"]), st.one_of(st.sampled_from(["h", "MS", "-1D", "0D"]), st.text())),
        quantiles=_mostly(st.just([]), st.lists(FLOATS, max_size=3)),
        check_last=_mostly(st.just(0), st.one_of(st.integers(1, 3), UINT32)),
        horizon=_mostly(st.integers(0, 40), UINT32),
    ),
    st.builds(
        sequences_pb2.PredictRequest,
        model=_names("letters"),
        version=VERSIONS,
        symbols=_mostly(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.text(max_size=5), max_size=40)),
        top_k=UINT32,
    ),
    st.builds(catalog_pb2.GetModelRequest, name=_names("digits"), version=VERSIONS),
    infer_requests(),
    st.one_of(
        _about(pb.ModelReadyRequest),
        _about(pb.ModelMetadataRequest),
        _about(pb.ModelConfigRequest),
        _about(pb.ModelStatisticsRequest),
        st.builds(pb.RepositoryIndexRequest, repository_name=st.text(max_size=5), ready=st.booleans()),
    ),
)


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


@st.composite
def requests(draw: st.DrawFn) -> Request:
    metadata = draw(METADATA)
    if draw(st.integers(0, 9)) == 0:
        return Request(draw(st.sampled_from(UNARY)), draw(st.binary(max_size=300)), metadata)
    message = draw(st.one_of(infer_requests(), WELL_FORMED))
    method = draw(st.sampled_from(UNARY)) if draw(st.integers(0, 9)) == 0 else METHOD_OF[type(message)]
    return Request(method, draw(_spoilt(message.SerializeToString())), metadata)


HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_SYMBOLS = _mostly(
    st.sampled_from(["rafaga.v1.Vision", "rafaga/v1/vision.proto", "grpc.health.v1.Health", "*"]),
    st.one_of(st.sampled_from(_STRANGE), st.text(max_size=80)),
)
_TEXT_FIELDS = ("file_by_filename", "file_containing_symbol", "all_extension_numbers_of_type", "list_services", "host")
_REFLECTED: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        lambda field, text: reflection_pb2.ServerReflectionRequest(**{field: text}),
        st.sampled_from(_TEXT_FIELDS),
        _SYMBOLS,
    ),
    st.builds(
        lambda text, number: reflection_pb2.ServerReflectionRequest(
            file_containing_extension=reflection_pb2.ExtensionRequest(containing_type=text, extension_number=number)
        ),
        _SYMBOLS,
        st.integers(-(2**31), 2**31 - 1),
    ),
)
_CHECKED: st.SearchStrategy[Message] = st.builds(
    health_pb2.HealthCheckRequest, service=_names("digits", "", "rafaga.v1.Catalog")
)


@st.composite
def public_requests(draw: st.DrawFn) -> Request:
    """Of health and reflection, which grpcio's own server answers."""
    message = draw(_mostly(st.just(None), st.binary(max_size=100)))
    method = draw(st.sampled_from([f"{HEALTH}Check", f"{HEALTH}Watch", REFLECTION]))
    own = draw(_REFLECTED if method == REFLECTION else _CHECKED)
    return Request(method, draw(_spoilt(own.SerializeToString())) if message is None else message, ())


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    contents = [draw(_spoilt(draw(infer_requests()).SerializeToString())) for _ in range(draw(st.integers(0, 4)))]
    ends = draw(st.booleans())
    # Which of several errors ends the stream, and what is answered before, is chance.
    return Stream(contents[:1] if ends else contents, ends, draw(METADATA))


# --- HTTP -------------------------------------------------------------------------------------------------------------


class HttpRequest(NamedTuple):
    path: str
    body: bytes
    headers: dict[str, str]


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
_GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/models/digits:classify": [
        {"images": [b64encode(messages.black_png(9, 9)).decode()], "top_k": 3},
        {"pixels": {"shape": [1, 28, 28, 1], "data": b64encode(bytes(784)).decode()}},
    ],
    "/v1/models/series:forecast": [{"history": [1, 2.5], "horizon": 2}, {"series": [[1, 2], [3, 4]]}],
    "/v1/models/letters:predict": [{"symbols": ["a", "b"]}, {"sequences": [["a"]], "top_k": 1}],
    "/v2/models/plain/infer": [
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}], "id": "a"},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}]},
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [[1, 2, 3]]}],
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
