"""/v2 over HTTP: the answers of gRPC, tensors in JSON and binary, and clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import bundles, plain
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.rest import Answer, send, tensor
from tests.integration.serving import Served, serving

DIGITS = messages.random_digits(0, 2)
HISTORY = messages.random_history(1, 12)[np.newaxis]
EXPECTED = bundles.classify(DIGITS)
INFER = "/v2/models/digits/infer"
IMAGE = tensor("image", DIGITS, "UINT8")
BARE = {name: IMAGE[name] for name in ("name", "datatype", "shape")}
ELEMENTS = ("BOOL", "UINT8", "INT16", "INT64", "UINT64", "FP16", "FP32", "FP64")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """digits, series, and echo-DATATYPE of shape [N, any]."""
    root = tmp_path_factory.mktemp("models")
    bundles.publish_classifier(root)
    bundles.publish_forecaster(root)
    for datatype in (*ELEMENTS, "BYTES"):
        plain.publish(root, f"echo-{datatype}", plain.identity(oip.NUMPY.get(datatype, "string"), ("N", "any")))
    with serving(root) as served:
        yield served
        assert served.in_flight == 0


def sized(size: Any, **more: Any) -> dict[str, Any]:
    """A request whose contents follow in binary; `more`: of the input."""
    return {"inputs": [BARE | {"parameters": {"binary_data_size": size}} | more]}


def binary(head: dict[str, Any], *contents: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    text = json.dumps(head).encode()
    return b"".join([text, *contents]), {"Inference_Header_Content_Length": str(len(text))}


def outputs(answer: Answer) -> dict[str, np.ndarray]:
    assert answer.status == 200, answer
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    found, at = {}, length
    for output in json.loads(answer.body[:length])["outputs"]:
        dtype = np.dtype(oip.NUMPY.get(output["datatype"], object))
        if "data" in output:
            values = np.array(output["data"], dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            values, at = np.frombuffer(answer.body[at : at + size], dtype), at + size
        found[output["name"]] = values.reshape(output["shape"])
    assert at == len(answer.body)
    return found


def assert_classified(answer: Answer, is_binary: bool = False) -> None:
    np.testing.assert_allclose(outputs(answer)["probabilities"], EXPECTED, atol=1e-5)
    assert ("inference-header-content-length" in answer.headers) == is_binary


def test_json_tensors(served: Served) -> None:
    for given in (IMAGE, IMAGE | {"data": DIGITS.tolist()}):
        for path in (INFER, "/v2/models/digits/versions/1/infer"):
            answer = send(served, path, {"inputs": [given], "id": "seven", "an extension": {"unknown": [1]}})
            assert_classified(answer)
            assert [answer.json[name] for name in ("model_name", "model_version", "id")] == ["digits", "1", "seven"]


def test_binary_tensors(served: Served) -> None:
    for asked, is_binary in (
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}, True),
        ({"outputs": [{"name": "probabilities"}], "parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "probabilities", "parameters": {"binary_data": False}}]}, False),
    ):
        body, headers = binary(sized(DIGITS.nbytes) | asked, DIGITS.tobytes())
        assert_classified(send(served, INFER, body, **headers), is_binary)
    files = oip.length_prefixed(*[messages.png(digit[:, :, 0]) for digit in DIGITS])
    body, headers = binary(sized(len(files), datatype="BYTES", shape=[2, 1]), files)
    assert_classified(send(served, INFER, body, **headers))


def test_series_and_classes(served: Served) -> None:
    answer = send(served, "/v2/models/series/infer", {"inputs": [tensor("history", HISTORY, "FP32")]})
    np.testing.assert_allclose(outputs(answer)["quantiles"][0], bundles.forecast(HISTORY[0]), atol=1e-4)
    asked = [{"name": "probabilities", "parameters": {"classification": 3}}]
    answer = send(served, INFER, {"inputs": [IMAGE], "outputs": asked})
    best = [int(text.split(":")[1]) for text in outputs(answer)["probabilities"].ravel()]
    assert best == EXPECTED.argsort(1)[:, ::-1][:, :3].ravel().tolist()


@pytest.mark.parametrize("datatype", ELEMENTS)
def test_every_datatype_in_json(served: Served, datatype: str) -> None:
    dtype = np.dtype(oip.NUMPY[datatype])
    least, most = (False, True) if dtype.kind == "b" else (0, 1)
    if dtype.kind in "ui":
        least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    array = np.array([[least, most], [most, least]], dtype)
    answer = send(served, f"/v2/models/echo-{datatype}/infer", {"inputs": [tensor("x", array, datatype)]})
    np.testing.assert_array_equal(outputs(answer)["y"], array)
    if dtype.kind != "b":
        too_large = {**tensor("x", array, datatype), "data": [0, 0, 0, 10**400 if dtype.kind == "f" else most + 1]}
        answer = send(served, f"/v2/models/echo-{datatype}/infer", json.dumps({"inputs": [too_large]}))
        assert answer.status == 400
        assert answer.error


def test_text_and_what_json_does_not_have(served: Served) -> None:
    text = np.array([["a", "日本"], ["", '"']], object)
    answer = send(served, "/v2/models/echo-BYTES/infer", {"inputs": [tensor("x", text, "BYTES")]})
    np.testing.assert_array_equal(outputs(answer)["y"], text)
    strange = np.array([[np.nan, np.inf], [1, 2]], np.float32)
    body, headers = binary(sized(16, name="x", datatype="FP32", shape=[2, 2]), strange.tobytes())
    assert send(served, "/v2/models/echo-FP32/infer", body, **headers).json["outputs"][0]["data"] == [None, None, 1, 2]


def test_what_the_server_says_of_itself(served: Served) -> None:
    about = send(served, "/v2").json
    assert (about["name"], "binary_tensor_data" in about["extensions"]) == ("rafaga", True)
    found = send(served, "/v2/models/digits").json
    assert found == send(served, "/v2/models/digits/versions/1").json
    assert found["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}]
    assert send(served, "/v2/models/digits/config").json["parameters"]["trained"] == {"string_value": "true"}
    (statistics,) = send(served, "/v2/models/digits/stats").json["model_stats"]
    assert statistics["inference_stats"]["queue"].keys() == {"count", "ns"}
    assert "digits" in {each["name"] for each in send(served, "/v2/models/stats").json["model_stats"]}
    for body in (b"", "{}", '{"ready": true}'):
        index = send(served, "/v2/repository/index", body).json
        assert {"name": "digits", "version": "1", "state": "READY", "reason": ""} in index
    assert send(served, "/v2/health/live").json == {"live": True}
    assert send(served, "/v2/health/ready").json == {"ready": True}
    for path, status in (("digits", 200), ("digits/versions/1", 200), ("digits/versions/7", 503), ("unknown", 503)):
        answer = send(served, f"/v2/models/{path}/ready")
        assert (answer.status, answer.json["ready"]) == (status, status == 200)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"[]", "JSON: Expected `object`"),
        (b"{}", "`inputs`"),
        (b'{"inputs": [' * 50_000, "JSON"),
        ({"inputs": [BARE]}, "input 'image': expected data, or the parameter binary_data_size"),
        ({"inputs": [IMAGE | {"data": 7}]}, "flat list"),
        ({"inputs": [IMAGE | {"data": [[1]]}]}, "flat list"),
        (f'{{"inputs": [{json.dumps(BARE)[:-1]}, "data": {"[" * 5000}}}]}}', "JSON"),
        ({"inputs": [IMAGE | {"data": [1, 2]}]}, "expected data of shape [2, 28, 28, 1], got 2 elements"),
        ({"inputs": [IMAGE | {"data": DIGITS[:1].tolist()}]}, "got [1, 28, 28, 1]"),
        ({"inputs": [IMAGE | {"data": [[[[1]], []]]}]}, "the same length"),
        ({"inputs": [IMAGE | {"data": [256] * DIGITS.size}]}, "does not fit UINT8"),
        ({"inputs": [IMAGE | {"data": ["1"] * DIGITS.size}]}, "Expected `int`, got `str`"),
        ({"inputs": [IMAGE | {"data": [1.5] * DIGITS.size}]}, "Expected `int`, got `float`"),
        ({"inputs": [IMAGE | {"datatype": "FLOAT"}]}, "expected a datatype of BOOL"),
        ({"inputs": [IMAGE | {"shape": [-2, 28, -28, 1]}]}, "of zero or more"),
        ({"inputs": [IMAGE | {"shape": [2**70]}]}, "`$.inputs[0].shape[0]`"),
        ({"inputs": [IMAGE], "parameters": {"x": 2**70}}, "64 bits"),
        ({"inputs": [IMAGE], "parameters": {"x": [1]}}, "`$.parameters"),
        (sized(DIGITS.nbytes), "binary_data_size of at most 0"),
        (binary(sized(DIGITS.nbytes), DIGITS.tobytes()[1:]), "at most 1567 bytes, which follow; got 1568"),
        (binary(sized(DIGITS.nbytes), DIGITS.tobytes() + b"!"), "the JSON and the binary tensors"),
        (binary(sized(-1), DIGITS.tobytes()), "got -1"),
        (binary(sized(True), DIGITS.tobytes()), "got True"),
        (binary(sized("1568"), DIGITS.tobytes()), "got 1568"),
        (binary(sized(1568, data=[1]), DIGITS.tobytes()), "either data or binary_data_size"),
        (binary(sized(1567), DIGITS.tobytes()[1:]), "shape and data disagree"),
        ((b"{}", {"Inference_Header_Content_Length": "3"}), "at most the 2 bytes of the body; got '3'"),
        ((b"{}", {"Inference_Header_Content_Length": "-1"}), "got '-1'"),
        ((b"{}", {"Inference_Header_Content_Length": "0"}), "got '0'"),
        ((b"{}", {"Inference_Header_Content_Length": "9" * 5000}), "got '9"),
        ((b"\x1f\x8b", {"Content_Encoding": "gzip"}), "no content-encoding"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(served: Served, body: Any, says: str) -> None:
    content, headers = body if isinstance(body, tuple) else (body, {})
    answer = send(served, INFER, content, **headers)
    assert answer.status == 400, answer
    assert says in answer.error
    assert len(answer.error) < 500


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/models/unknown/infer", {"inputs": [IMAGE]}, 404),
        ("/v2/models/digits/versions/7/infer", {"inputs": [IMAGE]}, 404),
        ("/v2/models/digits/versions/x/infer", {"inputs": [IMAGE]}, 404),
        ("/v2/models/unknown", None, 404),
        (INFER, None, 405),
        ("/v2/logging", None, 404),
        (INFER, {"inputs": [IMAGE], "parameters": {"sequence_id": 5}}, 501),
        (INFER, {"inputs": [BARE | {"parameters": {"shared_memory_region": "a"}}]}, 501),
        (INFER, {"inputs": [IMAGE], "parameters": {"timeout": 1}}, 504),
    ],
)
def test_statuses(served: Served, path: str, body: Any, status: int) -> None:
    answer = send(served, path, body)
    assert answer.status == status, answer
    assert answer.error
