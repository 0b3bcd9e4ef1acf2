"""Whatever is asked, the answer is a clean status, and the next good request is served.

RAFAGA_FUZZ_EXAMPLES sets how many requests each transport gets; the suite asks for a thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rafaga.v1 import catalog_pb2, forecasting_pb2, vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Served, refusal_of

EXAMPLES = int(os.environ.get("RAFAGA_FUZZ_EXAMPLES", "1000"))

METHODS = {
    "/rafaga.v1.Vision/Classify": vision_pb2.ClassifyResponse,
    "/rafaga.v1.Vision/ExtractFeatures": vision_pb2.ExtractFeaturesResponse,
    "/rafaga.v1.Forecasting/Forecast": forecasting_pb2.ForecastResponse,
    "/rafaga.v1.Catalog/GetModel": catalog_pb2.GetModelResponse,
    "/rafaga.v1.Catalog/ListModels": catalog_pb2.ListModelsResponse,
}

CLEAN = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,  # with ENGINE_FAILURE alone, from the model that is made to fail
}

UINT32 = st.one_of(
    st.integers(0, 40), st.sampled_from([28, 784, 65535, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
NAMES = st.one_of(
    st.sampled_from(["digits", "backbone", "series", "fragile"]),
    st.sampled_from(
        ["", "..", "../digits", "digits/1", "/etc/passwd", "digits\0", "Digits", "日本", "\u202e", "a" * 5000]
    ),
    st.text(max_size=80),
)
VERSIONS = st.one_of(st.just(0), st.just(1), UINT32)
IMAGE_FILES = st.one_of(
    st.binary(max_size=200),
    st.builds(messages.black_png, st.integers(1, 70), st.integers(1, 70)),
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


def _damaged(file: bytes, cut: int, flip: int) -> bytes:
    """The first `cut` bytes, one bit of them turned."""
    content = bytearray(file[: max(cut, 1)])
    content[flip % len(content)] ^= 1 << flip % 8
    return bytes(content)


@st.composite
def tensors(draw: st.DrawFn) -> vision_pb2.ImageTensor:
    """Any shape with any data, or a shape whose data fits it for one of several dtypes."""
    if draw(st.booleans()):
        batch, height, width, channels = (draw(UINT32) for _ in range(4))
        size = draw(st.integers(0, 5000))
    else:
        batch = draw(st.integers(0, 40))
        height = width = draw(st.sampled_from([1, 8, 28, 31]))
        channels = draw(st.sampled_from([0, 1, 3, 4]))
        size = batch * height * width * channels * draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    data = bytes([draw(st.integers(0, 255))]) * size
    return vision_pb2.ImageTensor(data=data, batch=batch, height=height, width=width, channels=channels)


FILES = st.builds(vision_pb2.EncodedImages, images=st.lists(IMAGE_FILES, max_size=4))
INPUTS = st.one_of(
    st.builds(dict), st.builds(lambda t: {"pixels": t}, tensors()), st.builds(lambda e: {"encoded": e}, FILES)
)
FLOATS = st.one_of(st.floats(width=32), st.floats(-1e3, 1e3, width=32))
WELL_FORMED = st.one_of(
    st.builds(
        lambda model, version, top_k, given: vision_pb2.ClassifyRequest(
            model=model, version=version, top_k=top_k, **given
        ),
        NAMES,
        VERSIONS,
        UINT32,
        INPUTS,
    ),
    st.builds(
        lambda model, version, given: vision_pb2.ExtractFeaturesRequest(model=model, version=version, **given),
        NAMES,
        VERSIONS,
        INPUTS,
    ),
    st.builds(
        forecasting_pb2.ForecastRequest,
        model=NAMES,
        version=VERSIONS,
        history=st.lists(FLOATS, max_size=80),
        horizon=st.one_of(st.integers(0, 6), UINT32),
    ),
    st.builds(catalog_pb2.GetModelRequest, name=NAMES, version=VERSIONS),
)
METHOD_OF = {
    vision_pb2.ClassifyRequest: "/rafaga.v1.Vision/Classify",
    vision_pb2.ExtractFeaturesRequest: "/rafaga.v1.Vision/ExtractFeatures",
    forecasting_pb2.ForecastRequest: "/rafaga.v1.Forecasting/Forecast",
    catalog_pb2.GetModelRequest: "/rafaga.v1.Catalog/GetModel",
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """(method, bytes): a message for its method or another one, whole, cut or with a changed byte; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(sorted(METHODS))), draw(st.binary(max_size=300))
    message = draw(WELL_FORMED)
    method, content = METHOD_OF[type(message)], message.SerializeToString()
    match draw(st.integers(0, 9)):
        case 0:
            method = draw(st.sampled_from(sorted(METHODS)))
        case 1:
            content = content[: draw(st.integers(0, len(content)))]
        case 2 if content:
            changed = bytearray(content)
            changed[draw(st.integers(0, min(len(content), 64) - 1))] = draw(st.integers(0, 255))
            content = bytes(changed)
    return method, content


@pytest.fixture
def ask(server: Served) -> Callable[[str, bytes], Any]:
    stubs = {method: server.channel.unary_unary(method) for method in METHODS}
    return lambda method, content: stubs[method](content, timeout=PATIENCE_S)


@pytest.mark.timeout(0)  # RAFAGA_FUZZ_EXAMPLES may ask for hours
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(request=requests())
def test_every_request_gets_a_clean_status(ask: Callable[[str, bytes], Any], request: tuple[str, bytes]) -> None:
    method, content = request
    try:
        METHODS[method].FromString(ask(method, content))
    except grpc.RpcError as error:
        refused = refusal_of(error)
        assert refused.code in CLEAN, refused
        assert refused.reason, refused
        assert refused.code is not grpc.StatusCode.INTERNAL or refused.reason == "ENGINE_FAILURE", refused
        assert len(refused.message) < 500, refused
        assert "/work" not in refused.message
        assert "Traceback" not in refused.message


def test_the_next_good_requests_are_served(server: Served) -> None:
    """After all of the above."""
    images, history = messages.random_digits(3, 5), messages.random_history(4, 20)
    photo = messages.random_photo(5, 16, 16)
    answer = server.vision.Classify(messages.classify(images), timeout=PATIENCE_S)
    assert messages.probabilities(answer) == pytest.approx(bundles.classify(images), abs=1e-5)
    forecast = server.forecasting.Forecast(messages.forecast(history), timeout=PATIENCE_S)
    assert messages.quantiles(forecast) == pytest.approx(bundles.forecast(history), abs=1e-4)
    features = server.vision.ExtractFeatures(messages.features(photo), timeout=PATIENCE_S)
    np.testing.assert_allclose(messages.maps(features)[0], bundles.features(photo), atol=1e-6)
    assert server.in_flight == 0
