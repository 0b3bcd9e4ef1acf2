"""The Open Inference Protocol: metadata of the server and its models, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rafaga.inference import open_inference_pb2 as pb
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Serve, Served, refusal, wait_for_queue
from tests.integration.valve import Valve

DIGIT = messages.random_digits(0)
HISTORY = messages.random_history(0, 12)[np.newaxis]


def infer(served: Served, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return oip.stub(served).ModelInfer(request, timeout=PATIENCE_S)


def answer(served: Served, request: pb.ModelInferRequest, output: str = "probabilities") -> np.ndarray:
    return oip.arrays(infer(served, request))[output]


def statistics(served: Served, model: str) -> Any:
    (found,) = oip.stub(served).ModelStatistics(pb.ModelStatisticsRequest(name=model), timeout=PATIENCE_S).model_stats
    return found


def test_a_server_is_live_and_ready(server: Served) -> None:
    stub = oip.stub(server)
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    for model in ("digits", "backbone", "series", "fragile"):
        assert stub.ModelReady(pb.ModelReadyRequest(name=model)).ready
        assert stub.ModelReady(pb.ModelReadyRequest(name=model, version="1")).ready


@pytest.mark.parametrize(
    ("name", "version"),
    [("unknown", ""), ("unknown", "1"), ("", ""), *(("digits", v) for v in ("2", "x", "-1", "0", "1" * 30, "1.0"))],
)
def test_an_unknown_model_or_version_is_not_ready(server: Served, name: str, version: str) -> None:
    """As in Triton: no error, also for a version that is not a number."""
    assert not oip.stub(server).ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready


def test_a_server_with_a_broken_model_is_live_and_not_ready(serve: Serve, tmp_path: Path) -> None:
    bundles.publish_classifier(tmp_path)
    (bundles.publish_forecaster(tmp_path) / "golden.npz").write_bytes(b"other answers")
    served = serve(tmp_path)
    stub = oip.stub(served)
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert not stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="digits")).ready
    assert not stub.ModelReady(pb.ModelReadyRequest(name="series")).ready
    refused = refusal(lambda: infer(served, oip.request("series", history=HISTORY)))
    assert refused.reason == "MODEL_NOT_READY"
    index = {m.name: m for m in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models}
    assert (index["digits"].state, index["series"].state) == ("READY", "UNAVAILABLE")
    assert "refused" in index["series"].reason
    assert str(tmp_path) not in index["series"].reason
    assert [m.name for m in stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models] == ["digits"]
    all_statistics = stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert [m.name for m in all_statistics] == ["digits"]


def test_server_metadata_lists_the_supported_extensions(server: Served) -> None:
    metadata = oip.stub(server).ServerMetadata(pb.ServerMetadataRequest())
    assert metadata.name == "rafaga"
    assert metadata.version
    assert set(metadata.extensions) == {
        "classification",
        "model_configuration",
        "model_repository(index)",
        "statistics",
        "binary_tensor_data",
    }


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
    stub = oip.stub(server)
    (image,) = stub.ModelConfig(pb.ModelConfigRequest(name="digits")).config.input
    assert image.format == pb.ModelInput.FORMAT_NHWC
    assert not image.optional
    history, length = stub.ModelConfig(pb.ModelConfigRequest(name="series")).config.input
    assert (history.optional, history.allow_ragged_batch) == (False, True)
    assert (length.optional, length.allow_ragged_batch) == (True, False)


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_answers_equal_numpy(server: Served, rows: int, typed: bool) -> None:
    images = messages.random_digits(rows, rows)
    response = infer(server, oip.images(images, typed=typed))
    assert (response.model_name, response.model_version, response.id) == ("digits", "1", "")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("probabilities", "FP32", [rows, bundles.CLASSES])
    np.testing.assert_allclose(oip.arrays(response)["probabilities"], bundles.classify(images), atol=1e-5)


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("size", [(8, 8), (33, 17)])
def test_models_of_free_size_take_any(server: Served, size: tuple[int, int], typed: bool) -> None:
    photos = messages.random_photo(0, *size, rows=2)
    found = answer(server, oip.images(photos, "backbone", typed=typed), "map")
    np.testing.assert_allclose(found, bundles.features(photos), atol=1e-6)


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("shape", [(2,), (2, 1)], ids=str)
def test_series_of_two_lengths_in_one_request(server: Served, shape: tuple[int, ...], typed: bool) -> None:
    history = np.stack([messages.random_history(1, 9), messages.random_history(2, 9)])
    history[1, 5:] = 0
    length = np.array([9, 5], np.int64).reshape(shape)
    found = answer(server, oip.request("series", typed=typed, history=history, length=length), "quantiles")
    expected = np.stack([bundles.forecast(history[0]), bundles.forecast(history[1, :5])])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("padding", [0.0, 5.0, np.nan, -np.inf])
def test_padding_beyond_the_length_of_a_series_is_ignored(server: Served, padding: float) -> None:
    """The inputs may come in any order."""
    history = np.append(HISTORY, np.full((1, 3), padding, np.float32), axis=1)
    request = oip.request("series", length=np.array([12], np.int64), history=history)
    np.testing.assert_allclose(answer(server, request, "quantiles")[0], bundles.forecast(HISTORY[0]), atol=1e-4)


@pytest.mark.parametrize("identity", ["", "42", "x" * 300, "ünïcode ☃"])
def test_the_id_comes_back(server: Served, identity: str) -> None:
    request = oip.images(DIGIT)
    request.id = identity
    assert infer(server, request).id == identity


@pytest.mark.parametrize("version", ["", "1", "001"])
def test_a_version_is_a_number_or_the_latest(server: Served, version: str) -> None:
    request = oip.images(DIGIT)
    request.model_version = version
    assert infer(server, request).model_version == "1"


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
    np.testing.assert_allclose(answer(server, request), bundles.classify(DIGIT), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 10, 11])
def test_the_classification_extension_names_the_best_classes(server: Served, count: int) -> None:
    images = messages.random_digits(4, 3)
    response = infer(server, oip.asking_for(oip.images(images), "probabilities", classification=count))
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
    found = answer(server, oip.files(*encoded, raw=raw, column=column))
    np.testing.assert_allclose(found, bundles.classify(images), atol=1e-5)


@pytest.mark.parametrize("model", ["digits", "backbone"])
def test_image_files_are_declared_under_a_second_name(server: Served, model: str) -> None:
    stub, name = oip.stub(server), f"{model}.encoded"
    assert stub.ModelReady(pb.ModelReadyRequest(name=name)).ready
    told, plain = (stub.ModelMetadata(pb.ModelMetadataRequest(name=n)) for n in (name, model))
    (image,) = told.inputs
    assert (told.name, image.name, image.datatype, list(image.shape)) == (name, "image", "BYTES", [-1, 1])
    assert told.outputs == plain.outputs
    config = stub.ModelConfig(pb.ModelConfigRequest(name=name)).config
    (file,) = config.input
    assert (config.name, config.max_batch_size) == (name, 32)
    assert (file.name, file.data_type, list(file.dims)) == ("image", pb.TYPE_STRING, [1])
    assert statistics(server, name).name == name


def test_image_files_go_to_the_model_that_declares_them(server: Served) -> None:
    images = messages.random_digits(3, 2)
    encoded = [messages.png(image[:, :, 0]) for image in images]
    response = infer(server, oip.files(*encoded, model="digits.encoded"))
    assert (response.model_name, response.model_version) == ("digits.encoded", "1")
    np.testing.assert_allclose(oip.arrays(response)["probabilities"], bundles.classify(images), atol=1e-5)
    refused = refusal(lambda: infer(server, oip.images(images, "digits.encoded")))
    assert "one input, of datatype BYTES and shape [N, 1]" in refused.message
    for name in ("series.encoded", "unknown.encoded", "digits.encoded.encoded", ".encoded"):
        refused = refusal(lambda name=name: infer(server, oip.files(*encoded, model=name)))
        assert refused.reason == "MODEL_NOT_FOUND"


def test_a_model_with_that_name_takes_precedence(serve: Serve, tmp_path: Path) -> None:
    bundles.publish_classifier(tmp_path, "digits")
    bundles.publish_classifier(tmp_path, "digits.encoded")
    response = infer(serve(tmp_path), oip.images(DIGIT, "digits.encoded"))
    np.testing.assert_allclose(oip.arrays(response)["probabilities"], bundles.classify(DIGIT), atol=1e-5)


def test_statistics_are_exact(serve: Serve, valve: Valve) -> None:
    """1. One request runs alone. 2. Three queue and share a batch. 3. One is too large for a batch. 4. Some are bad."""
    served = serve(max_batch_size=8)
    before = statistics(served, "digits")
    assert (before.inference_count, before.execution_count, before.inference_stats.success.count) == (0, 0, 0)
    stub = oip.stub(served)
    with valve.closed():
        first = stub.ModelInfer.future(oip.images(DIGIT))
        valve.wait_for_engine()
        others = [stub.ModelInfer.future(oip.images(messages.random_digits(n, n))) for n in (1, 2, 3)]
        wait_for_queue(served, "digits", 6)
    for future in (first, *others):
        future.result(PATIENCE_S)
    runs = len(valve.runs)
    assert valve.runs == [1, 6]
    infer(served, oip.images(messages.random_digits(5, 20)))
    refusal(lambda: infer(served, oip.images(DIGIT[:, 1:])))
    refusal(lambda: infer(served, oip.images(DIGIT, "unknown")))

    found = statistics(served, "digits")
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


def test_all_models_statistics_in_one_call(server: Served) -> None:
    found = oip.stub(server).ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert [(m.name, m.version) for m in found] == [(n, "1") for n in ("backbone", "digits", "fragile", "series")]


def test_the_index_lists_every_model(server: Served) -> None:
    index = oip.stub(server).RepositoryIndex(pb.RepositoryIndexRequest()).models
    assert [(m.name, m.version, m.state, m.reason) for m in index] == [
        (n, "1", "READY", "") for n in ("backbone", "digits", "fragile", "series")
    ]


def test_requests_of_both_protocols_share_a_batch(serve: Serve, valve: Valve) -> None:
    served = serve()
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(DIGIT))
        valve.wait_for_engine()
        ours = served.vision.Classify.future(messages.classify(messages.random_digits(1)))
        theirs = oip.stub(served).ModelInfer.future(oip.images(messages.random_digits(2)))
        wait_for_queue(served, "digits", 2)
    first.result(PATIENCE_S)
    assert messages.probabilities(ours.result(PATIENCE_S)) == pytest.approx(
        bundles.classify(messages.random_digits(1)), abs=1e-5
    )
    np.testing.assert_allclose(
        oip.arrays(theirs.result(PATIENCE_S))["probabilities"], bundles.classify(messages.random_digits(2)), atol=1e-5
    )
    assert valve.runs == [1, 2]


def test_a_cached_request_gets_the_answer_to_its_own_numbers(server: Served) -> None:
    """The server does not parse it again. Typed contents and other batch sizes in between do not matter."""
    for seed in range(4):
        digits = messages.random_digits(seed, rows=1 + seed // 2)
        for typed in (False, False, True):
            expected = bundles.classify(digits)
            np.testing.assert_allclose(answer(server, oip.images(digits, typed=typed)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "lengths", "reason"),
    [({}, [13], "INVALID_TENSOR"), ({}, [-1], "INVALID_TENSOR"), ({"timeout": -5}, [12], "INVALID_REQUEST")],
)
def test_a_cached_request_is_checked_as_well(
    server: Served, parameters: dict[str, Any], lengths: list[int], reason: str
) -> None:
    good = oip.request("series", history=HISTORY, length=np.array([12]))
    first = infer(server, good).raw_output_contents
    bad = oip.request("series", given=parameters, history=HISTORY, length=np.array(lengths))
    assert refusal(lambda: infer(server, bad)).reason == reason
    assert infer(server, good).raw_output_contents == first
