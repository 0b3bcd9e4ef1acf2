"""A bad request gets one clear, typed status that says what was expected, and other requests are unaffected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga import errors
from rafaga.errors import InvalidImage, InvalidRequest, InvalidTensor, ModelNotFound, RafagaError, Unsupported
from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.malformed import METHOD_OF
from tests.integration.rest import send
from tests.integration.serving import PATIENCE_S, Serve, Served, Stubs, assert_refused, refusal, refusal_of

DIGIT = messages.random_digits(0)
PNG = messages.png(DIGIT[0, :, :, 0])
PHOTO = messages.random_photo(0, 8, 16)
HISTORY = messages.random_history(0, 12)[np.newaxis]


def pixels(data: bytes, batch: int) -> vision_pb2.ClassifyRequest:
    tensor = vision_pb2.ImageTensor(data=data, batch=batch, height=28, width=28, channels=1)
    return vision_pb2.ClassifyRequest(model="digits", pixels=tensor)


def infer(array: np.ndarray = DIGIT, model: str = "digits", **options: Any) -> pb.ModelInferRequest:
    return oip.images(array, model, **options)


def changed(request: Any, **fields: Any) -> pb.ModelInferRequest:
    """`request` with other values in its first input."""
    for name, value in fields.items():
        request.inputs[0].ClearField(name)
        if isinstance(value, tuple | list):
            getattr(request.inputs[0], name).extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


def with_raw(request: pb.ModelInferRequest, *raw: bytes) -> pb.ModelInferRequest:
    del request.raw_input_contents[:]
    request.raw_input_contents.extend(raw)
    return request


def version(text: str) -> pb.ModelInferRequest:
    request = infer()
    request.model_version = text
    return request


def in_shared_memory() -> pb.ModelInferRequest:
    """As Triton's clients send it: the input names a region and has no contents."""
    request = with_raw(infer())
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 784
    return request


def asking(output: str = "probabilities", **parameters: Any) -> pb.ModelInferRequest:
    return oip.asking_for(infer(), output, **parameters)


def series(**arrays: Any) -> pb.ModelInferRequest:
    return oip.request("series", **({"history": HISTORY} | arrays))


def lengths(*values: int) -> pb.ModelInferRequest:
    return series(length=np.array(values, np.int64))


def letters(symbols: list[int], length: int) -> pb.ModelInferRequest:
    return oip.request("letters", symbols=np.array([symbols]), length=np.array([length]))


TWICE = pb.ModelInferRequest(
    model_name="digits", inputs=[oip.tensor("image", DIGIT)] * 2, raw_input_contents=[DIGIT.tobytes()] * 2
)
HUGE_IMAGE = vision_pb2.ImageTensor(batch=1, height=2**32 - 1, width=2**32 - 1, channels=3)

