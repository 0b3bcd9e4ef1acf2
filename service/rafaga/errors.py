"""All errors, for server and client alike.

The server raises these; the one table below turns them into gRPC statuses; the client turns the status back into the
same class. Messages say what was expected, what came and what to do, and never name files, addresses or other callers.

    RafagaError
    ├── InvalidRequest          INVALID_ARGUMENT     the request contradicts itself or the model
    │   ├── InvalidTensor                            dtype, shape, size or values
    │   ├── InvalidImage                             not decodable, or over the pixel limit
    │   └── RejectedByModel                          the model fails on this input, and runs others
    │       └── NonFiniteOutput                      it answers this input with NaN or infinity
    ├── RequestTooLarge         RESOURCE_EXHAUSTED   over the size limit, or the model lacks the memory for it
    ├── ModelNotFound           NOT_FOUND
    ├── Unsupported             UNIMPLEMENTED        the model or the server does not do this
    ├── Unauthenticated         UNAUTHENTICATED
    ├── Refused                                      nothing was computed; `retry_after_s` says when to try again
    │   ├── QueueFull           RESOURCE_EXHAUSTED   would wait longer than the queue's bound
    │   ├── DeadlineUnreachable DEADLINE_EXCEEDED    would finish after the caller's deadline
    │   ├── Draining            UNAVAILABLE          the server is stopping: ask another replica
    │   └── ModelNotReady       UNAVAILABLE          loading, failed to load, or its engine is down
    ├── DeadlineExceeded        DEADLINE_EXCEEDED    the time ran out
    ├── Cancelled               CANCELLED            the caller went away
    ├── ServerUnreachable       UNAVAILABLE          no connection (client only)
    ├── EngineFailure           INTERNAL             the engine was lost or failed while it ran this input
    └── InternalError           INTERNAL             a bug in the server; its log has the cause

`BundleError`, for bundles that must not be served, is separate: it is raised at load, never for a request. Its
subclasses are `DeviceError`, for a device that cannot be used, and `DeviceMemoryError`, for a GPU without enough memory
for a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf import message as protobuf_message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "rafaga"
MAX_MESSAGE_BYTES = 1024
"""Of a message on the wire, in UTF-8. It travels twice, percent-encoded and in base64, and both encodings together must
stay below gRPC's limit of 8 KiB for all metadata of a call."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"


class RafagaError(Exception):
    """Base of all errors of a request.

    Class attributes: `code`, the gRPC status; `reason`, the machine-readable reason that travels with it
    (google.rpc.ErrorInfo).
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(RafagaError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class InvalidTensor(InvalidRequest):
    reason = "INVALID_TENSOR"


class InvalidImage(InvalidRequest):
    reason = "INVALID_IMAGE"


class RejectedByModel(InvalidRequest):
    reason = "REJECTED_BY_MODEL"


class NonFiniteOutput(RejectedByModel):
    reason = "NON_FINITE_OUTPUT"


class RequestTooLarge(RafagaError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "REQUEST_TOO_LARGE"


class ModelNotFound(RafagaError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class Unsupported(RafagaError):
    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNSUPPORTED"


class Unauthenticated(RafagaError):
    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class Refused(RafagaError):
    """Refused before any work was done. `retry_after_s`: seconds after which a new try makes sense, or None."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "REFUSED"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class DeadlineUnreachable(Refused):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_UNREACHABLE"


class Draining(Refused):
    reason = "DRAINING"


class ModelNotReady(Refused):
    reason = "MODEL_NOT_READY"


