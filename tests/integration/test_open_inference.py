"""The Open Inference Protocol: metadata of the server and its models, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rafaga.errors import InvalidRequest, InvalidTensor, ModelNotFound, ModelNotReady, RafagaError
from rafaga.inference import open_inference_pb2 as pb
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Serve, Served, assert_refused, wait_for_queue
from tests.integration.valve import Valve

DIGIT = messages.random_digits(0)
HISTORY = messages.random_history(0, 12)[np.newaxis]
MODELS = ("backbone", "digits", "fragile", "series")
TYPED = pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])


def assert_classified(response: pb.ModelInferResponse, images: np.ndarray) -> None:
    np.testing.assert_allclose(oip.arrays(response)["probabilities"], bundles.classify(images), atol=1e-5)


def statistics(served: Served, *models: str) -> list[Any]:
    stub = oip.stub(served)
    requests = [pb.ModelStatisticsRequest(name=model) for model in models] or [pb.ModelStatisticsRequest()]
    return [each for request in requests for each in stub.ModelStatistics(request, timeout=PATIENCE_S).model_stats]


def index(served: Served, **fields: Any) -> dict[str, str]:
    models = oip.stub(served).RepositoryIndex(pb.RepositoryIndexRequest(**fields)).models
    return {m.name: f"{m.version} {m.state} {m.reason}".strip() for m in models}


def is_ready(served: Served, name: str, version: str = "") -> bool:
    return oip.stub(served).ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready


def test_what_the_server_says_of_itself(server: Served) -> None:
    stub = oip.stub(server)
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    metadata = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, bool(metadata.version)) == ("rafaga", True)
    assert set(metadata.extensions) == {
        "classification",
        "model_configuration",
        "model_repository(index)",
        "statistics",
        "binary_tensor_data",
    }
    assert index(server) == dict.fromkeys(MODELS, "1 READY")
    assert [(m.name, m.version) for m in statistics(server)] == [(name, "1") for name in MODELS]
    for model in MODELS:
        assert is_ready(server, model)
        assert is_ready(server, model, "1")


@pytest.mark.parametrize(
    ("name", "version"),
    [("unknown", ""), ("unknown", "1"), ("", ""), *(("digits", v) for v in ("2", "x", "-1", "0", "1" * 30, "1.0"))],
)
def test_an_unknown_model_or_version_is_not_ready(server: Served, name: str, version: str) -> None:
    """As in Triton: no error, also for a version that is not a number."""
    assert not is_ready(server, name, version)


def test_a_server_with_a_broken_model_is_live_and_not_ready(serve: Serve, tmp_path: Path) -> None:
    bundles.publish_classifier(tmp_path)
    (bundles.publish_forecaster(tmp_path) / "golden.npz").write_bytes(b"other answers")
    served = serve(tmp_path)
    stub = oip.stub(served)
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert not stub.ServerReady(pb.ServerReadyRequest()).ready
    assert [is_ready(served, name) for name in ("digits", "series")] == [True, False]
    assert_refused(lambda: oip.infer(served, oip.request("series", history=HISTORY)), ModelNotReady)
    found = index(served)
    assert found["digits"] == "1 READY"
    assert found["series"].startswith("1 UNAVAILABLE ")
    assert ("refused" in found["series"], str(tmp_path) in found["series"]) == (True, False)
    assert index(served, ready=True).keys() == {"digits"}
    assert [m.name for m in statistics(served)] == ["digits"]


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("digits", {"image": ("UINT8", [-1, 28, 28, 1])}, {"probabilities": ("FP32", [-1, 10])}),
        ("backbone", {"image": ("UINT8", [-1, -1, -1, 3])}, {"map": ("FP32", [-1, 3, -1, -1])}),
        (
            "series",
            {"history": ("FP32", [-1, -1]), "length": ("INT64", [-1, 1])},
            {"quantiles": ("FP32", [-1, bundles.HORIZON, len(bundles.LEVELS)])},
        ),
    ],
)
def test_metadata_has_the_batch_dimension_and_config_has_not(
    server: Served, model: str, inputs: dict[str, Any], outputs: dict[str, Any]
) -> None:
    stub = oip.stub(server)
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
    assert (metadata.name, list(metadata.versions), metadata.platform) == (model, ["1"], "onnxruntime_onnx")
    assert {t.name: (t.datatype, list(t.shape)) for t in metadata.inputs} == inputs
    assert {t.name: (t.datatype, list(t.shape)) for t in metadata.outputs} == outputs
    config = stub.ModelConfig(pb.ModelConfigRequest(name=model)).config
    assert (config.name, config.platform, config.backend) == (model, "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 32
    assert config.HasField("dynamic_batching")
    assert {k: p.string_value for k, p in config.parameters.items()} == {"trained": "true", "weights": "test"}
    for tensors, told in ((config.input, metadata.inputs), (config.output, metadata.outputs)):
        assert [t.name for t in tensors] == [t.name for t in told]
        assert [list(t.dims) for t in tensors] == [list(t.shape[1:]) for t in told]
        assert [pb.DataType.Name(t.data_type) for t in tensors] == [f"TYPE_{t.datatype}" for t in told]


def test_config_describes_layout_and_optional_inputs(server: Served) -> None:
    """Image clients need the layout; load generators leave optional inputs out."""
    config = {name: oip.stub(server).ModelConfig(pb.ModelConfigRequest(name=name)).config for name in MODELS}
    (image,) = config["digits"].input
    assert (image.format, image.optional) == (pb.ModelInput.FORMAT_NHWC, False)
    history, length = config["series"].input
    assert (history.optional, history.allow_ragged_batch) == (False, True)
    assert (length.optional, length.allow_ragged_batch) == (True, False)


@TYPED
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_answers_equal_numpy(server: Served, rows: int, typed: bool) -> None:
    images = messages.random_digits(rows, rows)
    response = oip.infer(server, oip.images(images, typed=typed))
    assert (response.model_name, response.model_version, response.id) == ("digits", "1", "")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("probabilities", "FP32", [rows, bundles.CLASSES])
    assert_classified(response, images)
    photos = messages.random_photo(0, 8 + rows, 17, rows=2)  # a model that takes any size
    found = oip.answer(server, oip.images(photos, "backbone", typed=typed))["map"]
    np.testing.assert_allclose(found, bundles.features(photos), atol=1e-6)


@TYPED
@pytest.mark.parametrize("shape", [(2,), (2, 1)], ids=str)
@pytest.mark.parametrize("padding", [0.0, 5.0, np.nan, -np.inf])
def test_series_of_two_lengths(server: Served, shape: tuple[int, ...], typed: bool, padding: float) -> None:
    """Values beyond the length are ignored. Inputs come in any order."""
    history = np.stack([messages.random_history(1, 9), messages.random_history(2, 9)])
    history[1, 5:] = padding
    length = np.array([9, 5], np.int64).reshape(shape)
    found = oip.answer(server, oip.request("series", typed=typed, length=length, history=history))["quantiles"]
    expected = np.stack([bundles.forecast(history[0]), bundles.forecast(history[1, :5])])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_id_comes_back_and_the_version_in_full(server: Served) -> None:
    request = oip.images(DIGIT)
    for identity, version in (("", ""), ("42", "1"), ("x" * 300, "001"), ("ünïcode ☃", "")):
        request.id, request.model_version = identity, version
        response = oip.infer(server, request)
        assert (response.id, response.model_version) == (identity, "1")


def test_unknown_parameters_are_ignored(server: Served) -> None:
    given = {
        "triton_enable_empty_final_response": True,
        "priority": pb.InferParameter(uint64_param=3),
        "sequence_id": 0,
        "sequence_start": False,
        "headers": "x",
        "weight": 0.5,
        "empty": pb.InferParameter(),
    }
    request = oip.images(DIGIT, given=given)
    request.inputs[0].parameters["anything"].string_param = "x"
    request.outputs.add(name="probabilities").parameters["binary_data"].bool_param = True
    assert_classified(oip.infer(server, request), DIGIT)


@pytest.mark.parametrize("count", [1, 3, 10, 11])
def test_the_classification_extension_names_the_best_classes(server: Served, count: int) -> None:
    images = messages.random_digits(4, 3)
    response = oip.infer(server, oip.asking_for(oip.images(images), "probabilities", classification=count))
    (output,) = response.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [3, min(count, bundles.CLASSES)])
    for row, expected in zip(oip.arrays(response)["probabilities"], bundles.classify(images), strict=True):
        best = np.argsort(-expected, kind="stable")[:count]
        scores, indices, labels = zip(*(element.decode().split(":") for element in row), strict=True)
        assert [int(index) for index in indices] == best.tolist()
        assert list(labels) == [f"digit {index}" for index in best]
        assert [float(score) for score in scores] == pytest.approx(expected[best], abs=1e-5)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "bytes_contents"])
@pytest.mark.parametrize("column", [True, False], ids=["[N, 1]", "[N]"])
@pytest.mark.parametrize("rows", [1, 3])
def test_encoded_images_answer_like_their_pixels(server: Served, rows: int, column: bool, raw: bool) -> None:
    images = messages.random_digits(3, rows)
    encoded = [messages.png(image[:, :, 0]) for image in images]
    assert_classified(oip.infer(server, oip.files(*encoded, raw=raw, column=column)), images)


@pytest.mark.parametrize("model", ["digits", "backbone"])
def test_image_files_are_declared_under_a_second_name(server: Served, model: str) -> None:
    stub, name = oip.stub(server), f"{model}.encoded"
    assert is_ready(server, name)
    told, plain = (stub.ModelMetadata(pb.ModelMetadataRequest(name=n)) for n in (name, model))
    (image,) = told.inputs
    assert (told.name, image.name, image.datatype, list(image.shape)) == (name, "image", "BYTES", [-1, 1])
    assert told.outputs == plain.outputs
    config = stub.ModelConfig(pb.ModelConfigRequest(name=name)).config
    (file,) = config.input
    assert (config.name, config.max_batch_size) == (name, 32)
    assert (file.name, file.data_type, list(file.dims)) == ("image", pb.TYPE_STRING, [1])
    assert [found.name for found in statistics(server, name)] == [name]


def test_image_files_go_to_the_model_that_declares_them(server: Served) -> None:
    images = messages.random_digits(3, 2)
    encoded = [messages.png(image[:, :, 0]) for image in images]
    response = oip.infer(server, oip.files(*encoded, model="digits.encoded"))
    assert (response.model_name, response.model_version) == ("digits.encoded", "1")
    assert_classified(response, images)
    says = "one input, of datatype BYTES and shape [N, 1]"
    assert_refused(lambda: oip.infer(server, oip.images(images, "digits.encoded")), InvalidTensor, says)
    for name in ("series.encoded", "unknown.encoded", "digits.encoded.encoded", ".encoded"):
        assert_refused(lambda name=name: oip.infer(server, oip.files(*encoded, model=name)), ModelNotFound)


def test_a_model_with_that_name_takes_precedence(serve: Serve, tmp_path: Path) -> None:
    bundles.publish_classifier(tmp_path, "digits")
    bundles.publish_classifier(tmp_path, "digits.encoded")
    assert_classified(oip.infer(serve(tmp_path), oip.images(DIGIT, "digits.encoded")), DIGIT)


def test_statistics_are_exact(serve: Serve, valve: Valve) -> None:
    """1. One request runs alone. 2. Three of both protocols share a batch. 3. One is too large for a batch. 4. One is
    bad."""
    served = serve(max_batch_size=8)
    (before,) = statistics(served, "digits")
    assert (before.inference_count, before.execution_count, before.inference_stats.success.count) == (0, 0, 0)
    stub = oip.stub(served)
    with valve.closed():
        first = stub.ModelInfer.future(oip.images(DIGIT))
        valve.wait_for_engine()
        others = {n: stub.ModelInfer.future(oip.images(messages.random_digits(n, n))) for n in (1, 2)}
        ours = served.vision.Classify.future(messages.classify(messages.random_digits(3, 3)))
        wait_for_queue(served, "digits", 6)
    assert_classified(first.result(PATIENCE_S), DIGIT)
    for rows, future in others.items():
        assert_classified(future.result(PATIENCE_S), messages.random_digits(rows, rows))
    expected = bundles.classify(messages.random_digits(3, 3))
    assert messages.probabilities(ours.result(PATIENCE_S)) == pytest.approx(expected, abs=1e-5)
    runs = len(valve.runs)
    assert valve.runs == [1, 6]
    oip.infer(served, oip.images(messages.random_digits(5, 20)))
    assert_refused(lambda: oip.infer(served, oip.images(DIGIT[:, 1:])), InvalidTensor)
    (found,) = statistics(served, "digits")
    assert (found.name, found.version) == ("digits", "1")
    assert found.inference_count == 1 + 6 + 20
    assert found.execution_count == len(valve.runs) > runs
    assert {s.batch_size: s.compute_infer.count for s in found.batch_stats} == {
        rows: valve.runs.count(rows) for rows in set(valve.runs)
    }
    inference = found.inference_stats
    assert (inference.success.count, inference.fail.count) == (5, 0)
    for phase in (inference.queue, inference.compute_input, inference.compute_infer, inference.compute_output):
        assert phase.count == 5
    assert inference.success.ns == pytest.approx(inference.queue.ns + inference.compute_infer.ns, abs=10)
    assert inference.queue.ns > 0
    assert inference.compute_infer.ns > 0
    assert found.last_inference > 1_600_000_000_000


def test_a_cached_request_gets_the_answer_to_its_own_numbers(server: Served) -> None:
    """The server does not parse it again. Typed contents and other batch sizes in between do not matter."""
    for seed in range(4):
        digits = messages.random_digits(seed, rows=1 + seed // 2)
        for typed in (False, False, True):
            assert_classified(oip.infer(server, oip.images(digits, typed=typed)), digits)


@pytest.mark.parametrize(
    ("parameters", "length", "error"),
    [({}, 13, InvalidTensor), ({}, -1, InvalidTensor), ({"timeout": -5}, 12, InvalidRequest)],
)
def test_a_cached_request_is_checked_as_well(
    server: Served, parameters: dict[str, Any], length: int, error: type[RafagaError]
) -> None:
    good = oip.request("series", history=HISTORY, length=np.array([12]))
    first = oip.infer(server, good).raw_output_contents
    bad = oip.request("series", given=parameters, history=HISTORY, length=np.array([length]))
    assert_refused(lambda: oip.infer(server, bad), error)
    assert oip.infer(server, good).raw_output_contents == first
