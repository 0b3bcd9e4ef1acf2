"""Tables line up; JSON is whole."""

from __future__ import annotations

import json

import numpy as np

from rafaga import ModelInfo
from rafaga.cli._output import as_json, table


def test_numbers_stand_to_the_right_and_text_to_the_left() -> None:
    assert table(("NAME", "N", "VALUE"), [("a", 1, 0.5), ("long name", 10, 371.123456), ("", 100, 2.0)]) == (
        "NAME         N    VALUE\n"
        "a            1      0.5\n"
        "long name   10  371.123\n"
        "           100        2"
    )  # fmt: skip


def test_the_longest_texts_lose_their_beginnings_to_fit() -> None:
    path = "photos/summer/street.jpg"
    assert table(("FILE", "LABEL"), [(path, "car"), ("a.jpg", "bicycle")], 24) == (
        "FILE             LABEL\n"
        "…mer/street.jpg  car\n"
        "a.jpg            bicycle"
    )  # fmt: skip
    assert path in table(("FILE", "LABEL"), [(path, "car")])


def test_json_of_results() -> None:
    value = {
        "model": ModelInfo("año", 1, True, "fp32", "openvino"),
        "array": np.ones((1, 2), np.float32),
        "shape": (1, 2),
    }
    assert json.loads(as_json(value)) == {
        "model": {"name": "año", "version": 1, "trained": True, "precision": "fp32", "engine": "openvino"},
        "array": [[1.0, 1.0]],
        "shape": [1, 2],
    }
