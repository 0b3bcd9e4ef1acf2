"""The parameters of a ModelInfer request that this server knows; clients may send any others."""

from __future__ import annotations

import math

from rafaga.errors import InvalidRequest, Unsupported
from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import Priority

_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")


def integer(name: str, parameter: pb.InferParameter) -> int:
    """Raises InvalidRequest."""
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidRequest(f"parameter {name}: expected an integer")
    return int(getattr(parameter, kind))


def timeout(request: pb.ModelInferRequest) -> float:
    """Seconds; infinity without a timeout. Raises InvalidRequest."""
    if "timeout" not in request.parameters:
        return math.inf
    microseconds = integer("timeout", request.parameters["timeout"])
    if microseconds < 0:
        raise InvalidRequest(f"timeout: expected microseconds, got {microseconds}")
    return microseconds / 1e6 if microseconds else math.inf


def priority(request: pb.ModelInferRequest) -> Priority | None:
    """As in Triton: 1 is the highest, 0 the default (None here), values beyond the lowest mean the lowest.

    Raises InvalidRequest.
    """
    if "priority" not in request.parameters:
        return None
    level = integer("priority", request.parameters["priority"])
    if level < 0:
        raise InvalidRequest(f"priority: expected 0 (the default) or more, 1 being the highest, got {level}")
    return Priority(min(level, Priority.LOW)) if level else None


def refuse_sequences(request: pb.ModelInferRequest) -> None:
    """Raises Unsupported."""
    for name in _SEQUENCE:
        if name in request.parameters:
            parameter = request.parameters[name]
            kind = parameter.WhichOneof("parameter_choice")
            if kind is not None and getattr(parameter, kind):
                raise Unsupported(
                    f"models keep no state between requests: send the whole sequence in one request, without {name}"
                )
