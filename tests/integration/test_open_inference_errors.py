"""A bad Open Inference request gets one clear status that says what was expected. Other requests are not affected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rafaga.inference import open_inference_pb2 as pb
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.open_inference import INVALID, NOT_FOUND, UNIMPLEMENTED
from tests.integration.serving import (
    IMAGE,
    NO_MODEL,
    PATIENCE_S,
    REQUEST,
    TENSOR,
    Bad,
    Served,
    refusal,
)

DIGIT = messages.random_digits(0)
PNG = messages.png(DIGIT[0, :, :, 0])
HISTORY = messages.random_history(0, 12)[np.newaxis]


def changed(request: Any, **fields: Any) -> pb.ModelInferRequest:
    """`request` with other values in its first input; None clears a field."""
    for name, value in fields.items():
        request.inputs[0].ClearField(name)
        if isinstance(value, (tuple, list)):
            getattr(request.inputs[0], name).extend(value)
        elif value is not None:
            setattr(request.inputs[0], name, value)
    return request


def with_raw(request: pb.ModelInferRequest, *raw: bytes) -> pb.ModelInferRequest:
    del request.raw_input_contents[:]
    request.raw_input_contents.extend(raw)
    return request


def with_shape(request: pb.ModelInferRequest, *shape: int) -> pb.ModelInferRequest:
    return changed(request, shape=shape)


def version(text: str) -> pb.ModelInferRequest:
    request = oip.images(DIGIT)
    request.model_version = text
    return request


def given(**parameters: Any) -> pb.ModelInferRequest:
    return oip.images(DIGIT, given=parameters)


def in_shared_memory(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    """As Triton's clients send it: the input names a region and has no contents."""
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 784
    return with_raw(request)


def into_shared_memory() -> pb.ModelInferRequest:
    return oip.asking_for(oip.images(DIGIT), "probabilities", shared_memory_region="region")


def classes(k: Any, request: pb.ModelInferRequest, output: str = "probabilities") -> pb.ModelInferRequest:
    return oip.asking_for(request, output, classification=k)


def typed_and_raw() -> pb.ModelInferRequest:
    request = oip.images(DIGIT, typed=True)
    request.raw_input_contents.append(DIGIT.tobytes())
    return request


def series(**arrays: Any) -> pb.ModelInferRequest:
    return oip.request("series", **({"history": HISTORY} | arrays))


def lengths(*values: int) -> pb.ModelInferRequest:
    return series(length=np.array(values, np.int64))


