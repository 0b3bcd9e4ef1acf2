"""Deadlines and cancellation of every method: before, during and after compute. Nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import Message

from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2
from tests.integration import http2, messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, eventually, serving, wait_for_queue
from tests.integration.valve import Decoder, Valve

SOON_S = 0.3
PHOTO = messages.random_photo(0, 8, 16)
FILE = messages.png(PHOTO[0])
DIGIT = messages.random_digits(0)
DIGIT_FILE = messages.png(DIGIT[0, :, :, 0])


class Method(NamedTuple):
    """A valid request. model: the model that computes, if any. files: its images are decoded first."""

    path: str
    request: Message
    model: str = ""
    files: bool = False

    @property
    def stream(self) -> bool:
        """Whether the request is the only message of a stream."""
        return self.path == messages.STREAM


VISION, INFER = "/rafaga.v1.Vision/", f"{messages.OPEN}ModelInfer"

METHODS = {
    "classify": Method(f"{VISION}Classify", messages.classify(DIGIT), "digits"),
    "features": Method(f"{VISION}ExtractFeatures", messages.features(PHOTO), "backbone"),
    "detect": Method(f"{VISION}Detect", messages.detect(PHOTO), "detector"),
    "segment": Method(f"{VISION}Segment", messages.segment(PHOTO), "segmenter"),
    "forecast": Method("/rafaga.v1.Forecasting/Forecast", messages.forecast([1, 2, 3]), "series"),
    "predict": Method("/rafaga.v1.Sequences/Predict", messages.predict("abcd"), "letters"),
    "infer": Method(INFER, oip.images(DIGIT), "digits"),
    "stream": Method(messages.STREAM, oip.images(DIGIT), "digits"),
    "classify files": Method(f"{VISION}Classify", messages.classify_files(DIGIT_FILE), "digits", files=True),
    "features of files": Method(f"{VISION}ExtractFeatures", messages.features_files(FILE), "backbone", files=True),
    "detect in files": Method(f"{VISION}Detect", messages.detect_files(FILE), "detector", files=True),
    "segment files": Method(f"{VISION}Segment", messages.segment_files(FILE), "segmenter", files=True),
    "infer files": Method(INFER, oip.files(DIGIT_FILE), "digits", files=True),
    "stream files": Method(messages.STREAM, oip.files(DIGIT_FILE), "digits", files=True),
    "model": Method("/rafaga.v1.Catalog/GetModel", catalog_pb2.GetModelRequest(name="digits")),
    "models": Method("/rafaga.v1.Catalog/ListModels", catalog_pb2.ListModelsRequest()),
    "live": Method(f"{messages.OPEN}ServerLive", pb.ServerLiveRequest()),
    "ready": Method(f"{messages.OPEN}ServerReady", pb.ServerReadyRequest()),
    "server": Method(f"{messages.OPEN}ServerMetadata", pb.ServerMetadataRequest()),
    "model ready": Method(f"{messages.OPEN}ModelReady", pb.ModelReadyRequest(name="digits")),
    "metadata": Method(f"{messages.OPEN}ModelMetadata", pb.ModelMetadataRequest(name="digits")),
    "config": Method(f"{messages.OPEN}ModelConfig", pb.ModelConfigRequest(name="digits")),
    "statistics": Method(f"{messages.OPEN}ModelStatistics", pb.ModelStatisticsRequest(name="plain")),
    "index": Method(f"{messages.OPEN}RepositoryIndex", pb.RepositoryIndexRequest()),
}


def every(chosen: Callable[[Method], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", [pytest.param(m, id=name) for name, m in METHODS.items() if chosen(m)])


every_method = every(lambda method: True)
# Once an image is decoded, it goes the way of pixels.
every_that_computes = every(lambda method: bool(method.model) and not method.files)
every_that_decodes = every(lambda method: method.files)
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
        self.call: Any
        if method.stream:
            self.call = served.channel.stream_stream(method.path)(iter([content]), timeout=timeout)
        else:
            self.call = served.channel.unary_unary(method.path).future(content, timeout=timeout)

    def answer(self) -> Message:
        """Without the fields that differ between calls."""
        content = next(self.call) if self._method.stream else self.call.result(PATIENCE_S)
        _, kind = messages.METHODS[self._method.path]
        reply = kind.FromString(content)
        for passing in {"timing", "model_stats"} & set(reply.DESCRIPTOR.fields_by_name):
            reply.ClearField(passing)
        return reply

    def go_away(self) -> None:
        """Returns once the call has ended as it should."""
        if self._end == "cancel":
            self.call.cancel()
        expected = {"deadline": grpc.StatusCode.DEADLINE_EXCEEDED, "cancel": grpc.StatusCode.CANCELLED}[self._end]
        assert self.call.code() is expected


def in_flight(served: Served) -> int:
    """Read hundreds of times, so without a scrape of all metrics."""
    return served.server.router.in_flight.count


def assert_serves(served: Served, method: Method) -> None:
    """No call is left, and the same request gets the same answer twice."""
    eventually(lambda: in_flight(served) == 0, "every call ended")
    assert Asked(served, method).answer() == Asked(served, method).answer()
    eventually(lambda: in_flight(served) == 0, "these too")


def test_the_list_of_methods_is_complete(standing: tuple[Served, Valve]) -> None:
    served, _ = standing
    paths = {method.path for method in METHODS.values()}
    assert paths == {*served.server.router.methods, messages.STREAM} == messages.METHODS.keys()


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
    assert valve.runs == [1] * len(before)
    assert_serves(served, method)


@every_method
def test_calls_that_are_cancelled_at_once_or_after_their_answer(standing: tuple[Served, Valve], method: Method) -> None:
    served, _ = standing
    calls = [Asked(served, method, "cancel") for _ in range(20)]
    answered = Asked(served, method)
    assert answered.answer() == Asked(served, method).answer()
    for each in (*calls, answered):
        each.call.cancel()
    assert_serves(served, method)


@either_end
@every_that_computes
def test_in_the_queue(standing: tuple[Served, Valve], method: Method, end: str) -> None:
    """1. The engine is busy. 2. A call queues and ends. 3. It is never computed; the one before it is answered."""
    served, valve = standing
    cause = {"model": method.model, "cause": "cancelled" if end == "cancel" else "deadline"}
    before = served.metric("rafaga_dropped_total", **cause)
    with valve.closed():
        first = Asked(served, method)
        valve.wait_for_engine()
        late = Asked(served, method, end)
        if end == "cancel":
            wait_for_queue(served, method.model, 1)
        late.go_away()
        eventually(lambda: in_flight(served) == 1, "only the first is in flight")
        wait_for_queue(served, method.model, 0)
    assert first.answer()
    eventually(lambda: in_flight(served) == 0, "the first ended too")
    assert valve.runs == [1]
    dropped = served.metric("rafaga_dropped_total", **cause) - before
    assert dropped == 1 or (dropped == 0 and end == "deadline"), "on a busy machine it may have come too late to queue"
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
