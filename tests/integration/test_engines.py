"""Every task in OpenVINO: the same answers, and all that says which engine gave them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rafaga import Client
from rafaga.server.config.settings import ConfigError
from rafaga.server.engines import openvino
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Served, serving

pytestmark = pytest.mark.skipif(not openvino.installed(), reason="openvino is not installed")


@pytest.fixture(scope="module")
def served(everything: Path) -> Iterator[Served]:
    with serving(everything, engine="openvino,fragile=onnxruntime") as served:
        yield served
        assert served.in_flight == 0


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address, timeout_s=PATIENCE_S) as client:
        yield client


def test_every_task(client: Client) -> None:
    digits, photo = messages.random_digits(1, 3), messages.random_photo(2, 8, 16, rows=2)
    for image, expected in zip(digits, bundles.classify(digits), strict=True):
        best = client.classify(image, model="digits")[0]
        assert best.probability == pytest.approx(expected.max(), abs=1e-5)
        assert best.label == f"digit {expected.argmax()}"
    detected = client.detect_many(photo, model="detector")
    for found, scores in zip(detected, bundles.detect(photo)[1], strict=True):
        assert [o.score for o in found] == pytest.approx(scores[:2].tolist(), abs=1e-5)
    segmented = client.segment_many(photo, model="segmenter")
    for each, labels in zip(segmented, bundles.segment(photo)[0], strict=True):
        np.testing.assert_array_equal(each.labels, labels)
    for image, expected in zip(photo, bundles.features(photo), strict=True):
        (features,) = client.features(image, model="backbone").maps
        np.testing.assert_allclose(features.array, expected, atol=1e-5)
    history = np.arange(5, dtype=np.float32)
    np.testing.assert_allclose(
        client.forecast(history, model="series", horizon=bundles.HORIZON).values.T, bundles.forecast(history), atol=1e-4
    )
    predicted = client.predict("abca", model="letters", top_k=4)
    assert {p.label: p.probability for p in predicted} == pytest.approx(
        dict(zip(bundles.ALPHABET, bundles.predict("abca").tolist(), strict=True)), abs=1e-5
    )
    np.testing.assert_array_equal(client.infer("plain", {"x": np.ones((2, 3), np.float32)})["y"], 2)


def test_replies_the_catalogue_and_the_metrics_say_which_engine(client: Client, served: Served) -> None:
    reply = served.vision.Classify(messages.classify(messages.random_digits(1)))
    assert (reply.model.engine, reply.model.precision) == ("openvino", "fp32")
    for name, engine in (("digits", "openvino"), ("plain", "openvino"), ("fragile", "onnxruntime")):
        why = "as configured" if engine == "openvino" else "no other variant is clearly faster"
        model = client.model(name)
        assert (model.engine, model.engine_reason) == (engine, why)
        about = {"model": name, "version": "1", "engine": engine, "precision": "" if name == "plain" else "fp32"}
        assert served.metric("rafaga_model_info", **about) == 1


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino.runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = pytest.raises(ConfigError, match=r"engine: OpenVINO is not installed: pip install 'rafaga\[openvino\]'")
    with missing, serving(tmp_path, engine="auto,digits=openvino"):
        pytest.fail("it starts")