BAD: dict[type[RafagaError], list[tuple[Any, str]]] = {
    ModelNotFound: [
        (messages.classify(DIGIT, "unknown"), "available: backbone, detector, digits"),
        (messages.classify(DIGIT, "../digits"), "available"),
        (messages.classify(DIGIT, version=9), "available: 1"),
        (catalog_pb2.GetModelRequest(name="unknown"), "no model 'unknown'"),
        (infer(model="unknown"), "available: backbone, detector, digits"),
        (version("2"), "available: 1"),
        (version("-1"), "an integer ≥ 1"),
        (version("latest"), "no version 'latest'"),
        (version("9" * 99), "no version '99999999999999999999'"),
    ],
    InvalidRequest: [
        (vision_pb2.DetectRequest(model="detector"), "either `encoded` or `pixels`"),
        (messages.detect(PHOTO, "letters"), "is for sequence"),
        (messages.detect(PHOTO, min_score=1.5), "min_score from 0 to 1, got 1.5"),
        (messages.detect(PHOTO, min_score=float("nan")), "min_score from 0 to 1"),
        (messages.classify(PHOTO, "detector"), "is for detection"),
        (vision_pb2.SegmentRequest(model="detector", pixels=messages.tensor(PHOTO)), "is for detection"),
        (sequences_pb2.PredictRequest(model="detector", symbols="ab"), "is for detection"),
        (messages.predict("a", sequences=[sequences_pb2.Sequence()]), "`symbols` or `sequences`, got both"),
        (vision_pb2.ClassifyRequest(model="digits"), "either `encoded` or `pixels`"),
        (messages.classify(DIGIT, "series"), "for forecasting"),
        (messages.features(messages.random_photo(0, 8, 8), "digits"), "for classification"),
        (messages.forecast([1, 2, 3], 41), "at most 40 steps, 10 times the model's; got 41"),
        (messages.forecast([1, 2], model="digits"), "for class"),
        (asking("logits"), "no output 'logits'; available: probabilities"),
        (oip.asking_for(asking(), "probabilities"), "requested once"),
        (asking(classification=0), "a count of at least 1"),
        (asking(classification=-1), "an integer of at least 0"),
        (asking(classification="3"), "expected an integer"),
        (oip.asking_for(series(), "quantiles", classification=1), "shape [N, classes]"),
        # Three objects have as many scores as there are labels: the shape alone does not show which they are.
        (oip.asking_for(infer(PHOTO, "detector"), "scores", classification=1), "on an output of shape [N, classes]"),
        (oip.asking_for(infer(PHOTO, "detector"), "labels", classification=1), "on an output of shape [N, classes]"),
        (infer(given={"timeout": "soon"}), "timeout: expected an integer"),
        (infer(given={"timeout": -1}), "timeout: expected an integer of at least 0, got -1"),
        (infer(given={"priority": "high"}), "priority: expected an integer"),
    ],
    Unsupported: [
        (infer(given={"sequence_id": 7}), "without sequence_id"),
        (in_shared_memory(), "shared memory"),
        (asking(shared_memory_region="region"), "shared memory"),
    ],
    InvalidImage: [
        (messages.classify_files(b"GIF89a" + bytes(99)), "JPEG, PNG, WebP, GIF or BMP"),
        (messages.classify_files(messages.jpeg(messages.random_photo(0, 99, 99)[0])[:2000]), "do not decode"),
        (messages.classify_files(PNG, b"?"), "image 1: "),
        (messages.classify_files(messages.black_png(20_000, 10_000)), "50000000 pixels"),
        (messages.features_files(messages.black_png(3000, 3000)), "got 3000x3000"),
        (messages.features_files(messages.black_png(8, 8), messages.black_png(8, 9)), "one size"),
        (vision_pb2.ExtractFeaturesRequest(model="backbone", pixels=HUGE_IMAGE), "at most"),
        (messages.detect_files(b"no image"), "JPEG, PNG, WebP, GIF or BMP"),
        (messages.segment_files(messages.black_png(16, 16), messages.black_png(20, 16)), "images of one size"),
        (oip.files(PNG, b"?"), "image 1: "),
        (oip.files(*[messages.black_png(2048, 2048)] * 12, model="backbone"), "in a request, got more"),
    ],
    InvalidTensor: [
        (messages.classify(DIGIT[:, 1:]), "[N, 28, 28, 1], got [1, 27, 28, 1]"),
        (messages.classify(np.repeat(DIGIT, 3, 3)), "got [1, 28, 28, 3]"),
        (pixels(DIGIT.astype(np.float32).tobytes(), 1), "got 3136"),
        (pixels(bytes(783), 1), "expected 784 bytes"),
        (pixels(b"", 0), "expected 1 to 1024"),
        (pixels(b"", 2**32 - 1), "got 4294967295"),
        (pixels(bytes(1025 * 784), 1025), "got 1025"),
        (messages.features(messages.random_photo(0, 0, 8)), "at least one element"),
        (messages.forecast([1]), "at least 2 observations, got 1"),
        (messages.forecast([1, float("nan"), 2]), "finite"),
        (messages.detect(PHOTO[:, :, 1:]), "[N, 8, 16, 3]"),
        (messages.segment(PHOTO[..., :1]), "any, any, 3"),
        (messages.predict("abx"), "symbol 2: expected one of a, b, c, d; got 'x'"),
        (messages.predict("a" * 33), "1 to 32 symbols, got 33"),
        (messages.predict(""), "1 to 32 symbols, got 0"),
        # names of inputs
        (pb.ModelInferRequest(model_name="digits"), "expected the inputs image; got none"),
        (oip.request("digits", picture=DIGIT), "inputs image; got picture"),
        (TWICE, "got image, image"),
        (oip.request("series", length=np.array([3], np.int64)), "inputs history, length; got length"),
        # datatypes
        (infer(DIGIT.astype(np.float32)), "datatype UINT8, got 'FP32'"),
        (series(history=HISTORY.astype(np.float64)), "datatype FP32, got 'FP64'"),
        (series(length=np.array([3], np.int32)), "input length: expected datatype INT64, got 'INT32'"),
        (changed(infer(), datatype="uint8"), "UINT8, got 'uint8'"),
        (changed(series(), datatype="BYTES"), "datatype FP32, got 'BYTES'"),
        # shapes and sizes
        (infer(DIGIT[:, 1:]), "[N, 28, 28, 1], got [1, 27, 28, 1]"),
        (infer(DIGIT[0]), "got [28, 28, 1]"),
        (infer(DIGIT[:0]), "at least one row, got shape [0, 28, 28, 1]"),
        (infer(messages.random_photo(0, 0, 8), "backbone"), "at least one pixel, got shape [1, 0, 8, 3]"),
        (changed(infer(), shape=[-1, 28, 28, 1]), "zero or more, got [-1, 28"),
        (changed(infer(), shape=[2**62, 28, 28, 1]), "got 784"),
        (infer(np.zeros((1025, 28, 28, 1), np.uint8)), "got 1025"),
        (with_raw(infer(), bytes(783)), "expected 784 bytes"),
        (with_raw(infer()), "expected 784 elements in uint_contents"),
        (with_raw(infer(), DIGIT.tobytes(), b""), "1 raw_input_contents, one per input, got 2"),
        (with_raw(lengths(3), HISTORY.tobytes()), "2 raw_input_contents, one per input, got 1"),
        (with_raw(infer(typed=True), DIGIT.tobytes()), "either raw_input_contents or contents"),
        (changed(infer(typed=True), shape=[2, 28, 28, 1]), "expected 1568 elements"),
        (changed(infer(DIGIT.astype(np.int32), typed=True), datatype="UINT8"), "got 0"),
        (changed(infer(DIGIT.astype(np.uint32) + 200, typed=True), datatype="UINT8"), "a value does not fit UINT8"),
        (lengths(3, 4), "equally many rows in every input, got [1, 2]"),
        # series
        (series(history=np.zeros((1, 0), np.float32)), "expected lengths from 2"),
        (lengths(13), "from 2 to 12"),
        (lengths(1), "got 1 to 1"),
        (series(history=np.zeros((1, 65), np.float32)), "at most 64 observations"),
        (series(history=np.full((1, 5), np.nan, np.float32)), "finite"),
        # sequences
        (letters([0, 4], 2), "symbols from 0 to 3"),
        (letters([0, -1], 2), "symbols from 0 to 3"),
        (letters([0, 1], 3), "lengths from 1 to 2"),
        (letters([0, 1], 0), "lengths from 1 to 2"),
        (letters([0] * 33, 33), "at most 32 symbols"),
        # encoded images
        (changed(oip.files(PNG, PNG), shape=[1, 2]), "shape [N, 1], got [1, 2]"),
        (changed(oip.files(PNG), shape=[]), "shape [N, 1], got []"),
        (changed(oip.files(PNG), shape=[2, 1]), "2 elements, got 1"),
        (changed(oip.files(PNG, PNG), shape=[1, 1]), "1 elements, got 2"),
        (oip.files(), "expected 1 to"),
        (oip.files(*[b"x"] * 1025), "got 1025"),
        (changed(oip.files(PNG), name="file"), "input image, got 'file'"),
        (with_raw(oip.files(PNG), b"\1\0"), "four bytes of length"),
        (with_raw(oip.files(PNG), oip.length_prefixed(PNG)[:-1]), f"{len(PNG)} bytes, got"),
        (with_raw(oip.files(PNG), b"\xff" * 4), "4294967295 bytes, got"),
        (with_raw(oip.files(PNG), oip.length_prefixed(PNG) + b"\0"), "four bytes of length"),
    ],
    errors.RejectedByModel: [
        (infer(np.full((1, 1, 1, 1), 200, np.uint8), "fragile"), "the model fails on this input: Gather: indices"),
    ],
}


