"""Open Inference requests from arrays, and arrays from replies."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rafaga.inference import open_inference_pb2 as pb
from rafaga.inference import open_inference_pb2_grpc
from tests.integration.serving import PATIENCE_S, Stubs

DATATYPES = {
    **{f"{kind}{bits}": f"{kind}{bits}".upper() for kind in ("uint", "int") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
    "bool": "BOOL",
}
NUMPY = {datatype: dtype for dtype, datatype in DATATYPES.items()}
CONTENTS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{datatype: f"{datatype.lower()}_contents" for datatype in ("BOOL", "INT64", "UINT64", "FP32", "FP64")},
}


def stub(stubs: Stubs) -> open_inference_pb2_grpc.GRPCInferenceServiceStub:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(stubs.channel)


def parameter(value: bool | int | float | str) -> pb.InferParameter:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    found: dict[str, Any] = {kinds[type(value)]: value}
    return pb.InferParameter(**found)


def parameters(values: Mapping[str, Any]) -> dict[str, pb.InferParameter]:
    return {n: v if isinstance(v, pb.InferParameter) else parameter(v) for n, v in values.items()}


def tensor(name: str, array: np.ndarray) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape)


def request(
    model: str, *, typed: bool = False, given: Mapping[str, Any] | None = None, **arrays: Any
) -> pb.ModelInferRequest:
    """One input per array, raw or typed. `given` are the request's parameters."""
    message = pb.ModelInferRequest(model_name=model, parameters=parameters(given or {}))
    for name, array in arrays.items():
        added = tensor(name, array)
        if typed:
            getattr(added.contents, CONTENTS[added.datatype]).extend(array.ravel().tolist())
        else:
            message.raw_input_contents.append(array.tobytes())
        message.inputs.append(added)
    return message


def images(array: np.ndarray, model: str = "digits", **options: Any) -> pb.ModelInferRequest:
    return request(model, image=array, **options)


def length_prefixed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def files(*encoded: bytes, model: str = "digits", raw: bool = True, column: bool = True) -> pb.ModelInferRequest:
    """Encoded images as a BYTES tensor of shape [N, 1], or [N]."""
    message = pb.ModelInferRequest(model_name=model)
    shape = (len(encoded), 1) if column else (len(encoded),)
    image = message.inputs.add(name="image", datatype="BYTES", shape=shape)
    if raw:
        message.raw_input_contents.append(length_prefixed(*encoded))
    else:
        image.contents.bytes_contents.extend(encoded)
    return message


def asking_for(message: pb.ModelInferRequest, *outputs: str, **given: Any) -> pb.ModelInferRequest:
    """`message` with these requested outputs, each with the parameters `given`."""
    for name in outputs:
        message.outputs.add(name=name, parameters=parameters(given))
    return message


def infer(stubs: Stubs, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return stub(stubs).ModelInfer(message, timeout=PATIENCE_S)


def answer(stubs: Stubs, message: pb.ModelInferRequest) -> dict[str, np.ndarray]:
    return arrays(infer(stubs, message))


def arrays(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    """Every output; those of BYTES as an object array of bytes."""
    assert len(response.raw_output_contents) == len(response.outputs)
    return {
        output.name: _array(output, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _array(output: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> np.ndarray:
    if output.datatype != "BYTES":
        return np.frombuffer(raw, np.dtype(NUMPY[output.datatype]).newbyteorder("<")).reshape(output.shape)
    elements = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        elements.append(raw[4 : 4 + length])
        assert len(elements[-1]) == length
        raw = raw[4 + length :]
    found = np.empty(len(elements), object)
    found[:] = elements
    return found.reshape(output.shape)


def shapes(tensors: Sequence[Any]) -> dict[str, list[int]]:
    return {t.name: list(t.shape) for t in tensors}
