"""A bad request gets one clear, typed status that says what was expected, and other requests are unaffected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2, forecasting_pb2, vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.malformed import METHOD_OF
from tests.integration.rest import send
from tests.integration.serving import (
    IMAGE,
    NO_MODEL,
    PATIENCE_S,
    REQUEST,
    TENSOR,
    Bad,
    Serve,
    Served,
    Stubs,
    refusal,
    refusal_of,
)
from tests.integration.test_open_inference_errors import changed

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DIGIT = messages.random_digits(0)


def classify_pixels(data: bytes, batch: int, height: int, width: int, channels: int) -> vision_pb2.ClassifyRequest:
    pixels = vision_pb2.ImageTensor(data=data, batch=batch, height=height, width=width, channels=channels)
    return vision_pb2.ClassifyRequest(model="digits", pixels=pixels)


BAD: dict[str, Bad] = {
    "wrong height": Bad(messages.classify(DIGIT[:, 1:]), TENSOR, "[N, 28, 28, 1], got [1, 27, 28, 1]"),
    "wrong channels": Bad(messages.classify(np.repeat(DIGIT, 3, 3)), TENSOR, "got [1, 28, 28, 3]"),
    "float32 pixels": Bad(classify_pixels(DIGIT.astype(np.float32).tobytes(), 1, 28, 28, 1), TENSOR, "got 3136"),
    "too few bytes": Bad(classify_pixels(bytes(783), 1, 28, 28, 1), TENSOR, "expected 784 bytes"),
    "no images": Bad(classify_pixels(b"", 0, 28, 28, 1), TENSOR, "expected 1 to 1024"),
    "huge declared batch": Bad(classify_pixels(b"", 2**32 - 1, 28, 28, 1), TENSOR, "got 4294967295"),
    "too many images": Bad(classify_pixels(bytes(1025 * 784), 1025, 28, 28, 1), TENSOR, "got 1025"),
    "neither pixels nor encoded": Bad(
        vision_pb2.ClassifyRequest(model="digits"), REQUEST, "either `encoded` or `pixels`"
    ),
    "unknown model": Bad(messages.classify(DIGIT, "unknown"), NO_MODEL, "available: backbone, digits"),
    "path as model": Bad(messages.classify(DIGIT, "../digits"), NO_MODEL, "available"),
    "unknown version": Bad(messages.classify(DIGIT, version=9), NO_MODEL, "available: 1"),
    "wrong task": Bad(messages.classify(DIGIT, "series"), REQUEST, "for forecasting"),
    "not an image": Bad(messages.classify_files(b"GIF89a" + bytes(99)), IMAGE, "JPEG, PNG, WebP, GIF or BMP"),
    "truncated JPEG": Bad(
        messages.classify_files(messages.jpeg(messages.random_photo(0, 99, 99)[0])[:2000]), IMAGE, "do not decode"
    ),
    "one bad image of two": Bad(messages.classify_files(messages.png(DIGIT[0, :, :, 0]), b"?"), IMAGE, "image 1: "),
    "200-megapixel PNG": Bad(messages.classify_files(messages.black_png(20_000, 10_000)), IMAGE, "50000000 pixels"),
    "features of a classifier": Bad(
        messages.features(messages.random_photo(0, 8, 8), "digits"), REQUEST, "for classification"
    ),
    "features of no pixels": Bad(messages.features(messages.random_photo(0, 0, 8)), TENSOR, "at least one element"),
    "features of too large an image": Bad(
        messages.features_files(messages.black_png(3000, 3000)), IMAGE, "got 3000x3000"
    ),
    "features of two sizes": Bad(
        messages.features_files(messages.black_png(8, 8), messages.black_png(8, 9)), IMAGE, "one size"
    ),
    "huge declared image": Bad(
        vision_pb2.ExtractFeaturesRequest(
            model="backbone", pixels=vision_pb2.ImageTensor(batch=1, height=2**32 - 1, width=2**32 - 1, channels=3)
        ),
        IMAGE,
        "at most",
    ),
    "too short a history": Bad(messages.forecast([1]), TENSOR, "at least 2 observations, got 1"),
    "NaN in the history": Bad(messages.forecast([1, float("nan"), 2]), TENSOR, "finite"),
    "too long a horizon": Bad(
        messages.forecast([1, 2, 3], 41), REQUEST, "at most 40 steps, 10 times the model's; got 41"
    ),
    "forecast of a classifier": Bad(messages.forecast([1, 2], model="digits"), REQUEST, "for class"),
    "unknown model of the catalogue": Bad(catalog_pb2.GetModelRequest(name="unknown"), NO_MODEL, "no model 'unknown'"),
}


def ask(stubs: Stubs, request: Any) -> Any:
    """Calls the method that takes this kind of request."""
    return stubs.channel.unary_unary(METHOD_OF[type(request)])(request.SerializeToString(), timeout=PATIENCE_S)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_the_error_says_what_was_expected(server: Served, bad: Bad) -> None:
    refused = refusal(lambda: ask(server, bad.request))
    code = grpc.StatusCode.NOT_FOUND if bad.reason == "MODEL_NOT_FOUND" else INVALID
    assert (refused.code, refused.reason) == (code, bad.reason)
    assert bad.says in refused.message
    response = server.vision.Classify(messages.classify(DIGIT))
    assert messages.probabilities(response) == pytest.approx(bundles.classify(DIGIT), abs=1e-5)


ANSWERS_ANYTHING = {f"{messages.OPEN}{name}" for name in ("ServerLive", "ServerReady", "ServerMetadata")}


@pytest.mark.parametrize("method", sorted(messages.METHODS.keys() - ANSWERS_ANYTHING - {messages.STREAM}))
def test_bytes_that_do_not_parse_are_an_invalid_request(server: Served, method: str) -> None:
    refused = refusal(lambda: server.channel.unary_unary(method)(b"\xff" * 20, timeout=PATIENCE_S))
    assert (refused.code, refused.reason) == (INVALID, "INVALID_REQUEST")
    assert f"expected a serialised {method[1:].partition('.')[0]}." in refused.message


HUGE = 9 * 2**20


def forecasts(**fields: Any) -> forecasting_pb2.ForecastRequest:
    return forecasting_pb2.ForecastRequest(model="series", **fields)


ECHOED: dict[str, Callable[[], Any]] = {
    "300 sizes": lambda: changed(oip.images(DIGIT), shape=[2**62] * 300),
    "a name of a tensor": lambda: changed(oip.images(DIGIT), name="x" * HUGE),
    "a name of a model": lambda: pb.ModelMetadataRequest(name="☃" * (HUGE // 3)),
    "a datatype": lambda: changed(oip.images(DIGIT), datatype="x" * HUGE),
    "a name of an output": lambda: oip.asking_for(oip.images(DIGIT), "x" * HUGE),
    "a frequency": lambda: forecasts(history=[1, 2], frequency="x" * HUGE),
    "an id": lambda: forecasts(series=[forecasting_pb2.Series(id="x" * HUGE, values=[1])]),
}


@pytest.mark.parametrize("made", ECHOED.values(), ids=ECHOED.keys())
def test_no_error_is_as_long_as_its_request(server: Served, made: Callable[[], Any]) -> None:
    """gRPC drops a status that is too long, and a message of megabytes costs memory a second time."""
    with pytest.raises(grpc.RpcError) as failed:
        ask(server, made())
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
def test_nor_over_http(server: Served, made: Callable[[], tuple[str, Any]]) -> None:
    answer = send(server, *made())
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
def test_a_method_that_is_not_there_is_unimplemented(server: Served, method: str) -> None:
    refused = refusal(lambda: server.channel.unary_unary(method)(b"", timeout=PATIENCE_S))
    assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def test_fields_of_a_newer_client_are_ignored(server: Served) -> None:
    request = messages.classify(DIGIT).SerializeToString() + b"\xfa\x7f\x03new"
    answer = server.channel.unary_unary("/rafaga.v1.Vision/Classify")(request, timeout=PATIENCE_S)
    assert vision_pb2.ClassifyResponse.FromString(answer).results


def test_a_defect_shows_the_caller_nothing_about_the_server(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()

    def broken(*_: object) -> None:
        raise OSError("/secret/path: no such file")

    monkeypatch.setattr(served.server.repository, "model", broken)  # asked for models that are not served
    refused = refusal(lambda: served.vision.Classify(messages.classify(DIGIT, "unknown")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refused.message
    assert "/secret/path" in caplog.text
