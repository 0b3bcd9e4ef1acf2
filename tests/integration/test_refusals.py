"""A bad request gets one clear, typed status that says what was expected, and costs nobody else anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from rafaga.v1 import catalog_pb2, forecasting_pb2, vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Served, Stubs, refusal

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DIGIT = messages.random_digits(0)


class Bad(NamedTuple):
    """A request, and the reason and a part of the message that it must get."""

    request: Any
    reason: str
    says: str


def classify_pixels(data: bytes, batch: int, height: int, width: int, channels: int) -> vision_pb2.ClassifyRequest:
    pixels = vision_pb2.ImageTensor(data=data, batch=batch, height=height, width=width, channels=channels)
    return vision_pb2.ClassifyRequest(model="digits", pixels=pixels)


BAD: dict[str, Bad] = {
    "wrong height": Bad(messages.classify(DIGIT[:, 1:]), "INVALID_TENSOR", "[N, 28, 28, 1], got [1, 27, 28, 1]"),
    "wrong channels": Bad(messages.classify(np.repeat(DIGIT, 3, 3)), "INVALID_TENSOR", "got [1, 28, 28, 3]"),
    "float32 pixels": Bad(
        classify_pixels(DIGIT.astype(np.float32).tobytes(), 1, 28, 28, 1), "INVALID_TENSOR", "got 3136"
    ),
    "too few bytes": Bad(classify_pixels(bytes(783), 1, 28, 28, 1), "INVALID_TENSOR", "expected 784 bytes"),
    "no images": Bad(classify_pixels(b"", 0, 28, 28, 1), "INVALID_TENSOR", "expected 1 to 1024"),
    "huge declared batch": Bad(classify_pixels(b"", 2**32 - 1, 28, 28, 1), "INVALID_TENSOR", "got 4294967295"),
    "too many images": Bad(classify_pixels(bytes(1025 * 784), 1025, 28, 28, 1), "INVALID_TENSOR", "got 1025"),
    "no encoded images": Bad(messages.classify_files(), "INVALID_TENSOR", "expected 1 to 1024"),
    "too many encoded images": Bad(messages.classify_files(*[b"x"] * 1025), "INVALID_TENSOR", "got 1025"),
    "neither pixels nor encoded": Bad(
        vision_pb2.ClassifyRequest(model="digits"), "INVALID_REQUEST", "either `encoded` or `pixels`"
    ),
    "unknown model": Bad(messages.classify(DIGIT, "nobody"), "MODEL_NOT_FOUND", "available: backbone, digits"),
    "no model": Bad(messages.classify(DIGIT, ""), "MODEL_NOT_FOUND", "available"),
    "path as model": Bad(messages.classify(DIGIT, "../digits"), "MODEL_NOT_FOUND", "available"),
    "NUL in model": Bad(messages.classify(DIGIT, "digits\0"), "MODEL_NOT_FOUND", "available"),
    "unknown version": Bad(messages.classify(DIGIT, version=9), "MODEL_NOT_FOUND", "available: 1"),
    "wrong task": Bad(messages.classify(DIGIT, "series"), "INVALID_REQUEST", "for forecasting"),
    "not an image": Bad(messages.classify_files(b"GIF89a" + bytes(99)), "INVALID_IMAGE", "JPEG or PNG"),
    "empty image": Bad(messages.classify_files(b""), "INVALID_IMAGE", "got 0 bytes"),
    "truncated JPEG": Bad(
        messages.classify_files(messages.jpeg(messages.random_photo(0, 99, 99)[0])[:2000]),
        "INVALID_IMAGE",
        "do not decode",
    ),
    "one bad image of two": Bad(
        messages.classify_files(messages.png(DIGIT[0, :, :, 0]), b"?"), "INVALID_IMAGE", "image 1: "
    ),
    "200-megapixel PNG": Bad(
        messages.classify_files(messages.black_png(20_000, 10_000)), "INVALID_IMAGE", "50000000 pixels"
    ),
    "features of a classifier": Bad(
        messages.features(messages.random_photo(0, 8, 8), "digits"), "INVALID_REQUEST", "for classification"
    ),
    "features of no pixels": Bad(
        messages.features(messages.random_photo(0, 0, 8)), "INVALID_TENSOR", "at least one element"
    ),
    "features of too large an image": Bad(
        messages.features_files(messages.black_png(3000, 3000)), "INVALID_IMAGE", "got 3000x3000"
    ),
    "features of two sizes": Bad(
        messages.features_files(messages.black_png(8, 8), messages.black_png(8, 9)), "INVALID_IMAGE", "one size"
    ),
    "huge declared image": Bad(
        vision_pb2.ExtractFeaturesRequest(
            model="backbone", pixels=vision_pb2.ImageTensor(batch=1, height=2**32 - 1, width=2**32 - 1, channels=3)
        ),
        "INVALID_IMAGE",
        "at most",
    ),
    "no history": Bad(messages.forecast([]), "INVALID_TENSOR", "at least 2 observations, got 0"),
    "too short a history": Bad(messages.forecast([1]), "INVALID_TENSOR", "at least 2 observations, got 1"),
    "NaN in the history": Bad(messages.forecast([1, float("nan"), 2]), "INVALID_TENSOR", "finite"),
    "infinity in the history": Bad(messages.forecast([1, float("-inf")]), "INVALID_TENSOR", "finite"),
    "too long a horizon": Bad(messages.forecast([1, 2, 3], 5), "INVALID_REQUEST", "at most 4 steps, got 5"),
    "forecast of a classifier": Bad(messages.forecast([1, 2], model="digits"), "INVALID_REQUEST", "for class"),
    "empty request": Bad(vision_pb2.ClassifyRequest(), "MODEL_NOT_FOUND", "no model ''"),
    "unknown model of the catalogue": Bad(
        catalog_pb2.GetModelRequest(name="nobody"), "MODEL_NOT_FOUND", "no model 'nobody'"
    ),
}


def ask(stubs: Stubs, request: Any, timeout: float | None = PATIENCE_S) -> Any:
    """Calls the method that takes this kind of request."""
    methods: dict[type, Callable[..., Any]] = {
        vision_pb2.ClassifyRequest: stubs.vision.Classify,
        vision_pb2.ExtractFeaturesRequest: stubs.vision.ExtractFeatures,
        forecasting_pb2.ForecastRequest: stubs.forecasting.Forecast,
        catalog_pb2.GetModelRequest: stubs.catalog.GetModel,
    }
    return methods[type(request)](request, timeout=timeout)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_told_what_was_expected(server: Served, bad: Bad) -> None:
    refused = refusal(lambda: ask(server, bad.request))
    code = grpc.StatusCode.NOT_FOUND if bad.reason == "MODEL_NOT_FOUND" else INVALID
    assert (refused.code, refused.reason) == (code, bad.reason)
    assert bad.says in refused.message
    response = server.vision.Classify(messages.classify(DIGIT))
    assert messages.probabilities(response) == pytest.approx(bundles.classify(DIGIT), abs=1e-5)


METHODS = (
    "Vision/Classify",
    "Vision/ExtractFeatures",
    "Vision/Detect",
    "Vision/Segment",
    "Sequences/Predict",
    "Forecasting/Forecast",
    "Catalog/ListModels",
    "Catalog/GetModel",
)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_protobuf_are_an_invalid_request(server: Served, method: str) -> None:
    refused = refusal(lambda: server.channel.unary_unary(f"/rafaga.v1.{method}")(b"\xff" * 20, timeout=PATIENCE_S))
    assert (refused.code, refused.reason) == (INVALID, "INVALID_REQUEST")
    assert "expected a serialised rafaga.v1." in refused.message


@pytest.mark.parametrize("method", ["/rafaga.v1.Vision/Dream", "/no.Service/Nothing", "/x"])
def test_a_method_that_is_not_there_is_unimplemented(server: Served, method: str) -> None:
    refused = refusal(lambda: server.channel.unary_unary(method)(b"", timeout=PATIENCE_S))
    assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def test_fields_of_a_newer_client_are_ignored(server: Served) -> None:
    request = messages.classify(DIGIT).SerializeToString() + b"\xfa\x7f\x03new"
    answer = server.channel.unary_unary("/rafaga.v1.Vision/Classify")(request, timeout=PATIENCE_S)
    assert vision_pb2.ClassifyResponse.FromString(answer).results


def test_refusals_are_counted_by_their_reason(serve: Callable[..., Served]) -> None:
    served = serve()
    for bad in BAD.values():
        refusal(lambda bad=bad: ask(served, bad.request))
    classify = {"method": "/rafaga.v1.Vision/Classify"}
    for reason in ("INVALID_TENSOR", "INVALID_REQUEST", "INVALID_IMAGE", "MODEL_NOT_FOUND"):
        expected = sum(b.reason == reason for b in BAD.values() if isinstance(b.request, vision_pb2.ClassifyRequest))
        assert served.metric("rafaga_refusals_total", reason=reason, **classify) == expected
    assert served.metric("rafaga_requests_total") == len(BAD)
    assert served.metric("rafaga_requests_total", code="OK") == 0
    assert served.in_flight == 0


def test_a_defect_tells_the_caller_nothing_about_the_server(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()

    def broken(*_: object) -> None:
        raise OSError("/secret/path: no such file")

    monkeypatch.setattr(served.server.repository, "model", broken)
    refused = refusal(lambda: served.vision.Classify(messages.classify(DIGIT)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refused.message
    assert "/secret/path" in caplog.text
