"""Tracing: free axes, the opset, nothing of the exporting machine in the file, nothing on the screen."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.arrays import Arrays
from export.evidence import Sources, find_evidence
from export.graph import ServingGraph, serving_graph
from export.onnx import OPSET, to_onnx
from export.verify import open_session, tensor_specs
from models.entry import Entry
from rafaga.bundle import TensorSpec
from tests.export import small

ENTRIES = (small.classifier(), small.backbone(), small.forecaster())
Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
FREE_AXES: dict[str, Specs] = {
    "small-classifier": (
        (TensorSpec(name="image", dtype="uint8", shape=(None, 16, 16, 3)),),
        (TensorSpec(name="probabilities", dtype="float32", shape=(None, 3)),),
    ),
    "small-backbone": (
        (TensorSpec(name="image", dtype="uint8", shape=(None, None, None, 3)),),
        (
            TensorSpec(name="fine", dtype="float32", shape=(None, 4, None, None)),
            TensorSpec(name="coarse", dtype="float32", shape=(None, 6, None, None)),
        ),
    ),
    "small-forecaster": (
        (
            TensorSpec(name="history", dtype="float32", shape=(None, None)),
            TensorSpec(name="length", dtype="int64", shape=(None,)),
        ),
        (TensorSpec(name="quantiles", dtype="float32", shape=(None, 4, 3)),),
    ),
}


def traced(entry: Entry, path: Path) -> tuple[ServingGraph, Arrays]:
    graph = serving_graph(entry, entry.build())
    example = find_evidence(entry, Sources(), trained=False).example()
    to_onnx(graph, example, path)
    return graph, example


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_file_stands_alone_and_its_axes_are_free(
    entry: Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    traced(entry, path)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": OPSET}
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert str(Path(__file__).parent).encode() not in path.read_bytes(), "a stack trace names this machine's folders"
    assert not model.functions
    output = capsys.readouterr()
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert (output.out, output.err, loud) == ("", "", [])
    assert tensor_specs(open_session(path)) == FREE_AXES[entry.name]


def test_one_row_would_become_a_constant(tmp_path: Path) -> None:
    entry = small.classifier()
    graph = serving_graph(entry, entry.build())
    with pytest.raises(ValueError, match="at least two rows"):
        to_onnx(graph, {"image": np.zeros((1, 16, 16, 3), np.uint8)}, tmp_path / "model.onnx")
