"""/v1/models over HTTP: the answers of gRPC, from a curl command's body; and clear errors."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
from openapi_spec_validator import validate

from rafaga.server.services.rest.ask import ACTIONS
from rafaga.server.services.rest.conversion import plain
from rafaga.v1 import catalog_pb2
from tests import bundles
from tests.integration import messages
from tests.integration.rest import Answer, send
from tests.integration.serving import Serve, Served

DIGITS = messages.random_digits(0, 3)
DIGIT = messages.png(DIGITS[0, :, :, 0])
PHOTO = messages.random_photo(1, 8, 16)
PHOTO_FILE = messages.png(PHOTO[0])
HISTORY = messages.random_history(2, 12)
FORM = "application/x-www-form-urlencoded"
CLASSIFY, FORECAST, PREDICT = "/v1/models/digits:classify", "/v1/models/series:forecast", "/v1/models/letters:predict"


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def as_tensor(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": "uint8", "shape": list(array.shape), "data": base64_of(array.tobytes())}


def array(tensor: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(tensor["data"]), tensor["dtype"]).reshape(tensor["shape"])


def as_json(message: Any) -> dict[str, Any]:
    return without_timing(json.loads(json.dumps(plain(message))))


def without_timing(found: dict[str, Any]) -> dict[str, Any]:
    assert found.pop("timing").keys() == {"queue_us", "preprocess_us", "inference_us", "batch_size"}
    return found


def probabilities(answer: Answer) -> np.ndarray:
    """[N, classes]; needs every label."""
    assert answer.status == 200, answer
    rows = [sorted(result["labels"], key=lambda label: label["index"]) for result in answer.json["results"]]
    return np.array([[label["probability"] for label in row] for row in rows])


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", FORM, "text/plain", "application/json"])
def test_classify_a_file(full_server: Served, kind: str) -> None:
    answer = send(full_server, f"{CLASSIFY}?top_k=1000", DIGIT, content_type=kind)
    assert probabilities(answer) == pytest.approx(bundles.classify(DIGITS[:1]), abs=1e-5)
    assert answer.headers["content-type"] == "application/json"


def test_classify(full_server: Served) -> None:
    """1. As over gRPC. 2. JSON. 3. A parameter of the query counts before the body."""
    for path in (CLASSIFY, "/v1/models/digits/versions/1:classify"):
        found = without_timing(send(full_server, path, DIGIT).json)
        expected = ACTIONS["classify"].convert(full_server.vision.Classify(messages.classify(DIGITS[:1], top_k=0)))
        assert found == without_timing(json.loads(json.dumps(expected)))
    assert len(found["results"][0]["labels"]) == 5
    model = {"name": "digits", "version": 1, "trained": True, "precision": "fp32", "engine": "onnxruntime"}
    assert found["model"] == model
    files = [base64_of(messages.png(digit[:, :, 0])) for digit in DIGITS]
    for body in ({"images": files}, {"pixels": as_tensor(DIGITS)}):
        answer = send(full_server, CLASSIFY, {**body, "top_k": 10})
        assert probabilities(answer) == pytest.approx(bundles.classify(DIGITS), abs=1e-5)
    answer = send(full_server, f"{CLASSIFY}?top_k=2", {"images": files, "top_k": 10})
    assert len(answer.json["results"][0]["labels"]) == 2


def test_detect(full_server: Served) -> None:
    found = without_timing(send(full_server, "/v1/models/detector:detect?max_objects=1", PHOTO_FILE).json)
    assert found == as_json(full_server.vision.Detect(messages.detect(PHOTO, max_objects=1)))
    assert found["results"][0]["objects"][0]["box"].keys() == {"x_min", "y_min", "x_max", "y_max"}
    (found,) = send(full_server, "/v1/models/detector:detect?min_score=1", PHOTO_FILE).json["results"]
    assert found["objects"] == []


def test_segment(full_server: Served) -> None:
    labels, sure = bundles.segment(PHOTO)
    body = {"pixels": as_tensor(PHOTO), "with_probabilities": True}
    (found,) = send(full_server, "/v1/models/segmenter:segment", body).json["results"]
    np.testing.assert_array_equal(array(found["labels"]), labels[0])
    np.testing.assert_allclose(array(found["probabilities"]), sure[0], atol=1e-5)
    (found,) = send(full_server, "/v1/models/segmenter:segment", PHOTO_FILE).json["results"]
    assert found["probabilities"] is None
    assert (found["image_height"], found["image_width"]) == (8, 16)
    assert sum(each["share"] for each in found["classes"]) == pytest.approx(1.0)


def test_features(full_server: Served) -> None:
    found = send(full_server, "/v1/models/backbone:features", PHOTO_FILE).json
    expected = full_server.vision.ExtractFeatures(messages.features(PHOTO))
    for given, message in zip(found["maps"], expected.maps, strict=True):
        assert (given["name"], given["stride"]) == (message.name, message.stride)
    np.testing.assert_allclose(array(found["maps"][0]), bundles.features(PHOTO), atol=1e-6)


def test_forecast(full_server: Served) -> None:
    def quantiles(found: list[dict[str, Any]]) -> np.ndarray:
        return np.array([each["values"] for each in found]).T

    expected = bundles.forecast(HISTORY)
    lines = "month,value\n" + "".join(f"1990-{i:02},{value}\n" for i, value in enumerate(HISTORY, 1))
    columns = "a,b\n" + "".join(f"0,{value}\r\n" for value in HISTORY)
    for answer in (
        send(full_server, FORECAST, {"history": HISTORY.tolist()}),
        send(full_server, FORECAST, json.dumps({"history": HISTORY.tolist()}), content_type=FORM),
        send(full_server, FORECAST, "\n".join(map(str, HISTORY)), content_type="text/csv"),
        send(full_server, FORECAST, "\ufeff".encode() + lines.encode(), content_type=FORM),
        send(full_server, FORECAST + "?column=b", columns),
    ):
        assert quantiles(answer.json["quantiles"]) == pytest.approx(expected, abs=1e-4)
    found = send(full_server, FORECAST + "?horizon=2", {"series": [HISTORY.tolist(), HISTORY[:5].tolist()]}).json
    assert found["quantiles"] == []
    for each, history in zip(found["forecasts"], (HISTORY, HISTORY[:5]), strict=True):
        assert quantiles(each["quantiles"]) == pytest.approx(bundles.forecast(history)[:2], abs=1e-4)


def test_predict(full_server: Served) -> None:
    path = PREDICT + "?top_k=2"
    expected = as_json(full_server.sequences.Predict(messages.predict("abca", top_k=2)))
    for body in ("abca", "a b\nc,a\n", {"symbols": list("abca")}):
        assert without_timing(send(full_server, path, body).json) == expected
    found = send(full_server, path, {"sequences": [list("ab"), ["c"]]}).json
    assert [len(each["labels"]) for each in found["continuations"]] == [2, 2]


def test_the_catalogue(full_server: Served) -> None:
    models = send(full_server, "/v1/models").json
    assert models == json.loads(json.dumps(plain(full_server.catalog.ListModels(catalog_pb2.ListModelsRequest()))))
    digits = next(model for model in models["models"] if model["name"] == "digits")
    assert (digits["state"], digits["version"]) == ("READY", 1)
    assert digits["inputs"] == [{"name": "image", "dtype": "uint8", "shape": [-1, 28, 28, 1]}]
    assert "forecast" not in digits
    for path in ("/v1/models/digits", "/v1/models/digits/versions/1"):
        assert send(full_server, path).json == {"model": digits, "labels": [f"digit {i}" for i in range(10)]}
    assert send(full_server, "/v1/models", method="HEAD").body == b""


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/models/unknown:classify", DIGIT, 404, "no model 'unknown'"),
        ("/v1/models/digits/versions/7:classify", DIGIT, 404, "available: 1"),
        ("/v1/models/digits/versions/x:classify", DIGIT, 404, "a version is an integer"),
        (f"/v1/models/digits/versions/{'9' * 19}:classify", DIGIT, 404, "a version is an integer"),
        ("/v1/models/digits:dance", DIGIT, 405, "Method Not Allowed"),
        (CLASSIFY, None, 405, "Method Not Allowed"),
        ("/v1/elsewhere", None, 404, "see /openapi.json"),
        (CLASSIFY, DIGIT[:-60], 400, "do not decode"),
        (CLASSIFY, b"{", 400, "JSON"),
        (CLASSIFY, b'{"images": "\xff"}', 400, "JSON"),
        (CLASSIFY, "{}", 400, "expected an image"),
        (CLASSIFY, {"images": ["?"]}, 400, "base64"),
        (CLASSIFY, {"images": [1]}, 400, "`$.images[0]`"),
        (CLASSIFY, {"image": []}, 400, "`image`"),
        (CLASSIFY, {"images": [base64_of(DIGIT)], "top_k": -1}, 400, "`$.top_k`"),
        (CLASSIFY, {"images": [base64_of(DIGIT)], "pixels": as_tensor(DIGITS)}, 400, "got both"),
        (CLASSIFY, {"pixels": as_tensor(DIGITS) | {"data": ""}}, 400, "got 0"),
        (CLASSIFY, {"pixels": as_tensor(DIGITS) | {"dtype": "float32"}}, 400, "dtype"),
        (CLASSIFY, {"pixels": as_tensor(DIGITS[0])}, 400, "`$.pixels.shape`"),
        (CLASSIFY, {"pixels": {"shape": [2**40, 1, 1, 1], "data": ""}}, 400, "4294967295"),
        (CLASSIFY, '{"images": ' + "[" * 100_000, 400, "JSON"),
        (CLASSIFY + "?top_k=many", DIGIT, 400, "query parameters"),
        (CLASSIFY + "?images=a", DIGIT, 400, "expected top_k, min_probability; got 'images'"),
        (CLASSIFY + "?min_probability=1.5", DIGIT, 400, "min_probability from 0 to 1, got 1.5"),
        (FORECAST, "1\n2\nthree\n", 400, "line 3: 'three' is not a number"),
        (FORECAST, "1\n2\ninf\n", 400, "finite"),
        (FORECAST, "a,b\n1,2\n", 400, "choose a column with ?column=: a, b"),
        (FORECAST + "?column=c", "a,b\n1,2\n", 400, "no column 'c'"),
        (FORECAST, b"\xff\xfe", 400, "UTF-8"),
        (FORECAST, "1\n" * 600_000, 413, "1048576 bytes"),
        (FORECAST, {"history": ["1"]}, 400, "`$.history[0]`"),
        (FORECAST, {"history": [1, 2], "series": [[1, 2]]}, 400, "got both"),
        (PREDICT, "", 400, "got 0"),
        (PREDICT, '{"symbols": ["\\ud800"]}', 400, ""),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:50],
)
def test_what_is_wrong_is_named(full_server: Served, path: str, body: Any, status: int, says: str) -> None:
    answer = send(full_server, path, body)
    assert answer.status == status, answer
    assert says in answer.error
    assert "/tmp" not in answer.error


def test_forms_are_refused_with_the_command_that_works(full_server: Served) -> None:
    answer = send(full_server, CLASSIFY, b"--x", content_type="multipart/form-data; boundary=x")
    assert (answer.status, "--data-binary" in answer.error) == (400, True)


def test_requests_are_counted_under_their_method(serve: Serve) -> None:
    served = serve()
    send(served, CLASSIFY, DIGIT)
    send(served, "/v1/models/unknown:classify", DIGIT)
    method = "/rafaga.v1.Vision/Classify"
    assert served.metric("rafaga_requests_total", method=method, code="OK") == 1
    assert served.metric("rafaga_requests_total", method=method, code="NOT_FOUND") == 1
    assert served.metric("rafaga_request_seconds_count", method=method) == 2
    assert served.in_flight == 0


def test_the_description_has_every_route_and_field(full_server: Served) -> None:
    """A field of an answer that is not described would be missing in clients made from the description."""
    document = send(full_server, "/openapi.json").json
    validate(document)
    routes = {r.path: (r.methods or set()) - {"HEAD"} for r in full_server.server.http.routes}
    described = {path: {verb.upper() for verb in verbs} for path, verbs in document["paths"].items()}
    assert described == {path: verbs for path, verbs in routes.items() if not re.match(r"/($|page/)", path)}

    def check(schema: dict[str, Any], value: Any, where: str) -> None:
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if isinstance(value, dict) and "properties" in schema:
            assert value.keys() <= schema["properties"].keys(), where
            for name, each in value.items():
                check(schema["properties"][name], each, f"{where}.{name}")
        elif isinstance(value, list) and "items" in schema:
            for each in value:
                check(schema["items"], each, f"{where}[]")

    for called, body in (
        ("/v1/models", None),
        ("/v1/models/digits", None),
        (CLASSIFY, DIGIT),
        ("/v1/models/detector:detect", PHOTO_FILE),
        ("/v1/models/segmenter:segment", PHOTO_FILE),
        ("/v1/models/backbone:features", PHOTO_FILE),
        (FORECAST, "1\n2\n3\n"),
        (PREDICT, "abc"),
        ("/v2", None),
        ("/v2/models/digits", None),
        ("/v2/models/digits/config", None),
        ("/v2/models/digits/stats", None),
        ("/v2/repository/index", "{}"),
    ):
        path = re.sub(r"/models/\w+", "/models/{name}", called)
        operation = document["paths"][path]["get" if body is None else "post"]
        answer = send(full_server, called, body)
        assert answer.status == 200, answer
        check(operation["responses"]["200"]["content"]["application/json"]["schema"], answer.json, path)
