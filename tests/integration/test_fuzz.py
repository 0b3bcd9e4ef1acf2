"""Whatever is asked, the answer is a clean status, the server has counted it, and the next good request is served."""

from __future__ import annotations

import http.client
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from rafaga.inference import open_inference_pb2 as pb
from tests.integration import malformed, messages
from tests.integration.malformed import INFER, UNARY, HttpRequest, Request, Stream
from tests.integration.serving import PATIENCE_S, Refusal, Served, eventually, refusal_of, serving
from tests.integration.test_every_method import METHODS, Asked

NIGHTLY = [pytest.mark.nightly, pytest.mark.timeout(0)]

CLEAN = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # with a `timeout` in the request
}
OK, FAILED = "OK", "failed"
Counts = Counter[tuple[str, str]]


@pytest.fixture(scope="module")
def served(everything: Path) -> Iterator[Served]:
    with serving(everything) as served:
        yield served
        assert served.in_flight == 0


def fuzz(examples: int, drawn: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Lets `check` see so many. The short run is the same every time, the long one another each time."""

    chosen = settings(
        max_examples=examples,
        database=None,
        derandomize=examples <= 1000,
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(drawn)(check))()


def counted(served: Served) -> Counts:
    """How often each method ended with each code, as the server has it."""
    families = text_string_to_metric_families(served.get("/metrics")[1])
    return Counter(
        {
            (sample.labels["method"], sample.labels["code"]): int(sample.value)
            for sample in chain.from_iterable(family.samples for family in families)
            if sample.name == "rafaga_requests_total"
        }
    )


def assert_clean(refused: Refusal) -> None:
    assert refused.code in CLEAN, refused
    assert_tells_nothing(refused.message)


def assert_tells_nothing(message: str) -> None:
    assert 0 < len(message) < 500, message
    assert "/tmp" not in message, message
    assert "Traceback" not in message, message


@pytest.fixture(autouse=True)
def good_answers_stay_as_they_are(served: Served) -> Iterator[None]:
    def answers() -> list[Message]:
        found = [Asked(served, method).answer() for method in METHODS.values()]
        eventually(lambda: served.in_flight == 0, "every call ended")
        return found

    before = answers()
    yield
    assert answers() == before


@pytest.mark.parametrize("examples", [600, pytest.param(100_000, marks=NIGHTLY)])
def test_every_request_gets_a_clean_status_that_is_counted(served: Served, examples: int) -> None:
    stubs = {method: served.channel.unary_unary(method) for method in UNARY}
    statuses, before = Counts(), counted(served)

    def ask(request: Request) -> None:
        method, content, metadata = request
        try:
            messages.METHODS[method][1].FromString(stubs[method](content, metadata=metadata, timeout=PATIENCE_S))
            statuses[method, OK] += 1
        except grpc.RpcError as error:
            refused = refusal_of(error)
            statuses[method, refused.code.name] += 1
            assert_clean(refused)
            assert refused.reason, refused

    fuzz(examples, malformed.requests(), ask)
    assert statuses.total() >= examples
    answered = sum(count for (_, code), count in statuses.items() if code == OK)
    assert examples / 10 < answered < examples * 9 / 10
    eventually(lambda: counted(served) - before == statuses, "the server counted the same")


@pytest.mark.parametrize("examples", [200, pytest.param(20_000, marks=NIGHTLY)])
def test_health_and_reflection_answer_or_refuse(
    served: Served, examples: int, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = Counter[tuple[str, str]]()

    def ask(request: Request) -> None:
        answers = served.channel.stream_stream(request.method)(iter([request.content]), timeout=PATIENCE_S)
        try:
            next(answers)
            statuses[request.method, OK] += 1
        except grpc.RpcError as error:
            refused = refusal_of(error)
            statuses[request.method, refused.code.name] += 1
            assert_clean(refused)
            if refused.code is grpc.StatusCode.INVALID_ARGUMENT:
                assert refused.reason == "INVALID_REQUEST"
        answers.cancel()  # a watch would go on

    fuzz(examples, malformed.public_requests(), ask)
    assert len({method for method, code in statuses if code == OK}) == 3
    assert len({method for method, code in statuses if code == "INVALID_ARGUMENT"}) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("examples", [100, pytest.param(20_000, marks=NIGHTLY)])
def test_every_message_of_a_stream_gets_an_answer_that_is_counted(served: Served, examples: int) -> None:
    infer = served.channel.stream_stream(messages.STREAM)
    statuses, before = Counts(), counted(served)

    def ask(stream: Stream) -> None:
        metadata = (*stream.metadata, ("triton_grpc_error", "true")) if stream.ends else stream.metadata
        answers: list[pb.ModelStreamInferResponse] = []
        try:
            sent = infer(iter(stream.contents), metadata=metadata, timeout=PATIENCE_S)
            answers.extend(pb.ModelStreamInferResponse.FromString(answer) for answer in sent)
        except grpc.RpcError as error:
            assert stream.ends
            refused = refusal_of(error)
            assert_clean(refused)
            assert refused.reason
            statuses[INFER, FAILED] += 1
        else:
            assert len(answers) == len(stream.contents)
        for answer in answers:
            statuses[INFER, FAILED if answer.error_message else OK] += 1
            if answer.error_message:
                assert_tells_nothing(answer.error_message)

    def found() -> Counts:
        new = counted(served) - before
        return Counts({(INFER, OK): new.pop((INFER, OK)), (INFER, FAILED): new.total()})

    fuzz(examples, malformed.streams(), ask)
    assert statuses[INFER, OK]
    assert statuses[INFER, FAILED]
    eventually(lambda: found() == statuses, "the server counted the same")


@pytest.mark.parametrize("examples", [300, pytest.param(100_000, marks=NIGHTLY)])
def test_every_http_request_gets_a_clean_answer_that_is_counted(served: Served, examples: int) -> None:
    statuses, before = Counter[bool](), counted(served)
    connection = http.client.HTTPConnection("127.0.0.1", served.server.http_port, timeout=PATIENCE_S)

    def ask(request: HttpRequest) -> None:
        connection.request("POST", *request)
        with connection.getresponse() as answer:
            body = answer.read()
        statuses[answer.status == 200] += 1
        assert answer.status in {200, 400, 413, 501, 504}, body
        if answer.status != 200:
            assert_tells_nothing(json.loads(body)["error"])

    fuzz(examples, malformed.http_requests(), ask)
    connection.close()
    assert min(statuses[True], statuses[False]) > examples / 10
    eventually(lambda: (counted(served) - before).total() == statuses.total(), "the server counted as many")
