"""Kernels of ONNX Runtime that end the whole process on some values, seen with 1.31 on the CPU.

- Div, and Mod without fmod, trap on the smallest int32 or int64 divided by -1. (Division by zero is an error of the
  run, and narrower integers do not trap.) So where a divisor is computed, or is -1, the graph is changed: it divides by
  1 in place of -1, and negates the quotient. Every result stays the same.

      d = 2 where the divisor is -1, else 0
      quotient = dividend / (divisor + d)
      result = quotient - d * quotient

- GRU and LSTM abort on inputs without elements, and STFT traps on an empty window: models that have them get none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from rafaga.errors import BundleError
from rafaga.wire import field, fields, spans

_LOG = logging.getLogger(__name__)

Message = bytes | memoryview

# Field numbers of ONNX's messages: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_INPUT, _OUTPUT, _OP_TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7
_GRAPH, _NODE, _INITIALIZER, _GRAPH_OUTPUT = 7, 1, 5, 12
_INT32, _INT64 = 6, 7  # TensorProto.DataType
_DTYPES: dict[int, np.dtype[Any]] = {_INT32: np.dtype("<i4"), _INT64: np.dtype("<i8")}
_KINDS = {"tensor(int32)": _INT32, "tensor(int64)": _INT64}
_FLOATS = frozenset({1, 10, 11, 16})
_FAIL_ON_EMPTY = {"GRU", "LSTM", "STFT"}

# Where nodes occur: for each message, the field numbers and the messages in them.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {_GRAPH: "graph", 25: "function"},
    "graph": {_NODE: "node"},
    "function": {7: "node"},
    "node": {_ATTRIBUTE: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}


class _Node(NamedTuple):
    """number: in the order of the file. nested: in a branch, a loop or a function."""

    number: int
    message: Message
    nested: bool

    def texts(self, number: int) -> list[str]:
        """All values of a field."""
        return _texts(memoryview(self.message), number)


@dataclass
class _Graph:
    """Walks all nodes of a model, and rewrites those for which `edit` gives others."""

    edit: Callable[[_Node], Sequence[bytes]]
    count: int = 0

    def walked(self, message: Message, kind: str = "model", depth: int = 0) -> Message:
        parts: list[Message] = []
        changed = False
        for number, value, raw in spans(memoryview(message)):
            inside = _INSIDE[kind].get(number)
            if inside is None or not isinstance(value, memoryview):
                parts.append(raw)
                continue
            new: Message = self.walked(value, inside, depth + (inside in ("graph", "function")))
            others: Sequence[bytes] = ()
            if inside == "node":
                others = self.edit(_Node(self.count, new, depth > 1 or kind == "function"))
                self.count += 1
            if others or new is not value:
                changed = True
                parts += [field(number, each) for each in others or (bytes(new),)]
            else:
                parts.append(raw)
        return b"".join(parts) if changed else message


def fails_on_empty(model: bytes) -> bool:
    """Whether inputs without elements may end the process."""
    return any(set(node.texts(_OP_TYPE)) & _FAIL_ON_EMPTY for node in _nodes(model))


def guard_division(model: bytes) -> bytes:
    """`model`, a serialised ModelProto, without divisions that trap; itself where it has none.

    Raises BundleError if ONNX Runtime does not read it.
    """
    nodes = _nodes(model)
    divisions = [node for node in nodes if _is_division(node)]
    harmless = _harmless_constants(model, nodes) if divisions else set()
    suspects = [node for node in divisions if node.texts(_INPUT)[-1] not in harmless]
    if not suspects:
        return model
    kinds = _kinds(model, [node for node in suspects if not node.nested])
    for node in suspects:
        if node.nested:  # its type cannot be asked for: the one that fits is found by trial
            for kind in (_INT64, _INT32):
                if _loads(_guarded(model, kinds | {node.number: kind})):
                    kinds[node.number] = kind
                    break
    if kinds:
        _LOG.info("%d integer divisions of the graph are guarded against overflow", len(kinds))
    return _guarded(model, kinds)


def _nodes(model: bytes) -> list[_Node]:
    """All nodes. Raises BundleError."""
    found: list[_Node] = []

    def collect(node: _Node) -> Sequence[bytes]:
        found.append(node)
        return ()

    try:
        _Graph(collect).walked(model)
    except (IndexError, ValueError):
        raise BundleError("the file is not an ONNX model") from None
    return found


def _harmless_constants(model: bytes, nodes: Sequence[_Node]) -> set[str]:
    """The names of constants by which any number can be divided: all integers but -1, and floats."""
    found: set[str] = set()
    for node in nodes:
        if node.texts(_OP_TYPE) == ["Constant"]:
            attributes = _messages(memoryview(node.message), _ATTRIBUTE)
            if any(_harmless(tensor) for attribute in attributes for tensor in _messages(attribute, 5)):
                found.update(node.texts(_OUTPUT))
    for graph in _messages(memoryview(model), _GRAPH):
        found.update(name for t in _messages(graph, _INITIALIZER) if _harmless(t) for name in _texts(t, 8))
    return found


def _messages(message: memoryview, number: int) -> list[memoryview]:
    return [value for n, value in fields(message) if n == number and isinstance(value, memoryview)]


def _texts(message: memoryview, number: int) -> list[str]:
    return [bytes(value).decode() for value in _messages(message, number) if value]


def _harmless(tensor: memoryview) -> bool:
    kind, values = 0, np.empty(0, np.int64)
    for number, value in fields(tensor):
        if number == 2 and isinstance(value, int):
            kind = value
        elif number == 9 and isinstance(value, memoryview) and kind in _DTYPES:
            values = np.frombuffer(value, _DTYPES[kind])
        elif number in (5, 7) and kind in _DTYPES:  # numbers in another form, which exporters hardly use
            return False
    return kind in _FLOATS or (kind in _DTYPES and -1 not in values)


def _is_division(node: _Node) -> bool:
    """Div, and Mod without fmod."""
    if node.texts(_OP_TYPE) not in (["Div"], ["Mod"]) or node.texts(_DOMAIN) not in ([], ["ai.onnx"]):
        return False
    attributes = _messages(memoryview(node.message), _ATTRIBUTE)
    fmod = any((n, value) == (3, 1) for attribute in attributes for n, value in fields(attribute))
    return not fmod and len(node.texts(_INPUT)) == 2


def _kinds(model: bytes, nodes: Sequence[_Node]) -> dict[int, int]:
    """The types of nodes of the main graph that are int32 or int64, by the number of the node: ONNX Runtime infers them
    for outputs without a type, so each node's result is made an output."""
    if not nodes:
        return {}
    results = {node.number: node.texts(_OUTPUT)[0] for node in nodes}
    graphs = _messages(memoryview(model), _GRAPH)
    given = {name for graph in graphs for output in _messages(graph, _GRAPH_OUTPUT) for name in _texts(output, 1)}
    more = b"".join(field(_GRAPH_OUTPUT, field(1, name.encode())) for name in set(results.values()) - given)
    # Messages that are concatenated are merged: the graph gets more outputs.
    types = {tensor.name: tensor.type for tensor in _session(model + field(_GRAPH, more)).get_outputs()}
    return {number: _KINDS[types[name]] for number, name in results.items() if types[name] in _KINDS}


