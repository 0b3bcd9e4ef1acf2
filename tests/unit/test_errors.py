"""The error tree: every class survives the wire, and the tree in the docstring is correct."""

from __future__ import annotations

import base64
import inspect
import re

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from rafaga import errors
from rafaga.errors import PUSHBACK_KEY, STATUS_DETAILS_KEY, RafagaError, Refused, from_status, to_status

CLASSES = sorted(
    (cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, RafagaError)),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_comes_back_as_its_own_class(cls: type[RafagaError]) -> None:
    code, message, trailing = to_status(cls("what went wrong"))
    back = from_status(code, message, trailing)
    assert type(back) is cls
    assert back.message == str(back) == "what went wrong"


@pytest.mark.parametrize("letter", ["a", "ñ", "☃", "\ud800"])
@pytest.mark.parametrize("cls", [errors.ModelNotFound, errors.QueueFull])
def test_a_long_message_is_cut_so_that_it_fits_the_metadata(cls: type[RafagaError], letter: str) -> None:
    """gRPC drops a status whose metadata exceeds 8 KiB: the client would see "Stream removed"."""
    status = to_status(cls(10_000 * letter))
    in_header = sum(1 if 32 <= byte < 127 else 3 for byte in status.message.encode())
    in_details = len(base64.b64encode(dict(status.trailing_metadata)[STATUS_DETAILS_KEY]))  # type: ignore[arg-type]
    assert in_header + in_details < 6 * 1024
    assert status.message.startswith(300 * letter if letter != "\ud800" else 300 * "?")
    assert status.message.endswith("…")
    assert from_status(*status).message == status.message


def test_a_long_list_says_how_many_are_left() -> None:
    assert errors.listed(["a", "b"]) == "a, b"
    assert errors.listed([1, 2, 3]) == "1, 2, 3"
    assert errors.listed([]) == ""
    assert errors.listed(["long" * 10] * 200, most_characters=90) == f"{'long' * 10}, {'long' * 10}, … and 198 more"


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z][a-zA-Z]+)(?: +([A-Z_]+)\b)?", line)
        if not match:
            continue
        branches, name, code = match.groups()
        depth = len(branches) // 4
        path[depth:] = [name]
        if depth:
            parents[name] = path[depth - 1]
        if code:
            assert getattr(errors, name).code.name == code
    assert parents == {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not RafagaError}


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if issubclass(cls, Refused)])
def test_a_refusal_may_say_when_to_come_back(cls: type[Refused]) -> None:
    status = to_status(cls("later", retry_after_s=1.2501))
    back = from_status(*status)
    assert isinstance(back, Refused)
    assert back.retry_after_s == pytest.approx(1.251)  # rounded up to whole milliseconds
    assert dict(status.trailing_metadata)[PUSHBACK_KEY] == "1251"
    status = to_status(cls("later"))
    back = from_status(*status)
    assert isinstance(back, Refused)
    assert back.retry_after_s is None
    assert PUSHBACK_KEY not in dict(status.trailing_metadata)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnreachable),
        (grpc.StatusCode.CANCELLED, errors.ServerUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.QueueFull),
        (grpc.StatusCode.INTERNAL, errors.InternalError),
        (grpc.StatusCode.ALREADY_EXISTS, RafagaError),
    ],
)
def test_a_status_of_grpc_itself_is_read_by_its_code(code: grpc.StatusCode, cls: type[RafagaError]) -> None:
    assert type(from_status(code, "from below")) is cls


def test_broken_details_and_those_of_others_are_ignored() -> None:
    foreign = status_pb2.Status()
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="example.com"))
    unknown = status_pb2.Status()
    unknown.details.add().Pack(error_details_pb2.ErrorInfo(reason="OF_A_NEWER_SERVER", domain=errors.DOMAIN))
    for raw in (foreign.SerializeToString(), unknown.SerializeToString(), b"\xff\xff\xff"):
        back = from_status(grpc.StatusCode.NOT_FOUND, "gone", [(STATUS_DETAILS_KEY, raw)])
        assert type(back) is errors.ModelNotFound
