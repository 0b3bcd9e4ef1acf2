"""Detection, segmentation and next symbols: correct answers, clear refusals, batching."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga import AsyncClient, Client, Continuation, InvalidImage, InvalidRequest, InvalidTensor, RafagaError
from rafaga.cli import main
from rafaga.load import targets
from rafaga.load.codecs import reader
from rafaga.load.codecs.base import Replies, Wire
from rafaga.load.connection import Connection
from rafaga.load.payloads import Payloads
from rafaga.v1 import sequences_pb2, vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, refusal, refusal_of, serving, wait_for_queue
from tests.integration.valve import Valve


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """detector (8x16), free-detector and segmenter (any size), letters (1 to 32 of abcd)."""
    root = tmp_path_factory.mktemp("tasks")
    bundles.publish_detector(root)
    bundles.publish_detector(root, "free-detector", size=None)
    bundles.publish_segmenter(root)
    bundles.publish_sequence_model(root)
    bundles.publish_classifier(root)
    return root


@pytest.fixture(scope="module")
def served(tasks: Path) -> Iterator[Served]:
    with serving(tasks) as served:
        yield served
        assert served.in_flight == 0


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address, timeout_s=PATIENCE_S) as client:
        yield client


def grey(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def corners(found: Any) -> list[list[float]]:
    return [[o.box.x_min, o.box.y_min, o.box.x_max, o.box.y_max] for o in found]


class TestDetect:
    def test_tensors_give_boxes_in_their_own_pixels(self, client: Client) -> None:
        photo = messages.random_photo(0, 8, 16, rows=3)
        _, scores, _ = bundles.detect(photo)
        for found, expected in zip(client.detect_many(photo, model="detector"), scores, strict=True):
            assert [o.label for o in found] == ["bright thing", "dark thing"]
            assert [o.score for o in found] == pytest.approx(expected[:2].tolist(), abs=1e-5)
            assert corners(found) == [[0, 0, 16, 8], [0, 0, 8, 4]]
            assert (found.image_height, found.image_width) == (8, 16)

    def test_files_give_boxes_in_the_pixels_of_the_file(self, client: Client) -> None:
        """The model's input has 8 x 16 pixels, the client's image 60 x 30."""
        found = client.detect(messages.png(grey(60, 30, 200)), model="detector")
        assert corners(found) == [[0, 0, 30, 60], [0, 0, 15, 30]]
        assert (found.image_height, found.image_width) == (60, 30)
        assert found[0].box.width == 30
        files = [messages.png(grey(60, 30, 200)), messages.png(grey(10, 90, 100))]
        many = client.detect_many(files, model="detector")
        assert [corners(f)[0] for f in many] == [[0, 0, 30, 60], [0, 0, 90, 10]]

    def test_any_size(self, client: Client) -> None:
        found = client.detect(messages.png(grey(33, 21, 200)), model="free-detector")
        assert corners(found)[0] == [0, 0, 21, 33]

    def test_limits(self, client: Client) -> None:
        photo = grey(8, 16, 204)  # scores 0.8 and 0.4
        assert [o.score for o in client.detect(photo, model="detector", min_score=0.5)] == pytest.approx([0.8])
        assert [o.label for o in client.detect(photo, model="detector", max_objects=1)] == ["bright thing"]
        assert len(client.detect(photo, model="detector", max_objects=99)) == 2
        assert len(client.detect(photo, model="detector", min_score=1.0)) == 0

    def test_nothing_found(self, client: Client) -> None:
        """Rows after the last object have a score of zero and are not returned."""
        assert client.detect(grey(8, 16, 0), model="detector").objects == ()


class TestSegment:
    def test_tensors(self, client: Client) -> None:
        photo = messages.random_photo(1, 11, 7, rows=2)
        labels, probabilities = bundles.segment(photo)
        answers = client.segment_many(photo, model="segmenter", with_probabilities=True)
        for found, expected, sure in zip(answers, labels, probabilities, strict=True):
            np.testing.assert_array_equal(found.labels, expected)
            np.testing.assert_array_equal(found.full_size(), expected)
            assert found.probabilities is not None
            np.testing.assert_allclose(found.probabilities, sure, atol=1e-6)
            for one in found.classes:
                where = expected == one.index
                assert one.label == bundles.COLOURS[one.index]
                assert one.share == pytest.approx(where.mean())
                assert one.probability == pytest.approx(sure[where].mean(), abs=1e-5)
                np.testing.assert_array_equal(found.mask(one.label), where)
            assert [c.share for c in found.classes] == sorted((c.share for c in found.classes), reverse=True)
            assert sum(c.share for c in found.classes) == pytest.approx(1)

    def test_files_are_answered_at_the_models_size_and_scale_to_their_own(self, client: Client) -> None:
        """64 x 32 is resized to 32 x 16. The left half is red, the right half blue, in the image and in the answer."""
        photo = np.zeros((64, 32, 3), np.uint8)
        photo[:, :16, 0] = photo[:, 16:, 2] = 255
        found = client.segment(messages.png(photo), model="segmenter")
        assert found.labels.shape == (32, 16)
        assert found.probabilities is None
        assert (found.image_height, found.image_width) == (64, 32)
        np.testing.assert_array_equal(found.full_size(), photo.argmax(2))
        assert {c.label: c.share for c in found.classes} == {"red": 0.5, "blue": 0.5}

    def test_the_longer_side_has_a_limit(self, client: Client) -> None:
        found = client.segment(messages.png(grey(20, 200, 5)), model="segmenter")
        assert found.labels.shape == (4, 40)
        assert found.full_size().shape == (20, 200)

    def test_files_of_different_sizes(self, client: Client) -> None:
        """The server takes one size per message; the SDK finds out."""
        files = [messages.png(grey(16, width, 1)) for width in (16, 20, 16)]
        found = client.segment_many(files, model="segmenter")
        assert [answer.image_width for answer in found] == [16, 20, 16]


class TestPredict:
    @pytest.mark.parametrize("symbols", ["a", "abca", "ddddc", "abcd" * 8])
    def test_answers_what_numpy_answers(self, client: Client, symbols: str) -> None:
        found = client.predict(symbols, model="letters", top_k=4)
        values = [p.probability for p in sorted(found.predictions, key=lambda p: p.index)]
        assert values == pytest.approx(bundles.predict(symbols).tolist(), abs=1e-6)
        assert client.predict(list(symbols), model="letters").top.label == found.top.label
        assert [p.label for p in client.predict(symbols, model="letters", top_k=1).predictions] == [found.top.label]

    def test_many_in_one_message(self, client: Client) -> None:
        sequences = ["a", "abcdabcd", "abx", "dd", "bca"]
        found = client.predict_many(sequences, model="letters", top_k=4)
        assert list(found.errors) == [2]
        assert str(found.errors[2]) == "symbol 2: expected one of a, b, c, d; got 'x'"
        for sequence, answer in zip(sequences, found.outcomes, strict=True):
            if isinstance(answer, Continuation):
                values = [p.probability for p in sorted(answer.predictions, key=lambda p: p.index)]
                assert values == pytest.approx(bundles.predict(sequence).tolist(), abs=1e-6)

    def test_ragged_sequences_share_a_batch_and_answer_as_if_alone(self, tasks: Path, valve: Valve) -> None:
        strings = ["abcdabc", "abcdabcd", "dddddd", "bcabcabc"]
        with serving(tasks, valve.load) as served:
            with valve.closed():
                first = served.sequences.Predict.future(messages.predict("abcd" * 8))  # not quick
                valve.wait_for_engine()
                futures = [served.sequences.Predict.future(messages.predict(s, top_k=4)) for s in strings]
                wait_for_queue(served, "letters", len(strings))
            assert first.result(PATIENCE_S)
            for string, future in zip(strings, futures, strict=True):
                answer = future.result(PATIENCE_S)
                values = [p.probability for p in sorted(answer.labels, key=lambda p: p.index)]
                assert values == pytest.approx(bundles.predict(string).tolist(), abs=1e-6)
                assert answer.timing.batch_size == len(strings)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c: c.detect(grey(8, 15, 1), model="detector"), InvalidTensor, r"\[N, 8, 16, 3\]"),
        (lambda c: c.detect(b"no image", model="detector"), InvalidImage, "JPEG, PNG, WebP, GIF or BMP"),
        (lambda c: c.detect(grey(8, 16, 1), model="letters"), InvalidRequest, "is for sequence"),
        (lambda c: c.segment(grey(8, 16, 1), model="detector"), InvalidRequest, "is for detection"),
        (lambda c: c.segment(grey(8, 16, 1)[..., :1], model="segmenter"), InvalidTensor, "any, any, 3"),
        (lambda c: c.predict("abx", model="letters"), InvalidTensor, "symbol 2: expected one of a, b, c, d; got 'x'"),
        (lambda c: c.predict("a" * 33, model="letters"), InvalidTensor, "1 to 32 symbols, got 33"),
        (lambda c: c.predict("ab", model="detector"), InvalidRequest, "is for detection"),
        (lambda c: c.classify(grey(8, 16, 1), model="detector"), InvalidRequest, "is for detection"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(
    client: Client, call: Callable[[Client], Any], error: type[RafagaError], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(client)
    assert client.predict("a", model="letters").top.label == "a"


@pytest.mark.parametrize(
    ("method", "request_", "says"),
    [
        ("Detect", vision_pb2.DetectRequest(model="detector"), "either `encoded` or `pixels`"),
        ("Detect", messages.detect(grey(8, 16, 1)[None], min_score=1.5), "min_score from 0 to 1, got 1.5"),
        ("Detect", messages.detect(grey(8, 16, 1)[None], min_score=float("nan")), "min_score from 0 to 1"),
        ("Segment", messages.segment_files(*(messages.png(grey(16, w, 1)) for w in (16, 20))), "images of one size"),
        ("Predict", sequences_pb2.PredictRequest(model="letters"), "1 to 32 symbols, got 0"),
        ("Predict", messages.predict("a", sequences=[sequences_pb2.Sequence()]), "`symbols` or `sequences`, got both"),
    ],
)
def test_requests_that_the_sdk_never_sends_are_refused(served: Served, method: str, request_: Any, says: str) -> None:
    stub = served.sequences if method == "Predict" else served.vision
    with pytest.raises(grpc.RpcError) as failed:
        getattr(stub, method)(request_, timeout=PATIENCE_S)
    refused = refusal_of(failed.value)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason in ("INVALID_REQUEST", "INVALID_TENSOR", "INVALID_IMAGE")
    assert says in refused.message


def test_the_catalogue_describes_them(client: Client) -> None:
    detector = client.model("detector")
    assert detector.task == "detection"
    assert detector.labels == bundles.THINGS
    assert detector.detection is not None
    assert (detector.detection.max_objects, detector.detection.score_threshold) == (bundles.OBJECTS, 0.05)
    assert client.model("free-detector").image_preparation == "decoded to RGB, any size"
    segmenter = client.model("segmenter")
    assert (segmenter.task, segmenter.detection, segmenter.sequence) == ("segmentation", None, None)
    assert segmenter.image_preparation == "decoded to RGB, shorter side resized to 16, the longer at most 40"
    letters = client.model("letters")
    assert letters.sequence is not None
    assert letters.sequence.max_length == 32


def test_the_asyncio_client_gets_the_same_answers(served: Served) -> None:
    photo = messages.random_photo(3, 8, 16, rows=2)
    files = [messages.png(row) for row in photo]

    async def run() -> None:
        async with AsyncClient(served.address, timeout_s=PATIENCE_S) as client:
            assert (await client.predict("abb", model="letters")).top.label == "b"
            one = await client.detect(files[0], model="detector")
            many = await client.detect_many(files, model="detector")
            assert corners(one) == corners(many[0])
            mask = await client.segment(photo[1], model="segmenter")
            masks = await client.segment_many(photo, model="segmenter")
            np.testing.assert_array_equal(mask.labels, masks[1].labels)

    asyncio.run(run())


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def address(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAFAGA_SERVER", served.address)

    @pytest.fixture
    def photos(self, tmp_path: Path) -> list[str]:
        for name, value in (("bright", 204), ("dark", 20)):
            (tmp_path / f"{name}.png").write_bytes(messages.png(grey(40, 80, value)))
        return [str(tmp_path / "bright.png"), str(tmp_path / "dark.png")]

    def test_detect(self, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["detect", *photos, "--model", "detector"]) == 0
        heading, row, note, _, footer = capsys.readouterr().out.splitlines()
        assert heading.split() == ["FILE", "LABEL", "SCORE", "X", "MIN", "Y", "MIN", "X", "MAX", "Y", "MAX"]
        assert row.split() == [photos[0], "bright", "thing", "0.8000", "0", "0", "80", "40"]
        assert note == f"{photos[1]}: nothing with a score of 0.5 or more"
        assert footer == "detector v1 fp32: 2 images"
        assert main(["detect", photos[0], "absent.png", "--model", "detector", "--min-score", "0", "--json"]) == 2
        found, missing = json.loads(capsys.readouterr().out)
        assert found["objects"][1]["label"] == "dark thing"
        assert found["objects"][1]["box"] == {"x_min": 0, "y_min": 0, "x_max": 40, "y_max": 20}
        assert (found["image_height"], found["image_width"]) == (40, 80)
        assert missing["error"]["reason"] == "FILE"

    def test_segment(self, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "classes.npy"
        assert main(["segment", photos[0], "--model", "segmenter", "--output", str(output)]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows[:2] == [["LABEL", "INDEX", "SHARE", "PROBABILITY"], ["red", "0", "100.00", "%", "0.8000"]]
        np.testing.assert_array_equal(np.load(output), np.zeros((40, 80), np.uint8))
        assert main(["segment", photos[0], "--model", "segmenter", "--json"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)
        assert answer["classes"][0]["share"] == 1

    @pytest.mark.parametrize("symbols", [["abca"], ["a", "b", "c", "a"]])
    def test_predict(self, symbols: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["predict", *symbols, "--model", "letters", "--top-k", "2"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows[:3] == [
            ["RANK", "NEXT", "INDEX", "PROBABILITY"],
            ["1", "a", "0", "0.6000"],
            ["2", "b", "1", "0.2000"],
        ]
        assert main(["predict", *symbols, "--model", "letters", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == "a"
        assert main(["predict", "x", "--model", "letters"]) == 4
        assert "expected one of a, b, c, d" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["detector", "segmenter", "letters"])
def test_the_load_tester_distinguishes_their_answers(served: Served, model: str) -> None:
    (target,) = targets.prepare(Connection(served.address), Wire.RAFAGA, {model: 1.0}, Payloads(), PATIENCE_S)
    same = reader(target.replies).same
    first, second = (each.reference for each in target.requests[:2])
    assert first
    assert second
    assert same(first, first)
    if target.replies is not Replies.DETECT:  # random images are about as bright
        assert not same(first, second)


def ask(stub: Any, model: str, **inputs: Any) -> dict[str, np.ndarray]:
    return oip.arrays(stub.ModelInfer(oip.request(model, **inputs), timeout=PATIENCE_S))


class TestOpenInference:
    @pytest.fixture
    def stub(self, served: Served) -> Any:
        return oip.stub(served)

    def test_detectors_and_segmenters(self, stub: Any) -> None:
        photo = messages.random_photo(4, 8, 16, rows=2)
        found = ask(stub, "detector", image=photo)
        for name, expected in zip(("boxes", "scores", "labels"), bundles.detect(photo), strict=True):
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
        found = ask(stub, "segmenter", image=photo)
        np.testing.assert_array_equal(found["labels"], bundles.segment(photo)[0])

    @pytest.mark.parametrize("output", ["scores", "labels"])
    def test_outputs_of_a_detector_have_no_classes(self, stub: Any, output: str) -> None:
        """It has as many objects as labels here, so the shape alone does not show which they are."""
        request = oip.asking_for(oip.images(messages.random_photo(4, 8, 16), "detector"), output, classification=1)
        refused = refusal(lambda: stub.ModelInfer(request, timeout=PATIENCE_S))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert "on an output of shape [N, classes]" in refused.message

    def test_the_classes_of_the_next_symbol(self, stub: Any) -> None:
        request = oip.asking_for(oip.request("letters", symbols=np.array([[0, 1]])), "probabilities", classification=1)
        best = int(np.argmax(bundles.predict("ab")))
        ((found,),) = oip.arrays(stub.ModelInfer(request, timeout=PATIENCE_S))["probabilities"]
        assert found.decode().split(":")[1:] == [str(best), "abcd"[best]]

    def test_sequences(self, stub: Any) -> None:
        symbols = np.array([[0, 1, 2, 2], [3, 9, 9, 9]])
        found = ask(stub, "letters", symbols=symbols, length=np.array([4, 1]))["probabilities"]
        np.testing.assert_allclose(found, [bundles.predict("abcc"), bundles.predict("d")], atol=1e-6)
        found = ask(stub, "letters", symbols=symbols[:1])["probabilities"]  # as long as the array
        np.testing.assert_allclose(found, [bundles.predict("abcc")], atol=1e-6)

    @pytest.mark.parametrize(
        ("symbols", "length", "says"),
        [
            ([[0, 4]], [2], "symbols from 0 to 3"),
            ([[0, -1]], [2], "symbols from 0 to 3"),
            ([[0, 1]], [3], "lengths from 1 to 2"),
            ([[0, 1]], [0], "lengths from 1 to 2"),
            ([[0] * 33], [33], "at most 32 symbols"),
        ],
    )
    def test_bad_sequences(self, stub: Any, symbols: Any, length: Any, says: str) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            ask(stub, "letters", symbols=np.array(symbols), length=np.array(length))
        refused = refusal_of(failed.value)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert says in refused.message