class DeadlineExceeded(RafagaError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class Cancelled(RafagaError):
    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class ServerUnreachable(RafagaError):
    code = grpc.StatusCode.UNAVAILABLE
    reason = "SERVER_UNREACHABLE"


class EngineFailure(RafagaError):
    code = grpc.StatusCode.INTERNAL
    reason = "ENGINE_FAILURE"


class InternalError(RafagaError):
    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


class BundleError(Exception):
    """A bundle that must not be served: a missing or changed file, a wrong schema, answers that differ from golden."""


class DeviceError(BundleError):
    """A device that cannot be used: no driver, a library missing, or a model that it does not run."""


class DeviceMemoryError(DeviceError):
    """A model that does not fit into the free memory of a GPU, or into its own limit."""


class Status(NamedTuple):
    """A gRPC status ready for the wire."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def _subclasses(cls: type[RafagaError]) -> Iterable[type[RafagaError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _subclasses(sub)


_BY_REASON: dict[str, type[RafagaError]] = {cls.reason: cls for cls in _subclasses(RafagaError)}

# Errors for a status without a reason of this project: it came from gRPC itself or from a proxy.
_BY_CODE: dict[grpc.StatusCode, type[RafagaError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    # A caller that cancels never reads a status: this one comes from a server that was closing.
    grpc.StatusCode.CANCELLED: ServerUnreachable,
    grpc.StatusCode.UNAVAILABLE: ServerUnreachable,
    grpc.StatusCode.INTERNAL: InternalError,
}


def listed(items: Iterable[object], most_characters: int = 400) -> str:
    """`items` separated by commas; after `most_characters` only how many are left: "a, b, … and 7 more"."""
    texts = [str(item) for item in items]
    shown, length = 0, 0
    while shown < len(texts) and length + len(texts[shown]) <= most_characters:
        length += len(texts[shown]) + 2
        shown += 1
    left = len(texts) - shown
    return ", ".join([*texts[:shown], f"… and {left} more"] if left else texts)


def quoted(name: str, most_characters: int = 130) -> str:
    """A name from a request, as an error shows it: escaped, and cut where it cannot be a valid one."""
    text = repr(name)
    return text if len(text) <= most_characters else text[: most_characters - 1] + "…"


def to_status(error: RafagaError) -> Status:
    """The gRPC status of `error`, with google.rpc.ErrorInfo, and RetryInfo and pushback where a retry makes sense.

    The message is cut to MAX_MESSAGE_BYTES.
    """
    message = _capped(error.message)
    details = status_pb2.Status(code=error.code.value[0], message=message)
    details.details.append(_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)))
    trailing: list[tuple[str, str | bytes]] = []
    if isinstance(error, Refused) and error.retry_after_s is not None:
        # Rounded up: a caller that retries a fraction too early would be refused again.
        milliseconds = math.ceil(error.retry_after_s * 1000)
        delay = duration_pb2.Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
        details.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        trailing.append((PUSHBACK_KEY, str(milliseconds)))
    trailing.append((STATUS_DETAILS_KEY, details.SerializeToString()))
    return Status(error.code, message, tuple(trailing))


def from_status(
    code: grpc.StatusCode, message: str, trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
) -> RafagaError:
    """The error that a client raises for a gRPC status."""
    reason, retry_after_s = None, None
    pushback_s = None
    for key, value in trailing_metadata:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            reason, retry_after_s = _read_details(value)
        elif key == PUSHBACK_KEY:
            pushback_s = _read_pushback(value)
    # Sent twice, because some proxies drop the details; the value in them is not rounded.
    retry_after_s = pushback_s if retry_after_s is None else retry_after_s
    cls = _BY_REASON.get(reason) if reason else None
    cls = cls or _BY_CODE.get(code, RafagaError)
    if reason is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        cls = RequestTooLarge  # gRPC's own limit: trying again would not help
    if issubclass(cls, Refused):
        return cls(message, retry_after_s)
    return cls(message)


def _capped(message: str) -> str:
    data = message.encode(errors="replace")  # a lone surrogate cannot be sent
    if len(data) <= MAX_MESSAGE_BYTES:
        return data.decode()
    return data[: MAX_MESSAGE_BYTES - len("…".encode())].decode(errors="ignore") + "…"


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _read_pushback(value: str | bytes) -> float:
    """Seconds. By gRPC's rules (A6), a negative or malformed value means never."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return int(text) / 1000 if text.isdecimal() else math.inf


def _read_details(raw: bytes) -> tuple[str | None, float | None]:
    reason, retry_after_s = None, None
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    except protobuf_message.DecodeError:  # rewritten by a proxy; the status code is still valid
        return None, None
    return reason, retry_after_s
