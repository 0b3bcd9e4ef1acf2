"""Every task in OpenVINO: the same answers, and all that says which engine gave them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rafaga.server.config.settings import ConfigError
from rafaga.server.engines import openvino
from rafaga.v1 import catalog_pb2
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, serving

pytestmark = pytest.mark.skipif(not openvino.installed(), reason="openvino is not installed")


@pytest.fixture(scope="module")
def served(everything: Path) -> Iterator[Served]:
    with serving(everything, engine="openvino,fragile=onnxruntime") as served:
        yield served
        assert served.in_flight == 0


def test_every_task(served: Served) -> None:
    digits, photo, history = messages.random_digits(1, 3), messages.random_photo(2, 8, 16, 2), np.arange(5, dtype="f4")
    symbols = np.array([[bundles.ALPHABET.index(symbol) for symbol in "abca"]])
    boxes, scores, labels = bundles.detect(photo)
    for request, expected in (
        (oip.images(digits), {"probabilities": bundles.classify(digits)}),
        (oip.images(photo, "detector"), {"boxes": boxes, "scores": scores, "labels": labels}),
        (oip.images(photo, "segmenter"), {"labels": bundles.segment(photo)[0]}),
        (oip.images(photo, "backbone"), {"map": bundles.features(photo)}),
        (oip.request("series", history=history[np.newaxis]), {"quantiles": bundles.forecast(history)[np.newaxis]}),
        (oip.request("letters", symbols=symbols), {"probabilities": bundles.predict("abca")[np.newaxis]}),
        (oip.request("plain", x=np.ones((2, 3), np.float32)), {"y": np.full((2, 3), 2)}),
    ):
        found = oip.arrays(oip.stub(served).ModelInfer(request, timeout=PATIENCE_S))
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=request.model_name)


def test_replies_the_catalogue_and_the_metrics_say_which_engine(served: Served) -> None:
    reply = served.vision.Classify(messages.classify(messages.random_digits(1)))
    assert (reply.model.engine, reply.model.precision) == ("openvino", "fp32")
    for name, engine in (("digits", "openvino"), ("plain", "openvino"), ("fragile", "onnxruntime")):
        why = "as configured" if engine == "openvino" else "no other variant is clearly faster"
        model = served.catalog.GetModel(catalog_pb2.GetModelRequest(name=name)).model
        assert (model.engine, model.engine_reason) == (engine, why)
        about = {"model": name, "version": "1", "engine": engine, "precision": "" if name == "plain" else "fp32"}
        assert served.metric("rafaga_model_info", **about) == 1


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino.runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = pytest.raises(ConfigError, match=r"engine: OpenVINO is not installed: pip install 'rafaga\[openvino\]'")
    with missing, serving(tmp_path, engine="auto,digits=openvino"):
        pytest.fail("it starts")
