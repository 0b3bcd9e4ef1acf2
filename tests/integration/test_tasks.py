"""Detection, segmentation and next symbols, by the SDK, the commands and the Open Inference Protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rafaga import Continuation
from rafaga.cli import main
from rafaga.load import targets
from rafaga.load.codecs import reader
from rafaga.load.codecs.base import Replies, Wire
from rafaga.load.connection import Connection
from rafaga.load.payloads import Payloads
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """detector (8x16), free-detector and segmenter (any size), letters (1 to 32 of abcd)."""
    root = tmp_path_factory.mktemp("tasks")
    bundles.publish_detector(root)
    bundles.publish_detector(root, "free-detector", size=None)
    bundles.publish_segmenter(root)
    bundles.publish_sequence_model(root)
    with serving(root) as served:
        yield served
        assert served.in_flight == 0


def grey(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def corners(found: Any) -> list[list[float]]:
    return [[o.box.x_min, o.box.y_min, o.box.x_max, o.box.y_max] for o in found]


def assert_predicts(symbols: str, labels: Any) -> None:
    found = [label.probability for label in sorted(labels, key=lambda label: label.index)]
    assert found == pytest.approx(bundles.predict(symbols).tolist(), abs=1e-6)


class TestDetect:
    def test_tensors_give_boxes_in_their_own_pixels(self, client: Any) -> None:
        photo = messages.random_photo(0, 8, 16, rows=3)
        _, scores, _ = bundles.detect(photo)
        for found, expected in zip(client.detect_many(photo, model="detector"), scores, strict=True):
            assert [o.label for o in found] == ["bright thing", "dark thing"]
            assert [o.score for o in found] == pytest.approx(expected[:2].tolist(), abs=1e-5)
            assert corners(found) == [[0, 0, 16, 8], [0, 0, 8, 4]]
            assert (found.image_height, found.image_width) == (8, 16)

    def test_files_give_boxes_in_the_pixels_of_the_file(self, client: Any) -> None:
        """The model's input has 8 x 16 pixels, the client's image 60 x 30."""
        found = client.detect(messages.png(grey(60, 30, 200)), model="detector")
        assert corners(found) == [[0, 0, 30, 60], [0, 0, 15, 30]]
        assert (found.image_height, found.image_width) == (60, 30)
        assert found[0].box.width == 30
        files = [messages.png(grey(60, 30, 200)), messages.png(grey(10, 90, 100))]
        many = client.detect_many(files, model="detector")
        assert [corners(f)[0] for f in many] == [[0, 0, 30, 60], [0, 0, 90, 10]]
        assert corners(client.detect(files[0], model="free-detector"))[0] == [0, 0, 30, 60]

    def test_limits(self, client: Any) -> None:
        photo = grey(8, 16, 204)  # scores 0.8 and 0.4
        assert [o.score for o in client.detect(photo, model="detector", min_score=0.5)] == pytest.approx([0.8])
        assert [o.label for o in client.detect(photo, model="detector", max_objects=1)] == ["bright thing"]
        assert len(client.detect(photo, model="detector", max_objects=99)) == 2
        assert len(client.detect(photo, model="detector", min_score=1.0)) == 0
        # Rows after the last object have a score of zero and are not returned.
        assert client.detect(grey(8, 16, 0), model="detector").objects == ()


class TestSegment:
    def test_tensors(self, client: Any) -> None:
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

    def test_files_are_answered_at_the_models_size_and_scale_to_their_own(self, client: Any) -> None:
        """64 x 32 is resized to 32 x 16. The left half is red, the right half blue, in the image and in the answer."""
        photo = np.zeros((64, 32, 3), np.uint8)
        photo[:, :16, 0] = photo[:, 16:, 2] = 255
        found = client.segment(messages.png(photo), model="segmenter")
        assert found.labels.shape == (32, 16)
        assert found.probabilities is None
        assert (found.image_height, found.image_width) == (64, 32)
        np.testing.assert_array_equal(found.full_size(), photo.argmax(2))
        assert {c.label: c.share for c in found.classes} == {"red": 0.5, "blue": 0.5}

    def test_files_of_different_sizes(self, client: Any) -> None:
        """The server takes one size per message; the SDK finds out. The longer side has a limit."""
        files = [messages.png(grey(20, width, 1)) for width in (20, 200, 20)]
        found = client.segment_many(files, model="segmenter")
        assert [answer.labels.shape for answer in found] == [(16, 16), (4, 40), (16, 16)]
        assert [answer.full_size().shape for answer in found] == [(20, 20), (20, 200), (20, 20)]


class TestPredict:
    @pytest.mark.parametrize("symbols", ["a", "abca", "ddddc", "abcd" * 8])
    def test_answers_what_numpy_answers(self, client: Any, symbols: str) -> None:
        found = client.predict(symbols, model="letters", top_k=4)
        assert_predicts(symbols, found.predictions)
        assert client.predict(list(symbols), model="letters").top.label == found.top.label
        assert [p.label for p in client.predict(symbols, model="letters", top_k=1).predictions] == [found.top.label]

    def test_many_in_one_message(self, client: Any) -> None:
        sequences = ["a", "abcdabcd", "abx", "dd", "bca"]
        found = client.predict_many(sequences, model="letters", top_k=4)
        assert list(found.errors) == [2]
        assert str(found.errors[2]) == "symbol 2: expected one of a, b, c, d; got 'x'"
        for sequence, answer in zip(sequences, found.outcomes, strict=True):
            if isinstance(answer, Continuation):
                assert_predicts(sequence, answer.predictions)


def test_the_catalogue_describes_them(client: Any) -> None:
    detector = client.model("detector")
    assert (detector.task, detector.labels) == ("detection", bundles.THINGS)
    assert detector.detection is not None
    assert (detector.detection.max_objects, detector.detection.score_threshold) == (bundles.OBJECTS, 0.05)
    assert client.model("free-detector").image_preparation == "decoded to RGB, any size"
    segmenter = client.model("segmenter")
    assert (segmenter.task, segmenter.detection, segmenter.sequence) == ("segmentation", None, None)
    assert segmenter.image_preparation == "decoded to RGB, shorter side resized to 16, the longer at most 40"
    letters = client.model("letters")
    assert letters.sequence is not None
    assert letters.sequence.max_length == 32


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
        assert rows[:2] == [["RANK", "NEXT", "INDEX", "PROBABILITY"], ["1", "a", "0", "0.6000"]]
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


def ask(served: Served, model: str, **inputs: Any) -> dict[str, np.ndarray]:
    return oip.answer(served, oip.request(model, **inputs))


class TestOpenInference:
    def test_detectors_and_segmenters(self, served: Served) -> None:
        photo = messages.random_photo(4, 8, 16, rows=2)
        found = ask(served, "detector", image=photo)
        for name, expected in zip(("boxes", "scores", "labels"), bundles.detect(photo), strict=True):
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
        np.testing.assert_array_equal(ask(served, "segmenter", image=photo)["labels"], bundles.segment(photo)[0])

    def test_sequences(self, served: Served) -> None:
        symbols = np.array([[0, 1, 2, 2], [3, 9, 9, 9]])
        found = ask(served, "letters", symbols=symbols, length=np.array([4, 1]))["probabilities"]
        np.testing.assert_allclose(found, [bundles.predict("abcc"), bundles.predict("d")], atol=1e-6)
        found = ask(served, "letters", symbols=symbols[:1])["probabilities"]  # as long as the array
        np.testing.assert_allclose(found, [bundles.predict("abcc")], atol=1e-6)
        request = oip.asking_for(oip.request("letters", symbols=np.array([[0, 1]])), "probabilities", classification=1)
        ((best,),) = oip.answer(served, request)["probabilities"]
        index = int(np.argmax(bundles.predict("ab")))
        assert best.decode().split(":")[1:] == [str(index), "abcd"[index]]
