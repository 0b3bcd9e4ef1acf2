"""What is measured: bundles of the catalogue, exported once, and an LSTM in a form that every peer can batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

LENET, LSTM = "lenet5-mnist", "lstm"
LARGE = ("resnet50", "googlenet", "vgg16")
_STEPS = 96


def export(repository: Path) -> None:
    """What is not there yet."""
    wanted = {LENET: "auto", "lstm-co2": "auto"} | dict.fromkeys(LARGE, "random")
    for name, weights in wanted.items():
        if not (repository / name).is_dir():
            command = [sys.executable, "-m", "export", name, "--weights", weights, "--output", str(repository)]
            precisions = "fp32,int8" if name in LARGE else "fp32"
            subprocess.run([*command, "--precisions", precisions], check=True)
    if not (repository / LSTM).is_dir():
        folder = repository / LSTM / "1"
        folder.mkdir(parents=True)
        onnx.save(_whole_series(onnx.load(file(repository, "lstm-co2"))), folder / "model.onnx")


def file(repository: Path, name: str) -> Path:
    """The newest version's fp32 graph."""
    newest = max((repository / name).glob("[1-9]*"), key=lambda folder: int(folder.name))
    return newest / "model.onnx"


def _whole_series(model: onnx.ModelProto) -> onnx.ModelProto:
    """A forecaster without its input `length`: every series has 96 steps. Not every peer knows inputs of rank one."""
    graph = model.graph
    kept = [value for value in graph.input if value.name != "length"]
    kept[0].type.tensor_type.shape.dim[1].CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=_STEPS))
    del graph.input[:]
    graph.input.extend(kept)
    steps = helper.make_tensor("steps", TensorProto.INT64, [1], [_STEPS])
    rows = helper.make_node("Shape", [kept[0].name], ["rows"], start=0, end=1)
    lengths = helper.make_node("ConstantOfShape", ["rows"], ["length"], value=steps)
    nodes = [rows, lengths, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model
