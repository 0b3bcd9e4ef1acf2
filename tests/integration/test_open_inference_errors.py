"""A bad Open Inference request gets one clear status that says what was expected. Other requests are not affected."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from rafaga.inference import open_inference_pb2 as pb
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.open_inference import INVALID, NOT_FOUND, UNIMPLEMENTED
from tests.integration.serving import PATIENCE_S, Served, refusal, wait_for_queue
from tests.integration.valve import Valve

DIGIT = messages.random_digits(0)
PNG = messages.png(DIGIT[0, :, :, 0])
HISTORY = messages.random_history(0, 12)[np.newaxis]
SERVICE = "/inference.GRPCInferenceService/"


class Bad(NamedTuple):
    """A request, and the code, the reason and a part of the message that it must get."""

    request: pb.ModelInferRequest
    code: grpc.StatusCode
    reason: str
    says: str


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


TENSOR, REQUEST, IMAGE = "INVALID_TENSOR", "INVALID_REQUEST", "INVALID_IMAGE"

BAD: dict[str, Bad] = {
    # names
    "unknown model": Bad(oip.images(DIGIT, "nobody"), NOT_FOUND, "MODEL_NOT_FOUND", "available: backbone, digits"),
    "no model": Bad(oip.images(DIGIT, ""), NOT_FOUND, "MODEL_NOT_FOUND", "no model ''"),
    "path as model": Bad(oip.images(DIGIT, "../digits"), NOT_FOUND, "MODEL_NOT_FOUND", "available"),
    "endless model name": Bad(oip.images(DIGIT, "x" * 9999), NOT_FOUND, "MODEL_NOT_FOUND", "no model 'xxx"),
    "unknown version": Bad(version("2"), NOT_FOUND, "MODEL_NOT_FOUND", "available: 1"),
    "version zero": Bad(version("0"), NOT_FOUND, "MODEL_NOT_FOUND", "no version '0'"),
    "negative version": Bad(version("-1"), NOT_FOUND, "MODEL_NOT_FOUND", "an integer ≥ 1"),
    "version in words": Bad(version("latest"), NOT_FOUND, "MODEL_NOT_FOUND", "no version 'latest'"),
    "version with a dot": Bad(version("1.0"), NOT_FOUND, "MODEL_NOT_FOUND", "no version '1.0'"),
    "huge version": Bad(version("9" * 99), NOT_FOUND, "MODEL_NOT_FOUND", "no version '99999999999999999999'"),
    "version in other digits": Bad(version("١"), NOT_FOUND, "MODEL_NOT_FOUND", "no version"),
    # inputs
    "no inputs": Bad(pb.ModelInferRequest(model_name="digits"), INVALID, TENSOR, "expected the inputs image; got none"),
    "another input": Bad(oip.request("digits", picture=DIGIT), INVALID, TENSOR, "inputs image; got picture"),
    "one input too many": Bad(oip.request("digits", image=DIGIT, mask=DIGIT), INVALID, TENSOR, "got image, mask"),
    "an input twice": Bad(
        pb.ModelInferRequest(
            model_name="digits",
            inputs=[oip.tensor("image", DIGIT)] * 2,
            raw_input_contents=[DIGIT.tobytes()] * 2,
        ),
        INVALID,
        TENSOR,
        "got image, image",
    ),
    "lengths without a history": Bad(
        oip.request("series", length=np.array([3], np.int64)), INVALID, TENSOR, "inputs history, length; got length"
    ),
    # datatypes
    "float32 pixels": Bad(oip.images(DIGIT.astype(np.float32)), INVALID, TENSOR, "datatype UINT8, got 'FP32'"),
    "int8 pixels": Bad(oip.images(DIGIT.view(np.int8)), INVALID, TENSOR, "datatype UINT8, got 'INT8'"),
    "float64 history": Bad(
        oip.request("series", history=HISTORY.astype(np.float64)), INVALID, TENSOR, "datatype FP32, got 'FP64'"
    ),
    "float16 history": Bad(
        oip.request("series", history=HISTORY.astype(np.float16)), INVALID, TENSOR, "datatype FP32, got 'FP16'"
    ),
    "int32 lengths": Bad(
        series(length=np.array([3], np.int32)), INVALID, TENSOR, "input length: expected datatype INT64, got 'INT32'"
    ),
    "no datatype": Bad(changed(oip.images(DIGIT), datatype=None), INVALID, TENSOR, "UINT8, got ''"),
    "numpy's datatype": Bad(changed(oip.images(DIGIT), datatype="uint8"), INVALID, TENSOR, "UINT8, got 'uint8'"),
    "BF16": Bad(changed(oip.images(DIGIT), datatype="BF16"), INVALID, TENSOR, "UINT8, got 'BF16'"),
    "BYTES history": Bad(changed(series(), datatype="BYTES"), INVALID, TENSOR, "datatype FP32, got 'BYTES'"),
    # shapes and sizes
    "wrong height": Bad(oip.images(DIGIT[:, 1:]), INVALID, TENSOR, "[N, 28, 28, 1], got [1, 27, 28, 1]"),
    "no batch dimension": Bad(oip.images(DIGIT[0]), INVALID, TENSOR, "got [28, 28, 1]"),
    "no shape": Bad(with_shape(oip.images(DIGIT)), INVALID, TENSOR, "got []"),
    "zero rows": Bad(oip.images(DIGIT[:0]), INVALID, TENSOR, "at least one row, got shape [0, 28, 28, 1]"),
    "zero pixels": Bad(
        oip.images(messages.random_photo(0, 0, 8), "backbone"),
        INVALID,
        TENSOR,
        "at least one pixel, got shape [1, 0, 8, 3]",
    ),
    "a series without observations": Bad(
        series(history=np.zeros((1, 0), np.float32)), INVALID, TENSOR, "expected lengths from 2"
    ),
    "negative rows": Bad(with_shape(oip.images(DIGIT), -1, 28, 28, 1), INVALID, TENSOR, "zero or more, got [-1, 28"),
    "huge rows": Bad(with_shape(oip.images(DIGIT), 2**62, 28, 28, 1), INVALID, TENSOR, "got 784"),
    "too many rows": Bad(oip.images(np.zeros((1025, 28, 28, 1), np.uint8)), INVALID, TENSOR, "got 1025"),
    "too few bytes": Bad(with_raw(oip.images(DIGIT), bytes(783)), INVALID, TENSOR, "expected 784 bytes"),
    "too many bytes": Bad(with_raw(oip.images(DIGIT), bytes(785)), INVALID, TENSOR, "got 785"),
    "no bytes": Bad(with_raw(oip.images(DIGIT), b""), INVALID, TENSOR, "got 0"),
    "no contents": Bad(with_raw(oip.images(DIGIT)), INVALID, TENSOR, "expected 784 elements in uint_contents"),
    "two contents of one input": Bad(
        with_raw(oip.images(DIGIT), DIGIT.tobytes(), b""), INVALID, TENSOR, "1 raw_input_contents, one per input, got 2"
    ),
    "one raw content of two inputs": Bad(
        with_raw(lengths(3), HISTORY.tobytes()), INVALID, TENSOR, "2 raw_input_contents, one per input, got 1"
    ),
    "raw and typed": Bad(typed_and_raw(), INVALID, TENSOR, "either raw_input_contents or contents"),
    "too few typed": Bad(
        with_shape(oip.images(DIGIT, typed=True), 2, 28, 28, 1), INVALID, TENSOR, "expected 1568 elements"
    ),
    "typed in the wrong field": Bad(
        changed(oip.images(DIGIT.astype(np.int32), typed=True), datatype="UINT8"), INVALID, TENSOR, "got 0"
    ),
    "typed pixel over 255": Bad(
        changed(oip.images(DIGIT.astype(np.uint32) + 200, typed=True), datatype="UINT8"),
        INVALID,
        TENSOR,
        "a value does not fit UINT8",
    ),
    "rows that differ": Bad(lengths(3, 4), INVALID, TENSOR, "equally many rows in every input, got [1, 2]"),
    "free size, too large": Bad(
        with_shape(oip.images(messages.random_photo(0, 8, 8), "backbone"), 1, 2**20, 2**20, 3), INVALID, TENSOR, "bytes"
    ),
    # series
    "length beyond the history": Bad(lengths(13), INVALID, TENSOR, "from 2 to 12"),
    "length too short": Bad(lengths(1), INVALID, TENSOR, "got 1 to 1"),
    "negative length": Bad(lengths(-5), INVALID, TENSOR, "got -5"),
    "history too long": Bad(series(history=np.zeros((1, 65), np.float32)), INVALID, TENSOR, "at most 64 observations"),
    "history too short": Bad(series(history=np.zeros((1, 1), np.float32)), INVALID, TENSOR, "from 2 to 1"),
    "NaN": Bad(series(history=np.full((1, 5), np.nan, np.float32)), INVALID, TENSOR, "finite"),
    # encoded images
    "not an image": Bad(oip.files(b"GIF89a" + bytes(99)), INVALID, IMAGE, "JPEG or PNG"),
    "not an image, typed": Bad(oip.files(b"what", raw=False), INVALID, IMAGE, "JPEG or PNG"),
    "truncated image": Bad(
        oip.files(messages.jpeg(messages.random_photo(0, 99, 99)[0])[:2000]), INVALID, IMAGE, "do not decode"
    ),
    "one bad image of two": Bad(oip.files(PNG, b"?"), INVALID, IMAGE, "image 1: "),
    "200-megapixel image": Bad(oip.files(messages.black_png(20_000, 10_000)), INVALID, IMAGE, "50000000 pixels"),
    "free size, too large an image": Bad(
        oip.files(messages.black_png(3000, 3000), model="backbone"), INVALID, IMAGE, "got 3000x3000"
    ),
    "images that decode to too much together": Bad(
        oip.files(*[messages.black_png(2048, 2048)] * 12, model="backbone"), INVALID, IMAGE, "in a request, got more"
    ),
    "images of two sizes": Bad(
        oip.files(messages.black_png(8, 8), messages.black_png(8, 9), model="backbone"), INVALID, IMAGE, "one size"
    ),
    "images as a row": Bad(with_shape(oip.files(PNG, PNG), 1, 2), INVALID, TENSOR, "shape [N, 1], got [1, 2]"),
    "images without a shape": Bad(with_shape(oip.files(PNG)), INVALID, TENSOR, "shape [N, 1], got []"),
    "images fewer than declared": Bad(with_shape(oip.files(PNG), 2, 1), INVALID, TENSOR, "2 elements, got 1"),
    "images more than declared": Bad(with_shape(oip.files(PNG, PNG), 1, 1), INVALID, TENSOR, "1 elements, got 2"),
    "no images": Bad(oip.files(), INVALID, TENSOR, "expected 1 to"),
    "too many images": Bad(oip.files(*[b"x"] * 1025), INVALID, TENSOR, "got 1025"),
    "images under another name": Bad(changed(oip.files(PNG), name="file"), INVALID, TENSOR, "input image, got 'file'"),
    "length cut off": Bad(with_raw(oip.files(PNG), b"\1\0"), INVALID, TENSOR, "four bytes of length"),
    "element cut off": Bad(
        with_raw(oip.files(PNG), oip.length_prefixed(PNG)[:-1]), INVALID, TENSOR, f"{len(PNG)} bytes, got"
    ),
    "element of 4 GiB": Bad(with_raw(oip.files(PNG), b"\xff" * 4), INVALID, TENSOR, "4294967295 bytes, got"),
    "bytes behind the last element": Bad(
        with_raw(oip.files(PNG), oip.length_prefixed(PNG) + b"\0"), INVALID, TENSOR, "four bytes of length"
    ),
    "images raw and typed": Bad(
        with_raw(oip.files(PNG, raw=False), oip.length_prefixed(PNG)), INVALID, TENSOR, "either raw_input_contents"
    ),
    "images with two raw contents": Bad(
        with_raw(oip.files(PNG), oip.length_prefixed(PNG), b""), INVALID, TENSOR, "1 raw_input_contents"
    ),
    # outputs
    "unknown output": Bad(
        oip.asking_for(oip.images(DIGIT), "logits"), INVALID, REQUEST, "no output 'logits'; available: probabilities"
    ),
    "an output twice": Bad(
        oip.asking_for(oip.images(DIGIT), "probabilities", "probabilities"), INVALID, REQUEST, "requested once"
    ),
    "no classes": Bad(classes(0, oip.images(DIGIT)), INVALID, REQUEST, "a count of at least 1"),
    "negative classes": Bad(classes(-1, oip.images(DIGIT)), INVALID, REQUEST, "an integer of at least 0"),
    "classes in words": Bad(classes("3", oip.images(DIGIT)), INVALID, REQUEST, "expected an integer"),
    "classes of a forecast": Bad(classes(1, series(), "quantiles"), INVALID, REQUEST, "shape [N, classes]"),
    # parameters
    "timeout in words": Bad(given(timeout="soon"), INVALID, REQUEST, "timeout: expected an integer"),
    "negative timeout": Bad(given(timeout=-1), INVALID, REQUEST, "timeout: expected an integer of at least 0, got -1"),
    "priority in words": Bad(given(priority="high"), INVALID, REQUEST, "priority: expected an integer"),
    "negative priority": Bad(given(priority=-1), INVALID, REQUEST, "priority: expected an integer of at least 0"),
    "sequence": Bad(given(sequence_id=7), UNIMPLEMENTED, "UNSUPPORTED", "without sequence_id"),
    "sequence of text": Bad(given(sequence_id="chat"), UNIMPLEMENTED, "UNSUPPORTED", "without sequence_id"),
    "start of a sequence": Bad(given(sequence_start=True), UNIMPLEMENTED, "UNSUPPORTED", "without sequence_start"),
    "end of a sequence": Bad(given(sequence_end=True), UNIMPLEMENTED, "UNSUPPORTED", "without sequence_end"),
    "input in shared memory": Bad(in_shared_memory(oip.images(DIGIT)), UNIMPLEMENTED, "UNSUPPORTED", "shared memory"),
    "image in shared memory": Bad(in_shared_memory(oip.files(PNG)), UNIMPLEMENTED, "UNSUPPORTED", "shared memory"),
    "output in shared memory": Bad(into_shared_memory(), UNIMPLEMENTED, "UNSUPPORTED", "shared memory"),
    # engine
    "an input that the model fails on": Bad(
        oip.images(np.full((1, 1, 1, 1), 200, np.uint8), "fragile"),
        INVALID,
        "REJECTED_BY_MODEL",
        "the model fails on this input: Gather: indices element out of data bounds",
    ),
}


def infer(served: Served, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return oip.stub(served).ModelInfer(request, timeout=PATIENCE_S)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_told_what_was_expected(server: Served, bad: Bad) -> None:
    refused = refusal(lambda: infer(server, bad.request))
    assert (refused.code, refused.reason) == (bad.code, bad.reason)
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
    for fields in ({"name": "nobody"}, {"name": "digits", "version": "2"}, {"name": "digits", "version": "newest"}):
        refused = refusal(lambda fields=fields: ask(request_type(**fields)))
        assert (refused.code, refused.reason) == (NOT_FOUND, "MODEL_NOT_FOUND")


@pytest.mark.parametrize(
    "method", ["ModelInfer", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"]
)
def test_bytes_that_do_not_parse_are_an_invalid_request(server: Served, method: str) -> None:
    refused = refusal(lambda: server.channel.unary_unary(SERVICE + method)(b"\xff" * 20, timeout=PATIENCE_S))
    assert (refused.code, refused.reason) == (INVALID, "INVALID_REQUEST")
    assert "expected a serialised inference." in refused.message


@pytest.mark.parametrize(
    "method",
    [
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    ],
)
def test_unsupported_methods_are_unimplemented(server: Served, method: str) -> None:
    refused = refusal(lambda: server.channel.unary_unary(SERVICE + method)(b"", timeout=PATIENCE_S))
    assert refused.code is UNIMPLEMENTED


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(serve: Callable[..., Served]) -> None:
    served = serve(max_request_bytes=10_000)
    refused = refusal(lambda: infer(served, oip.images(messages.random_digits(0, 20))))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = oip.arrays(infer(served, oip.images(DIGIT)))["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(DIGIT), atol=1e-5)


def test_a_timeout_that_cannot_be_met_is_refused_at_once(serve: Callable[..., Served], valve: Valve) -> None:
    """1. The engine is busy and predicted to take a second. 2. A tenth is too short, a minute is enough."""
    served = serve(max_queue_wait_ms=60_000)
    served.predict("digits", 1.0)
    with valve.closed():
        first = oip.stub(served).ModelInfer.future(oip.images(DIGIT))
        valve.wait_for_engine()
        refused = refusal(lambda: infer(served, oip.images(DIGIT, given={"timeout": 100_000})))
        assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE")
        unsigned = pb.InferParameter(uint64_param=60_000_000)
        patient = [
            oip.stub(served).ModelInfer.future(oip.images(DIGIT, given={"timeout": timeout}))
            for timeout in (60_000_000, unsigned, 0)
        ]
        wait_for_queue(served, "digits", len(patient))
    for future in (first, *patient):
        found = oip.arrays(future.result(PATIENCE_S))["probabilities"]
        np.testing.assert_allclose(found, bundles.classify(DIGIT), atol=1e-5)


def test_a_timeout_that_passes_in_the_queue_drops_the_work(serve: Callable[..., Served], valve: Valve) -> None:
    served = serve(max_queue_wait_ms=60_000)
    with valve.closed():
        first = oip.stub(served).ModelInfer.future(oip.images(DIGIT))
        valve.wait_for_engine()
        served.predict("digits", 1e-6)
        late = oip.stub(served).ModelInfer.future(oip.images(messages.random_digits(1, 7), given={"timeout": 300_000}))
        wait_for_queue(served, "digits", 7)
        time.sleep(0.4)
    assert first.result(PATIENCE_S)
    refused = refusal(lambda: late.result(PATIENCE_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert valve.runs == [1]
    (found,) = oip.stub(served).ModelStatistics(pb.ModelStatisticsRequest(name="digits")).model_stats
    assert (found.inference_stats.success.count, found.inference_stats.fail.count) == (1, 1)