def ask(stubs: Stubs, request: Any) -> Any:
    """Calls the method that takes this kind of request."""
    return stubs.channel.unary_unary(METHOD_OF[type(request)])(request.SerializeToString(), timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("error", "request_", "says"),
    [pytest.param(error, request, says, id=says) for error, cases in BAD.items() for request, says in cases],
)
def test_the_error_says_what_was_expected(
    full_server: Served, error: type[RafagaError], request_: Any, says: str
) -> None:
    assert_refused(lambda: ask(full_server, request_), error, says)
    found = oip.answer(full_server, infer())["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(DIGIT), atol=1e-5)


@pytest.mark.parametrize("kind", [pb.ModelMetadataRequest, pb.ModelConfigRequest, pb.ModelStatisticsRequest])
def test_every_method_reports_an_unknown_model_or_version(full_server: Served, kind: type) -> None:
    for fields in ({"name": "unknown"}, {"name": "digits", "version": "2"}, {"name": "digits", "version": "newest"}):
        assert_refused(lambda fields=fields: ask(full_server, kind(**fields)), ModelNotFound)


ANSWERS_ANYTHING = {f"{messages.OPEN}{name}" for name in ("ServerLive", "ServerReady", "ServerMetadata")}


@pytest.mark.parametrize("method", sorted(messages.METHODS.keys() - ANSWERS_ANYTHING - {messages.STREAM}))
def test_bytes_that_do_not_parse_are_an_invalid_request(full_server: Served, method: str) -> None:
    says = f"expected a serialised {method[1:].partition('.')[0]}."
    assert_refused(
        lambda: full_server.channel.unary_unary(method)(b"\xff" * 20, timeout=PATIENCE_S), InvalidRequest, says
    )


HUGE = 9 * 2**20


def forecasts(**fields: Any) -> forecasting_pb2.ForecastRequest:
    return forecasting_pb2.ForecastRequest(model="series", **fields)


ECHOED: dict[str, Callable[[], Any]] = {
    "300 sizes": lambda: changed(infer(), shape=[2**62] * 300),
    "a name of a tensor": lambda: changed(infer(), name="x" * HUGE),
    "a name of a model": lambda: pb.ModelMetadataRequest(name="☃" * (HUGE // 3)),
    "a datatype": lambda: changed(infer(), datatype="x" * HUGE),
    "a name of an output": lambda: asking("x" * HUGE),
    "a frequency": lambda: forecasts(history=[1, 2], frequency="x" * HUGE),
    "an id": lambda: forecasts(series=[forecasting_pb2.Series(id="x" * HUGE, values=[1])]),
}


@pytest.mark.parametrize("made", ECHOED.values(), ids=ECHOED.keys())
def test_no_error_is_as_long_as_its_request(full_server: Served, made: Callable[[], Any]) -> None:
    """gRPC drops a status that is too long, and a message of megabytes costs memory a second time."""
    with pytest.raises(grpc.RpcError) as failed:
        ask(full_server, made())
    error: Any = failed.value
    assert refusal_of(error).reason
    assert sum(map(len, [error.details(), *dict(error.trailing_metadata()).values()])) < 4096


def tensor(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [1]} | fields]}


ECHOED_OVER_HTTP: dict[str, Callable[[], tuple[str, Any]]] = {
    "300 sizes": lambda: ("/v2/models/digits/infer", tensor(shape=[2**62] * 300)),
    "a name of a tensor": lambda: ("/v2/models/digits/infer", tensor(name="x" * HUGE)),
    "a key": lambda: ("/v2/models/digits/infer", {"x" * HUGE: 1}),
    "a value": lambda: ("/v1/models/series:forecast", {"history": ["x" * HUGE]}),
    "a path": lambda: (f"/v1/models/{'x' * 30_000}:classify", {}),
}


@pytest.mark.parametrize("made", ECHOED_OVER_HTTP.values(), ids=ECHOED_OVER_HTTP.keys())
def test_nor_over_http(full_server: Served, made: Callable[[], tuple[str, Any]]) -> None:
    answer = send(full_server, *made())
    assert answer.status >= 400
    assert len(answer.body) < 4096


OF_TRITON = (
    *(f"{kind}SharedMemory{act}" for kind in ("System", "Cuda") for act in ("Status", "Register", "Unregister")),
    *("TraceSetting", "LogSettings", "RepositoryModelLoad", "RepositoryModelUnload"),
)


@pytest.mark.parametrize(
    "method",
    ["/rafaga.v1.Vision/Dream", "/no.Service/Nothing", "/x", *(f"{messages.OPEN}{name}" for name in OF_TRITON)],
)
def test_a_method_that_is_not_there_is_unimplemented(full_server: Served, method: str) -> None:
    refused = refusal(lambda: full_server.channel.unary_unary(method)(b"", timeout=PATIENCE_S))
    assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def test_fields_of_a_newer_client_are_ignored(full_server: Served) -> None:
    request = messages.classify(DIGIT).SerializeToString() + b"\xfa\x7f\x03new"
    answer = full_server.channel.unary_unary("/rafaga.v1.Vision/Classify")(request, timeout=PATIENCE_S)
    assert vision_pb2.ClassifyResponse.FromString(answer).results


def test_a_defect_shows_the_caller_nothing_about_the_server(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()

    def broken(*_: object) -> None:
        raise OSError("/secret/path: no such file")

    monkeypatch.setattr(served.server.repository, "model", broken)  # asked for models that are not served
    classify = messages.classify(DIGIT, "unknown")
    assert "secret" not in assert_refused(lambda: served.vision.Classify(classify), errors.InternalError)
    assert "/secret/path" in caplog.text
