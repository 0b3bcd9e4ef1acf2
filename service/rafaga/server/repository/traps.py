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

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from rafaga.errors import BundleError
from rafaga.onnx.model_pb2 import Attribute, Graph, Model, Node, Tensor, Value
from rafaga.server.engines.onnxruntime import session_options
from rafaga.server.repository.onnx_file import INTEGERS, Block, blocks, integers, parse

UNGUARDED = 0

_INT32, _INT64 = 6, 7  # TensorProto.DataType
_KINDS = {"tensor(int32)": _INT32, "tensor(int64)": _INT64}
_FLOATS = frozenset({1, 10, 11, 16})
_OF_INTEGER, _OF_TENSOR = 2, 4  # AttributeProto.AttributeType
_FAIL_ON_EMPTY = frozenset({b"GRU", b"LSTM", b"STFT"})


def fails_on_empty(model: Model) -> bool:
    """Whether inputs without elements may end the process."""
    return any(node.op_type in _FAIL_ON_EMPTY for block in blocks(model) for node in block.nodes)


def kinds_to_guard(model: Model, content: bytes) -> list[int]:
    """For each division that may trap, the type of its elements; UNGUARDED if values of that type do not trap.

    `content`: `model`, serialised. Raises BundleError if ONNX Runtime does not read it.
    """
    suspects = _suspects(model)  # those of the main graph first
    kinds = _kinds_in_graph(model, content, [b.nodes[i].outputs[0] for b, i in suspects if b is model.graph])
    kinds += [UNGUARDED] * (len(suspects) - len(kinds))
    for number, (block, _) in enumerate(suspects):
        if block is not model.graph:  # its type cannot be asked for: the one that fits is found by trial
            for kind in (_INT64, _INT32):
                tried = [*kinds[:number], kind, *kinds[number + 1 :]]
                if _loads(guarded(content, tried)):
                    kinds = tried
                    break
    return kinds


def guarded(content: bytes, kinds: Sequence[int]) -> bytes:
    """The serialised model, without the divisions that trap. `kinds`: see `kinds_to_guard`."""
    if not any(kinds):
        return content
    model = parse(content)
    suspects = _suspects(model)
    # Backwards, so that indices stay valid and inner blocks are changed before the outer ones, which copy them.
    for number, (block, index) in reversed([*enumerate(suspects)]):
        if kinds[number] != UNGUARDED:
            node, *others = block.nodes[index:]
            del block.nodes[index:]
            block.nodes.extend([*_guard(node, kinds[number], f"rafaga.guard.{number}."), *others])
    return model.SerializeToString()


def _suspects(model: Model) -> list[tuple[Block, int]]:
    """The divisions by numbers that are computed or -1: their blocks, outer ones first, and their indices in them."""
    return [
        (block, index)
        for block in blocks(model)
        if (divisions := [index for index, node in enumerate(block.nodes) if _is_division(node)])
        for harmless in [_harmless_constants(block)]
        for index in divisions
        if block.nodes[index].inputs[1] not in harmless
    ]


def _is_division(node: Node) -> bool:
    """Div, and Mod without fmod."""
    if node.op_type not in (b"Div", b"Mod") or node.domain not in (b"", b"ai.onnx"):
        return False
    return len(node.inputs) == 2 and len(node.outputs) == 1 and not any(a.i == 1 for a in node.attributes)


def _harmless_constants(block: Block) -> set[bytes]:
    """The names of constants by which any number can be divided: all integers but -1, and floats."""
    found = {
        output
        for node in block.nodes
        if node.op_type == b"Constant" and any(_harmless(attribute.t) for attribute in node.attributes)
        for output in node.outputs
    }
    if isinstance(block, Graph):
        found |= {tensor.name for tensor in block.initializers if _harmless(tensor)}
    return found


def _harmless(tensor: Tensor) -> bool:
    return tensor.data_type in _FLOATS or (tensor.data_type in INTEGERS and -1 not in integers(tensor))


def _kinds_in_graph(model: Model, content: bytes, results: Sequence[bytes]) -> list[int]:
    """The types of nodes of the main graph: ONNX Runtime infers them for outputs without a type, so each node's result
    is made an output."""
    if not results:
        return []
    given = {output.name for output in model.graph.outputs}
    more = Model(graph=Graph(outputs=[Value(name=name) for name in dict.fromkeys(results) if name not in given]))
    # Messages that are concatenated are merged: the graph gets more outputs.
    types = {tensor.name: tensor.type for tensor in _session(content + more.SerializeToString()).get_outputs()}
    return [_KINDS.get(types[name.decode()], UNGUARDED) for name in results]


def _session(model: bytes) -> ort.InferenceSession:
    """Only to ask about the graph. Raises BundleError."""
    options = session_options(threads=1, spinning=False)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
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


def _guard(node: Node, kind: int, prefix: str) -> list[Node]:
    """The node and those that take care of -1, for elements of `kind`."""
    minus_one, equal, one, two, divisor, quotient, negated = (f"{prefix}{i}".encode() for i in range(7))
    number = Tensor(data_type=kind, raw_data=np.array(-1, INTEGERS[kind]).tobytes())
    constant = Attribute(name=b"value", t=number, type=_OF_TENSOR)
    to = Attribute(name=b"to", i=kind, type=_OF_INTEGER)
    given, result, divides = node.inputs[1], node.outputs[0], node.op_type == b"Div"
    itself = Node()
    itself.CopyFrom(node)
    itself.inputs[1], itself.outputs[0] = divisor, quotient if divides else result
    before = [
        Node(op_type=b"Constant", outputs=[minus_one], attributes=[constant]),
        Node(op_type=b"Equal", inputs=[given, minus_one], outputs=[equal]),
        Node(op_type=b"Cast", inputs=[equal], outputs=[one], attributes=[to]),
        Node(op_type=b"Add", inputs=[one, one], outputs=[two]),
        Node(op_type=b"Add", inputs=[given, two], outputs=[divisor]),
    ]
    after = [
        Node(op_type=b"Mul", inputs=[quotient, two], outputs=[negated]),
        Node(op_type=b"Sub", inputs=[quotient, negated], outputs=[result]),
    ]
    return [*before, itself, *(after if divides else [])]
