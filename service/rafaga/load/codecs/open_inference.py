"""The Open Inference Protocol (KServe v2), of this server and of others: tensors made from the model's own metadata."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import InvalidRequest, Unsupported
from rafaga.inference import open_inference_pb2 as pb
from rafaga.load.codecs.base import Replies, Request, Target, close
from rafaga.load.connection import Ask
from rafaga.load.log import Reply
from rafaga.load.payloads import RANDOM_PAYLOADS, Payload, Payloads, Size
from rafaga.tensors import DATATYPES, with_lengths

_SERVICE = "/inference.GRPCInferenceService"
_INFER = f"{_SERVICE}/ModelInfer"

_DTYPES = {name: dtype for name, dtype in DATATYPES.items() if name != "BYTES"}

# The lengths of random series and of symbol sequences if the metadata gives no limits.
_SERIES_LENGTH = 64
_SYMBOLS_LENGTH = 16

Tensor = pb.ModelMetadataResponse.TensorMetadata
Input = tuple[str, str, Sequence[int], bytes]
"""Name, datatype, shape, contents."""


def target(ask: Ask, model: str, weight: float, payloads: Payloads) -> Target:
    """What is sent to `model`, from its metadata. Raises RafagaError."""
    reply = ask(f"{_SERVICE}/ModelMetadata", pb.ModelMetadataRequest(name=model).SerializeToString())
    metadata = pb.ModelMetadataResponse.FromString(reply)
    requests = tuple(
        Request(_request(model, each.content), each.rows, each.weight, each.drawn)
        for each in _mixed(metadata.inputs, payloads)
    )
    return Target(model, weight, _INFER, requests, Replies.INFER)


def _mixed(tensors: Sequence[Tensor], payloads: Payloads) -> list[Payload[list[Input]]]:
    """The inputs of each request of the mix."""
    first = tensors[0]
    if payloads.images and len(tensors) == 1 and len(first.shape) == 4:
        return [each.holding([_encoded(first, each.content)]) for each in payloads.pictures()]
    if first.datatype == "FP32" and list(first.shape) == [-1, -1]:
        return [Payload(_series(tensors, np.asarray(history, np.float32))) for history in _histories(payloads)]
    rng = np.random.default_rng(payloads.seed)
    if first.datatype == "INT64" and list(first.shape) == [-1, -1]:
        # Indices into an unknown table: 0 is always valid, and 1 nearly always.
        return [Payload(_series(tensors, rng.integers(0, 2, _SYMBOLS_LENGTH))) for _ in range(RANDOM_PAYLOADS)]
    return [each.holding([_random(tensor, each, rng) for tensor in tensors]) for each in payloads.shapes()]


def _encoded(tensor: Tensor, images: Sequence[bytes]) -> Input:
    """Files, which the server decodes: strings in the protocol's framing."""
    return tensor.name, "BYTES", [len(images), 1], with_lengths(images)


def _histories(payloads: Payloads) -> Sequence[Sequence[float] | NDArray[np.float32]]:
    return payloads.series or payloads.histories(_SERIES_LENGTH)


def _series(tensors: Sequence[Tensor], history: NDArray[np.float32 | np.int64]) -> list[Input]:
    """One series, and its length where the model takes one: inputs of forecasters and next-symbol models."""
    inputs: list[Input] = [(tensors[0].name, tensors[0].datatype, [1, len(history)], history.tobytes())]
    for tensor in tensors[1:]:
        if not tensor.datatype.startswith("INT") or list(tensor.shape) not in ([-1], [-1, 1]):
            raise Unsupported(f"input {tensor.name}: expected the length of the series next to {tensors[0].name}")
        length = np.full([1] * len(tensor.shape), len(history), _DTYPES[tensor.datatype])
        inputs.append((tensor.name, tensor.datatype, length.shape, length.tobytes()))
    return inputs


def _random(tensor: Tensor, kind: Payload[Size], rng: np.random.Generator) -> Input:
    if tensor.datatype not in _DTYPES:
        raise Unsupported(f"input {tensor.name}: nothing random to send as {tensor.datatype}; give files with --input")
    dtype = _DTYPES[tensor.datatype]
    shape = list(tensor.shape)
    if shape and shape[0] < 0:
        shape[0] = kind.rows
    for axis, size in ((1, kind.content.height), (2, kind.content.width)) if len(shape) == 4 else ():
        shape[axis] = size if shape[axis] < 0 else shape[axis]
    if min(shape, default=1) < 0:
        raise InvalidRequest(f"input {tensor.name}: {list(tensor.shape)} has free dimensions of unknown size")
    if dtype.kind == "f":
        array = rng.normal(size=shape).astype(dtype)
    elif dtype == np.uint8:
        array = rng.integers(0, 256, shape, dtype)
    else:
        array = rng.integers(0, 2, shape).astype(dtype)  # indices: 0 is always valid, 1 nearly always
    return tensor.name, tensor.datatype, shape, array.tobytes()


def _request(model: str, inputs: Sequence[Input]) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    for name, datatype, shape, contents in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(contents)
    return request.SerializeToString()


class InferReader:
    """Replies of this protocol contain no times; use `--metrics`."""

    def timing(self, reply: bytes) -> Reply:
        return Reply()

    def same(self, reply: bytes, reference: bytes) -> bool:
        return close(self._outputs(reply), self._outputs(reference))

    @staticmethod
    def _outputs(reply: bytes) -> list[NDArray[np.generic]]:
        response = pb.ModelInferResponse.FromString(reply)
        return [
            np.frombuffer(raw, _DTYPES.get(output.datatype, np.uint8))
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]
