"""Deadlines and cancellation of every method: before, during and after compute. Nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import Message

from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2
from tests.integration import http2, messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, eventually, serving
from tests.integration.valve import Decoder, Valve

OPEN = "/inference.GRPCInferenceService/"
SOON_S = 0.3
PHOTO = messages.random_photo(0, 8, 16)
FILE = messages.png(PHOTO[0])
DIGIT = messages.random_digits(0)
DIGIT_FILE = messages.png(DIGIT[0, :, :, 0])


class Method(NamedTuple):
    """A valid request, and how to read the reply. model: the model that computes, if any. files: its images are decoded
    first. stream: it is the only message of a stream."""

    path: str
    request: Message
    reply: type[Message]
    model: str = ""
    files: bool = False
    stream: bool = False


def _about(name: str, request: Message, reply: type[Message]) -> Method:
    return Method(OPEN + name, request, reply)


_CLASSIFY, _FEATURES = "/rafaga.v1.Vision/Classify", "/rafaga.v1.Vision/ExtractFeatures"
_DETECT, _SEGMENT = "/rafaga.v1.Vision/Detect", "/rafaga.v1.Vision/Segment"
_INFER, _STREAM = f"{OPEN}ModelInfer", f"{OPEN}ModelStreamInfer"
_LETTERS = sequences_pb2.PredictRequest(model="letters", symbols="abcd")
_HISTORY = messages.random_history(0, 12)

METHODS = {
    "classify": Method(_CLASSIFY, messages.classify(DIGIT), vision_pb2.ClassifyResponse, "digits"),
    "features": Method(_FEATURES, messages.features(PHOTO), vision_pb2.ExtractFeaturesResponse, "backbone"),
    "detect": Method(_DETECT, messages.detect(PHOTO), vision_pb2.DetectResponse, "detector"),
    "segment": Method(_SEGMENT, messages.segment(PHOTO), vision_pb2.SegmentResponse, "segmenter"),
    "forecast": Method(
        "/rafaga.v1.Forecasting/Forecast", messages.forecast(_HISTORY), forecasting_pb2.ForecastResponse, "series"
    ),
    "predict": Method("/rafaga.v1.Sequences/Predict", _LETTERS, sequences_pb2.PredictResponse, "letters"),
    "infer": Method(_INFER, oip.images(DIGIT), pb.ModelInferResponse, "digits"),
    "stream": Method(_STREAM, oip.images(DIGIT), pb.ModelStreamInferResponse, "digits", stream=True),
    "classify files": Method(
        _CLASSIFY, messages.classify_files(DIGIT_FILE), vision_pb2.ClassifyResponse, "digits", files=True
    ),
    "features of files": Method(
        _FEATURES, messages.features_files(FILE), vision_pb2.ExtractFeaturesResponse, "backbone", files=True
    ),
    "detect in files": Method(_DETECT, messages.detect_files(FILE), vision_pb2.DetectResponse, "detector", files=True),
    "segment files": Method(
        _SEGMENT, messages.segment_files(FILE), vision_pb2.SegmentResponse, "segmenter", files=True
    ),
    "infer files": Method(_INFER, oip.files(DIGIT_FILE), pb.ModelInferResponse, "digits", files=True),
    "stream files": Method(
        _STREAM, oip.files(DIGIT_FILE), pb.ModelStreamInferResponse, "digits", files=True, stream=True
    ),
    "model": Method(
        "/rafaga.v1.Catalog/GetModel", catalog_pb2.GetModelRequest(name="digits"), catalog_pb2.GetModelResponse
    ),
    "models": Method("/rafaga.v1.Catalog/ListModels", catalog_pb2.ListModelsRequest(), catalog_pb2.ListModelsResponse),
    "live": _about("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse),
    "ready": _about("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse),
    "server": _about("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse),
    "model ready": _about("ModelReady", pb.ModelReadyRequest(name="digits"), pb.ModelReadyResponse),
    "metadata": _about("ModelMetadata", pb.ModelMetadataRequest(name="digits"), pb.ModelMetadataResponse),
    "config": _about("ModelConfig", pb.ModelConfigRequest(name="digits"), pb.ModelConfigResponse),
    "statistics": _about("ModelStatistics", pb.ModelStatisticsRequest(name="plain"), pb.ModelStatisticsResponse),
    "index": _about("RepositoryIndex", pb.RepositoryIndexRequest(), pb.RepositoryIndexResponse),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
every_that_computes = pytest.mark.parametrize(
    "method",  # once an image is decoded, it goes the way of pixels
    [m for m in METHODS.values() if m.model and not m.files],
    ids=[name for name, m in METHODS.items() if m.model and not m.files],
)
every_that_decodes = pytest.mark.parametrize(
    "method", [m for m in METHODS.values() if m.files], ids=[name for name, m in METHODS.items() if m.files]
)
either_end = pytest.mark.parametrize("end", ["deadline", "cancel"])


@pytest.fixture(scope="module")
def standing(everything: Path) -> Iterator[tuple[Served, Valve]]:
    """A server whose engines go on when a test lets them."""
    valve = Valve()
    with serving(everything, valve.load) as served:
        yield served, valve


class Asked:
    """A call in flight. With `end` "deadline" its deadline is short; with "cancel" `go_away` ends it."""

    def __init__(self, served: Served, method: Method, end: str = "") -> None:
        self._method, self._end = method, end
        content, timeout = method.request.SerializeToString(), SOON_S if end == "deadline" else PATIENCE_S
        self._call: Any
        if method.stream:
            self._call = served.channel.stream_stream(method.path)(iter([content]), timeout=timeout)
        else:
            self._call = served.channel.unary_unary(method.path).future(content, timeout=timeout)

    def answer(self) -> Message:
        """Without the fields that differ between calls."""
        content = next(self._call) if self._method.stream else self._call.result(PATIENCE_S)
        reply = self._method.reply.FromString(content)
        for passing in {"timing", "model_stats"} & set(reply.DESCRIPTOR.fields_by_name):
            reply.ClearField(passing)
        return reply

    def go_away(self) -> None:
        """Returns once the call has ended as it should."""
        if self._end == "cancel":
            self._call.cancel()
        expected = {"deadline": grpc.StatusCode.DEADLINE_EXCEEDED, "cancel": grpc.StatusCode.CANCELLED}[self._end]
        assert self._call.code() is expected


def in_flight(served: Served) -> int:
    """Read hundreds of times, so without a scrape of all metrics."""
    return served.server._router.in_flight.count


def assert_serves(served: Served, method: Method) -> None:
    """No call is left, and the same request gets the same answer twice."""
    eventually(lambda: in_flight(served) == 0, "every call ended")
    assert Asked(served, method).answer() == Asked(served, method).answer()
    eventually(lambda: in_flight(served) == 0, "these too")


def test_the_list_of_methods_is_complete(standing: tuple[Served, Valve]) -> None:
    served, _ = standing
    assert {method.path for method in METHODS.values()} == {*served.server._router.methods, _STREAM}


@every_method
def test_a_call_that_arrives_after_its_deadline(standing: tuple[Served, Valve], method: Method) -> None:
    """Nothing is computed for it. The engine is busy, because an idle one may be faster than the clock."""
    served, valve = standing
    with valve.closed(), http2.raw_connection(served.port) as connection:
        before = [Asked(served, method)] if method.model else []
        if before:
            valve.wait_for_engine()
        connection.send(http2.call(1, method.path, method.request, ("grpc-timeout", "1n")))
        assert connection.until_stream_ends(1)
        eventually(lambda: in_flight(served) == len(before), "the call ended")
    assert all(first.answer() for first in before)
    eventually(lambda: in_flight(served) == 0, "the first ended too")
    assert valve.runs == [1] * len(before)
    assert_serves(served, method)


@every_method
def test_calls_that_are_cancelled_at_once(standing: tuple[Served, Valve], method: Method) -> None:
    served, _ = standing
    calls = [Asked(served, method, "cancel") for _ in range(20)]
    for call in calls:
        call._call.cancel()
    assert_serves(served, method)


@every_method
def test_a_call_that_is_cancelled_after_its_answer(standing: tuple[Served, Valve], method: Method) -> None:
    served, _ = standing
    call = Asked(served, method)
    assert call.answer() == Asked(served, method).answer()
    call._call.cancel()
    assert_serves(served, method)


@either_end
@every_that_computes
def test_in_the_queue(standing: tuple[Served, Valve], method: Method, end: str) -> None:
    """1. The engine is busy. 2. A call queues and ends. 3. It is never computed; the one before it is answered."""
    served, valve = standing
    with valve.closed():
        first = Asked(served, method)
        valve.wait_for_engine()
        late = Asked(served, method, end)
        if end == "cancel":
            eventually(lambda: served.metric("rafaga_queue_rows", model=method.model) == 1, "it queues")
        late.go_away()
        eventually(lambda: in_flight(served) == 1, "only the first is in flight")
        eventually(lambda: served.metric("rafaga_queue_rows", model=method.model) == 0, "its rows left the queue")
    assert first.answer()
    eventually(lambda: in_flight(served) == 0, "the first ended too")
    assert valve.runs == [1]
    assert_serves(served, method)


@either_end
@every_that_computes
def test_while_the_engine_computes(standing: tuple[Served, Valve], method: Method, end: str) -> None:
    """The call ends at once. The result that the engine still computes is discarded."""
    served, valve = standing
    with valve.closed():
        late = Asked(served, method, end)
        valve.wait_for_engine()
        late.go_away()
        eventually(lambda: in_flight(served) == 0, "the call ended")
    assert_serves(served, method)


@either_end
@every_that_decodes
def test_while_an_image_is_decoded(
    standing: tuple[Served, Valve], monkeypatch: pytest.MonkeyPatch, method: Method, end: str
) -> None:
    served, valve = standing
    valve.runs.clear()
    decoder = Decoder(monkeypatch)
    late = Asked(served, method, end)
    decoder.wait_for_image()
    late.go_away()
    eventually(lambda: in_flight(served) == 0, "the call ended")
    decoder.go_on()
    assert_serves(served, method)
    assert valve.runs == [1, 1], "the two after it, and no more"