def _session(model: bytes) -> ort.InferenceSession:
    """Only to ask about the graph. Raises BundleError."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise BundleError(f"ONNX Runtime does not run the model: {error}") from None


def _loads(model: bytes) -> bool:
    try:
        _session(model)
    except BundleError:
        return False
    return True


def _guarded(model: bytes, kinds: Mapping[int, int]) -> bytes:
    def edit(node: _Node) -> Sequence[bytes]:
        return _guard(node, kinds[node.number]) if node.number in kinds else ()

    return bytes(_Graph(edit).walked(model))


def _guard(node: _Node, kind: int) -> list[bytes]:
    """The node and those that take care of -1, for elements of `kind`."""
    prefix = f"rafaga.guard.{node.number}."
    minus_one, equal, one, two, divisor, quotient, negated = (prefix + str(i) for i in range(7))
    number = bytes([0x10, kind]) + field(9, np.array(-1, _DTYPES[kind]).tobytes())
    constant = field(1, b"value") + field(5, number) + b"\xa0\x01\x04"  # an AttributeProto of type TENSOR
    to = field(1, b"to") + bytes([0x18, kind]) + b"\xa0\x01\x02"  # of type INT
    _, given = node.texts(_INPUT)
    (result,) = node.texts(_OUTPUT)
    divides = node.texts(_OP_TYPE) == ["Div"]
    before = [
        _made("Constant", (), minus_one, constant),
        _made("Equal", (given, minus_one), equal),
        _made("Cast", (equal,), one, to),
        _made("Add", (one, one), two),
        _made("Add", (given, two), divisor),
    ]
    kept = b"".join(raw for n, _, raw in spans(memoryview(node.message)) if n not in (_INPUT, _OUTPUT))
    operands = node.texts(_INPUT)[0], divisor
    itself = _names(operands, quotient if divides else result) + kept
    after = [_made("Mul", (quotient, two), negated), _made("Sub", (quotient, negated), result)] if divides else []
    return [*before, itself, *after]


def _made(operator: str, inputs: Sequence[str], output: str, attribute: bytes = b"") -> bytes:
    about = field(_ATTRIBUTE, attribute) if attribute else b""
    return _names(inputs, output) + field(_OP_TYPE, operator.encode()) + about


def _names(inputs: Sequence[str], output: str) -> bytes:
    return b"".join(field(_INPUT, name.encode()) for name in inputs) + field(_OUTPUT, output.encode())
