"""The error for a caller whose input alone made a run fail."""

from __future__ import annotations

import re

from rafaga.errors import RafagaError, RejectedByModel, RequestTooLarge
from rafaga.server.engines.providers import device_failed, out_of_memory

_MOST_CHARACTERS = 300

# Replaced in the runtime's message, in this order. What is left is the operator and the reason, such as
# "Gather: indices element out of data bounds, idx=7 must be within the inclusive range [-3,2]".
_REPLACED = (
    # OpenVINO: places in its source, its checks, and the node.
    (re.compile(r"Exception from \S+:\d+:|Caught exception:|Check '.*?' failed at \S+:\d+:", re.S), " "),
    (re.compile(r"While validating node '.*?' with friendly_name '.*?':", re.S), " "),
    (re.compile(r"\[CPU\] (\w+) node with name '.*?'|Node \S+ of type (\w+)"), r"\1\2:"),
    # ONNX Runtime.
    (re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : "), ""),
    (re.compile(r"(?:Non-zero status code returned|Exception) while running (\S+) node\. Name:'.*?' "), r"\1: "),
    (re.compile(r"Status Message: "), ""),
    # A place in ONNX Runtime's source, then the function: with its whole signature, or by name alone.
    (re.compile(r"/\S+\.\w+:\d+ [^()]*\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? "), ""),
    (re.compile(r"\b\w+\.(?:cc|h|cu|cuh|hpp|cpp):\d+ \S+ "), ""),
    # A check: its condition is source code, the text after it is for users.
    (re.compile(r"(^|: )[^:]*(?:::[^:]*)* was false\.\s*"), r"\1"),
    # Whatever else may be a path or an address.
    (re.compile(r"(?<!\w)(?:\w:)?[/\\][\w.@+-]+(?:[/\\][\w.@+-]*)+"), "…"),
    (re.compile(r"\b0x[0-9a-fA-F]{5,}\b"), "…"),
    (re.compile(r"\s+"), " "),
)


def rejection(error: Exception) -> RafagaError | None:
    """The error for the caller of a run that held no other caller's rows, on an engine that runs its own sample. None:
    the device or the server is the cause, not the input.

    `error`: what the engine raised. Its words are given without paths and addresses.
    """
    ours = not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime")
    if ours or device_failed(error):
        return None
    if out_of_memory(error):
        return RequestTooLarge("the model ran out of memory on this input: send fewer rows, or smaller ones")
    return RejectedByModel(f"the model fails on this input: {reason(error) or 'no reason is known'}")


def reason(error: Exception) -> str:
    """What a runtime's error says, without paths and addresses."""
    text = str(error)
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    text = text.strip(" :")
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