BAD: dict[str, Bad] = {
    # names
    "unknown model": Bad(oip.images(DIGIT, "unknown"), NO_MODEL, "available: backbone, digits"),
    "unknown version": Bad(version("2"), NO_MODEL, "available: 1"),
    "negative version": Bad(version("-1"), NO_MODEL, "an integer ≥ 1"),
    "version in words": Bad(version("latest"), NO_MODEL, "no version 'latest'"),
    "huge version": Bad(version("9" * 99), NO_MODEL, "no version '99999999999999999999'"),
    # inputs
    "no inputs": Bad(pb.ModelInferRequest(model_name="digits"), TENSOR, "expected the inputs image; got none"),
    "another input": Bad(oip.request("digits", picture=DIGIT), TENSOR, "inputs image; got picture"),
    "an input twice": Bad(
        pb.ModelInferRequest(
            model_name="digits", inputs=[oip.tensor("image", DIGIT)] * 2, raw_input_contents=[DIGIT.tobytes()] * 2
        ),
        TENSOR,
        "got image, image",
    ),
    "lengths without a history": Bad(
        oip.request("series", length=np.array([3], np.int64)), TENSOR, "inputs history, length; got length"
    ),
    # datatypes
    "float32 pixels": Bad(oip.images(DIGIT.astype(np.float32)), TENSOR, "datatype UINT8, got 'FP32'"),
    "float64 history": Bad(
        oip.request("series", history=HISTORY.astype(np.float64)), TENSOR, "datatype FP32, got 'FP64'"
    ),
    "int32 lengths": Bad(
        series(length=np.array([3], np.int32)), TENSOR, "input length: expected datatype INT64, got 'INT32'"
    ),
    "numpy's datatype": Bad(changed(oip.images(DIGIT), datatype="uint8"), TENSOR, "UINT8, got 'uint8'"),
    "BYTES history": Bad(changed(series(), datatype="BYTES"), TENSOR, "datatype FP32, got 'BYTES'"),
    # shapes and sizes
    "wrong height": Bad(oip.images(DIGIT[:, 1:]), TENSOR, "[N, 28, 28, 1], got [1, 27, 28, 1]"),
    "no batch dimension": Bad(oip.images(DIGIT[0]), TENSOR, "got [28, 28, 1]"),
    "zero rows": Bad(oip.images(DIGIT[:0]), TENSOR, "at least one row, got shape [0, 28, 28, 1]"),
    "zero pixels": Bad(
        oip.images(messages.random_photo(0, 0, 8), "backbone"), TENSOR, "at least one pixel, got shape [1, 0, 8, 3]"
    ),
    "a series without observations": Bad(
        series(history=np.zeros((1, 0), np.float32)), TENSOR, "expected lengths from 2"
    ),
    "negative rows": Bad(with_shape(oip.images(DIGIT), -1, 28, 28, 1), TENSOR, "zero or more, got [-1, 28"),
    "huge rows": Bad(with_shape(oip.images(DIGIT), 2**62, 28, 28, 1), TENSOR, "got 784"),
    "too many rows": Bad(oip.images(np.zeros((1025, 28, 28, 1), np.uint8)), TENSOR, "got 1025"),
    "too few bytes": Bad(with_raw(oip.images(DIGIT), bytes(783)), TENSOR, "expected 784 bytes"),
    "no contents": Bad(with_raw(oip.images(DIGIT)), TENSOR, "expected 784 elements in uint_contents"),
    "two contents of one input": Bad(
        with_raw(oip.images(DIGIT), DIGIT.tobytes(), b""), TENSOR, "1 raw_input_contents, one per input, got 2"
    ),
    "one raw content of two inputs": Bad(
        with_raw(lengths(3), HISTORY.tobytes()), TENSOR, "2 raw_input_contents, one per input, got 1"
    ),
    "raw and typed": Bad(typed_and_raw(), TENSOR, "either raw_input_contents or contents"),
    "too few typed": Bad(with_shape(oip.images(DIGIT, typed=True), 2, 28, 28, 1), TENSOR, "expected 1568 elements"),
    "typed in the wrong field": Bad(
        changed(oip.images(DIGIT.astype(np.int32), typed=True), datatype="UINT8"), TENSOR, "got 0"
    ),
    "typed pixel over 255": Bad(
        changed(oip.images(DIGIT.astype(np.uint32) + 200, typed=True), datatype="UINT8"),
        TENSOR,
        "a value does not fit UINT8",
    ),
    "rows that differ": Bad(lengths(3, 4), TENSOR, "equally many rows in every input, got [1, 2]"),
    # series
    "length beyond the history": Bad(lengths(13), TENSOR, "from 2 to 12"),
    "length too short": Bad(lengths(1), TENSOR, "got 1 to 1"),
    "history too long": Bad(series(history=np.zeros((1, 65), np.float32)), TENSOR, "at most 64 observations"),
    "NaN": Bad(series(history=np.full((1, 5), np.nan, np.float32)), TENSOR, "finite"),
    # encoded images
    "not an image": Bad(oip.files(b"GIF89a" + bytes(99)), IMAGE, "JPEG, PNG, WebP, GIF or BMP"),
    "one bad image of two": Bad(oip.files(PNG, b"?"), IMAGE, "image 1: "),
    "images that decode to too much together": Bad(
        oip.files(*[messages.black_png(2048, 2048)] * 12, model="backbone"), IMAGE, "in a request, got more"
    ),
    "images as a row": Bad(with_shape(oip.files(PNG, PNG), 1, 2), TENSOR, "shape [N, 1], got [1, 2]"),
    "images without a shape": Bad(with_shape(oip.files(PNG)), TENSOR, "shape [N, 1], got []"),
    "images fewer than declared": Bad(with_shape(oip.files(PNG), 2, 1), TENSOR, "2 elements, got 1"),
    "images more than declared": Bad(with_shape(oip.files(PNG, PNG), 1, 1), TENSOR, "1 elements, got 2"),
    "no images": Bad(oip.files(), TENSOR, "expected 1 to"),
    "too many images": Bad(oip.files(*[b"x"] * 1025), TENSOR, "got 1025"),
    "images under another name": Bad(changed(oip.files(PNG), name="file"), TENSOR, "input image, got 'file'"),
    "length cut off": Bad(with_raw(oip.files(PNG), b"\1\0"), TENSOR, "four bytes of length"),
    "element cut off": Bad(with_raw(oip.files(PNG), oip.length_prefixed(PNG)[:-1]), TENSOR, f"{len(PNG)} bytes, got"),
    "element of 4 GiB": Bad(with_raw(oip.files(PNG), b"\xff" * 4), TENSOR, "4294967295 bytes, got"),
    "bytes behind the last element": Bad(
        with_raw(oip.files(PNG), oip.length_prefixed(PNG) + b"\0"), TENSOR, "four bytes of length"
    ),
    # outputs
    "unknown output": Bad(
        oip.asking_for(oip.images(DIGIT), "logits"), REQUEST, "no output 'logits'; available: probabilities"
    ),
    "an output twice": Bad(
        oip.asking_for(oip.images(DIGIT), "probabilities", "probabilities"), REQUEST, "requested once"
    ),
    "no classes": Bad(classes(0, oip.images(DIGIT)), REQUEST, "a count of at least 1"),
    "negative classes": Bad(classes(-1, oip.images(DIGIT)), REQUEST, "an integer of at least 0"),
    "classes in words": Bad(classes("3", oip.images(DIGIT)), REQUEST, "expected an integer"),
    "classes of a forecast": Bad(classes(1, series(), "quantiles"), REQUEST, "shape [N, classes]"),
    # parameters
    "timeout in words": Bad(given(timeout="soon"), REQUEST, "timeout: expected an integer"),
    "negative timeout": Bad(given(timeout=-1), REQUEST, "timeout: expected an integer of at least 0, got -1"),
    "priority in words": Bad(given(priority="high"), REQUEST, "priority: expected an integer"),
    "sequence": Bad(given(sequence_id=7), "UNSUPPORTED", "without sequence_id"),
    "input in shared memory": Bad(in_shared_memory(oip.images(DIGIT)), "UNSUPPORTED", "shared memory"),
    "output in shared memory": Bad(into_shared_memory(), "UNSUPPORTED", "shared memory"),
    # engine
    "an input that the model fails on": Bad(
        oip.images(np.full((1, 1, 1, 1), 200, np.uint8), "fragile"),
        "REJECTED_BY_MODEL",
        "the model fails on this input: Gather: indices element out of data bounds",
    ),
}


def infer(served: Served, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return oip.stub(served).ModelInfer(request, timeout=PATIENCE_S)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_the_error_says_what_was_expected(server: Served, bad: Bad) -> None:
    refused = refusal(lambda: infer(server, bad.request))
    code = {"MODEL_NOT_FOUND": NOT_FOUND, "UNSUPPORTED": UNIMPLEMENTED}.get(bad.reason, INVALID)
    assert (refused.code, refused.reason) == (code, bad.reason)
    assert bad.says in refused.message
    found = oip.arrays(infer(server, oip.images(DIGIT)))["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(DIGIT), atol=1e-5)


METHODS: dict[str, type] = {  # ModelReady answers that it is not ready
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
}


@pytest.mark.parametrize(("method", "request_type"), METHODS.items(), ids=METHODS.keys())
def test_every_method_reports_an_unknown_model_or_version(server: Served, method: str, request_type: type) -> None:
    ask = getattr(oip.stub(server), method)
    for fields in ({"name": "unknown"}, {"name": "digits", "version": "2"}, {"name": "digits", "version": "newest"}):
        refused = refusal(lambda fields=fields: ask(request_type(**fields)))
        assert (refused.code, refused.reason) == (NOT_FOUND, "MODEL_NOT_FOUND")
