"""The parameters of a ModelInfer request that this server knows; clients may send any others."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rafaga.errors import InvalidRequest, Unsupported
from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import Priority

Parameters = Mapping[str, pb.InferParameter]


def integer(parameters: Parameters, name: str) -> int:
    """0 without the parameter. Raises InvalidRequest."""
    value = _value(parameters, name)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise InvalidRequest(f"parameter {name}: expected an integer of at least 0, got {str(value)[:20]}")
    return value


def timeout(parameters: Parameters) -> float:
    """Seconds, of microseconds; infinity without a timeout. Raises InvalidRequest."""
    return integer(parameters, "timeout") / 1e6 or math.inf


def priority(parameters: Parameters) -> Priority | None:
    """As in Triton: 1 is the highest, 0 the default (None here), values beyond the lowest mean the lowest.

    Raises InvalidRequest.
    """
    level = integer(parameters, "priority")
    return Priority(min(level, Priority.LOW)) if level else None


def refuse_sequences(parameters: Parameters) -> None:
    """Raises Unsupported."""
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if _value(parameters, name):
            raise Unsupported(
                f"models keep no state between requests: send the whole sequence in one request, without {name}"
            )


def _value(parameters: Parameters, name: str) -> object:
    kind = parameters[name].WhichOneof("parameter_choice") if name in parameters else None
    return getattr(parameters[name], kind) if kind else None
