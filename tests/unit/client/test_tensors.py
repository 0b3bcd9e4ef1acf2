"""Raw tensors: what is converted and what is refused before it is sent, and what replies mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rafaga import InternalError, InvalidRequest, InvalidTensor, ModelDescription, ModelState, TensorDescription
from rafaga.client import _calls
from rafaga.client._tensors import Inference, joined
from rafaga.inference import open_inference_pb2 as pb

pd = pytest.importorskip("pandas")


def described(max_batch_size: int = 4, **inputs: str) -> ModelDescription:
    """A model whose inputs have these dtypes."""
    tensors = tuple(TensorDescription(name, dtype, (None,)) for name, dtype in inputs.items())
    text: tuple[Any, ...] = ("", "", "", "", True, "", "", "", tensors, (), (), max_batch_size, None, "", None, None)
    return ModelDescription("m", 1, ModelState.READY, *text)


def asked(model: ModelDescription, outputs: Sequence[str] = (), version: int | None = None, **inputs: Any) -> Inference:
    return Inference(inputs, outputs, version, model)


def sent(inference: Inference) -> pb.ModelInferRequest:
    return pb.ModelInferRequest.FromString(inference.whole().request)


@pytest.mark.parametrize(
    ("dtype", "given", "datatype"),
    [
        ("float32", [[1, 2.5]], "FP32"),
        ("float32", np.array([[1, 2.5]]), "FP32"),
        ("float32", np.array([[1, 2.5]], ">f4"), "FP32"),
        ("float16", [[1, 2.5]], "FP16"),
        ("float32", [[True, False]], "FP32"),
        ("int64", np.array([[1, 2]], np.int8), "INT64"),
        ("int32", [[1.0, 2.0]], "INT32"),
        ("bool", [[1, 0]], "BOOL"),
        ("uint8", np.array([[3, 255]], np.uint8), "UINT8"),
        ("float32", pd.DataFrame({"a": [1], "b": [2.5]}), "FP32"),
    ],
)
def test_numbers_become_those_of_the_model(dtype: str, given: Any, datatype: str) -> None:
    request = sent(asked(described(x=dtype), x=given))
    assert (request.inputs[0].datatype, list(request.inputs[0].shape)) == (datatype, [1, 2])
    assert request.raw_input_contents[0] == np.asarray(given).astype(np.dtype(dtype).newbyteorder("<")).tobytes()


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        *(("int64", given) for given in ([1.5], [float("nan")], np.array(["2020-01-01"], "M8[D]"))),
        *(("uint8", given) for given in ([256], [-1])),
        *(("float32", given) for given in ([1e300], [1j], [[1], [2, 3]], [None])),
        *(("string", given) for given in (["a", 1.0, None], pd.DataFrame({"a": [1], "b": ["x"]}))),
        ("bool", [2]),
    ],
)
def test_what_would_lose_its_value_is_refused(dtype: str, given: Any) -> None:
    with pytest.raises(InvalidTensor, match="input x: "):
        asked(described(x=dtype), x=given)


def test_a_name_that_the_model_lacks_is_the_servers_to_refuse() -> None:
    assert sent(asked(described(x="float32"), y=[1])).inputs[0].datatype == "INT64"
    with pytest.raises(InvalidTensor, match="complex128 cannot be sent"):
        asked(described(x="float32"), y=[1j])


@pytest.mark.parametrize("inputs", [{}, [1.0], np.ones(3), pd.DataFrame({"x": [1]})])
def test_inputs_are_named(inputs: Any) -> None:
    with pytest.raises(InvalidRequest, match="a dictionary of arrays; the model's inputs are 'x', 'y'"):
        Inference(inputs, (), None, described(x="float32", y="int64"))


def test_messages_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rafaga.client._tensors.MAX_MESSAGE_BYTES", 10)
    for one in (np.arange(2), [b"12345678", b"123"]):
        assert not asked(described(x="int64"), x=one).fits
        assert asked(described(x="int64"), x=one[:1]).fits, "a row goes alone"


@pytest.mark.parametrize(
    "given", [["ü", "", "a\0"], ("ü", "", b"a\0"), np.array(["ü", "", "a\0"], object), pd.Series(["ü", "", "a\0"])]
)
def test_text_is_bytes_after_their_length(given: Any) -> None:
    request = sent(asked(described(x="string"), x=given))
    assert (request.inputs[0].datatype, list(request.inputs[0].shape)) == ("BYTES", [3])
    assert request.raw_input_contents[0] == b"\2\0\0\0\xc3\xbc\0\0\0\0\2\0\0\0a\0"


def test_the_request_is_that_of_the_protocol() -> None:
    model = described(a="float32", b="int64")
    request = sent(asked(model, ["y", "z"], 3, b=[1], a=np.array(2.0)))
    assert (request.model_name, request.model_version) == ("m", "3")
    assert [(each.name, list(each.shape)) for each in request.inputs] == [("b", [1]), ("a", [])]
    assert [each.name for each in request.outputs] == ["y", "z"]
    assert len(request.raw_input_contents) == 2
    assert not sent(asked(model, b=[1])).model_version


def test_rows_are_distinguished_where_the_model_has_batches() -> None:
    rows = np.arange(12).reshape(6, 2)
    several = asked(described(x="int64", y="int64"), x=rows, y=rows[:, 0])
    assert (several.rows, several.fits) == (6, False)
    assert asked(described(x="int64"), x=rows[:4]).fits
    for alone in (asked(described(0, x="int64"), x=rows), asked(described(x="int64", y="int64"), x=rows, y=rows[:3])):
        assert (alone.rows, alone.fits) == (1, True)
    request = pb.ModelInferRequest.FromString(several._part([2, 3]).request)
    assert [list(each.shape) for each in request.inputs] == [[2, 2], [2]]
    assert request.raw_input_contents[1] == np.array([4, 6]).tobytes()


def reply(*outputs: tuple[str, str, Sequence[int], bytes]) -> bytes:
    response = pb.ModelInferResponse(model_name="m", model_version="1", id="x")
    for name, datatype, shape, raw in outputs:
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    return response.SerializeToString()


def test_outputs_by_name_and_parts_joined_in_order() -> None:
    call = asked(described(x="int64"), x=[1]).whole()
    found = call.read(reply(("y", "FP16", [1, 2], b"\0<\0@"), ("z", "BYTES", [2], b"\1\0\0\0a\0\0\0\0")))
    assert (found["y"].dtype, found["y"].tolist(), found["z"].tolist()) == (np.float16, [[1, 2]], ["a", ""])
    assert found["y"].flags.writeable
    inference = asked(described(x="int64"), x=[1, 2, 3])
    first = inference._part([0, 1]).read(reply(("y", "UINT8", [2, 1], b"\1\2")))
    last = inference._part([2]).read(reply(("y", "UINT8", [1, 1], b"\3")))
    assert joined([*first, *last])["y"].tolist() == [[1], [2], [3]]
    with pytest.raises(InternalError, match="expected 2 rows in every output"):
        inference._part([0, 1]).read(reply(("y", "UINT8", [1, 1], b"\1")))


@pytest.mark.parametrize(
    "wrong",
    [
        reply(("y", "BF16", [1], b"\0\0")),
        reply(("y", "FP32", [2], b"\0\0\0\0")),
        reply(("y", "BYTES", [2], b"\1\0\0\0a")),
        reply(("y", "BYTES", [1], b"\1\0")),
        reply(("y", "BYTES", [1], b"\1\0\0\0\xff")),
        pb.ModelInferResponse(outputs=[pb.ModelInferResponse.InferOutputTensor(name="y")]).SerializeToString(),
        b"\xff\xff",
        b"\x2a\x7f",
    ],
)
def test_a_reply_that_makes_no_sense_is_an_internal_error(wrong: bytes) -> None:
    with pytest.raises(InternalError):
        _calls.read(asked(described(x="int64"), x=[1]).whole(), wrong)
