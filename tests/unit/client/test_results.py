"""What results look like at a prompt and in a notebook, and how they iterate."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

import rafaga

MODEL = rafaga.ModelInfo("<model>", 1, True, "fp32")
TIMING = rafaga.Timing(0, 0, 0, 1)
PREDICTIONS = (rafaga.Prediction("<7>", 7, 0.9), rafaga.Prediction("1", 1, 0.1))


@pytest.mark.parametrize("kind", [rafaga.Classification, rafaga.Continuation])
def test_predictions_are_a_sequence(kind: type[rafaga.Classification | rafaga.Continuation]) -> None:
    found = kind(PREDICTIONS, MODEL, TIMING)
    assert [p.label for p in found] == ["<7>", "1"]
    assert (len(found), found[1], found.top) == (2, PREDICTIONS[1], PREDICTIONS[0])
    assert repr(found) == f"{kind.__name__}({{'<7>': 0.9000, '1': 0.1000}}, model='<model> v1 fp32')"
    assert found == kind(PREDICTIONS, MODEL, TIMING)
    html = found._repr_html_()
    assert "<td>&lt;7&gt;</td>" in html
    assert "<caption>&lt;model&gt; v1 fp32</caption>" in html
    assert rafaga.Classification(PREDICTIONS, MODEL, TIMING) != rafaga.Continuation(PREDICTIONS, MODEL, TIMING)


def test_features() -> None:
    maps = rafaga.FeatureMap("c<4>", 16, np.arange(8, dtype=np.float32).reshape(2, 2, 2))
    found = rafaga.Features((maps,), MODEL, TIMING)
    assert repr(maps) == "FeatureMap('c<4>', stride=16, shape=(2, 2, 2), min=0, mean=3.5, max=7)"
    assert "<td>c&lt;4&gt;</td><td>16</td><td>[2, 2, 2]</td>" in found._repr_html_()


def test_detections_are_drawn_as_boxes() -> None:
    objects = tuple(rafaga.DetectedObject(f"<{i}>", i, 0.5, rafaga.Box(i, 2, i + 10, 22)) for i in range(100))
    found = rafaga.Detections(objects, 240, 320, MODEL, TIMING)
    assert repr(found).endswith("more], model='<model> v1 fp32')")
    assert len(repr(found)) < 600
    html = found._repr_html_()
    assert (html.count("<rect"), "<3>" in html) == (100, False)
    for part in ('<svg viewBox="0 0 320 240"', '<rect x="3.0" y="2.0" width="10.0" height="20.0"', "… and 80 more"):
        assert part in html


def test_a_segmentation_is_drawn_as_an_image() -> None:
    labels = np.array([[0, 1, 1], [2, 1, 1]], np.uint8)
    classes = tuple(rafaga.SegmentedClass(f"<{i}>", i, share, 0.9) for i, share in ((1, 4 / 6), (0, 1 / 6), (2, 1 / 6)))
    found = rafaga.Segmentation(labels, None, classes, 4, 6, MODEL, TIMING)
    assert [c.label for c in found] == ["<1>", "<0>", "<2>"]
    assert len(found) == 3
    assert repr(found).startswith("Segmentation(2x3, [SegmentedClass('<1>', index=1, share=0.6667), ")
    html = found._repr_html_()
    assert "<1>" not in html
    image = Image.open(io.BytesIO(base64.b64decode(html.split("base64,")[1].split('"')[0])))
    np.testing.assert_array_equal(np.asarray(image), labels)
    colours = np.asarray(image.convert("RGB"))
    for index, colour in ((1, colours[0, 1]), (0, colours[0, 0]), (2, colours[1, 0])):
        assert f'background:#{bytes(colour).hex()}">&emsp;</span> &lt;{index}&gt;' in html


def test_results_show_the_first_and_count_the_errors() -> None:
    found = rafaga.Results((rafaga.Classification(PREDICTIONS, MODEL, TIMING), rafaga.InvalidImage("<broken>")))
    assert repr(found).startswith("Results(2 inputs, 1 of them failed: Classification({'<7>': 0.9000")
    assert repr(rafaga.Results(())) == "Results(0 inputs, 0 of them failed)"
    assert "InvalidImage(&#x27;&lt;broken&gt;&#x27;)" in found._repr_html_()
