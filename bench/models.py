"""The models that are measured: bundles of the catalogue, and an LSTM in a form that Triton can batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

LENET, LSTM, RESNET = "lenet5-mnist", "lstm", "resnet50"
LARGE = (RESNET, "googlenet", "vgg16")
LSTM_BUNDLE, FPN, SSD = "lstm-co2", "resnet50-fpn", "ssd300-vgg16"
INT8 = (*LARGE, FPN, LENET)
_STEPS = 96


def export(repository: Path, maps_and_objects: bool) -> None:
    """Exports the missing models. Large ones get random weights, which does not change their speed."""
    large = (*LARGE, FPN, SSD) if maps_and_objects else LARGE
    wanted = {LENET: "auto", LSTM_BUNDLE: "auto"} | dict.fromkeys(large, "random")
    for name, weights in wanted.items():
        if not (repository / name).is_dir():
            command = [sys.executable, "-m", "export", name, "--weights", weights, "--output", str(repository)]
            subprocess.run([*command, "--precisions", "fp32,int8" if name in INT8 else "fp32"], check=True)
    if not (repository / LSTM).is_dir():
        model = _fixed_length(onnx.load(file(repository, LSTM_BUNDLE)))
        folder = repository / LSTM / "1"
        folder.mkdir(parents=True)
        onnx.save(model, folder / "model.onnx")


def file(repository: Path, name: str, precision: str = "fp32") -> Path:
    """The graph of the newest version; bf16 has the fp32 file."""
    newest = max((repository / name).glob("[1-9]*"), key=lambda folder: int(folder.name))
    return newest / ("model.onnx" if precision in ("fp32", "bf16") else f"model.{precision}.onnx")


def _fixed_length(model: onnx.ModelProto) -> onnx.ModelProto:
    """A forecaster without its input `length`, an input of rank one, which Triton cannot batch: every series has 96
    steps."""
    graph = model.graph
    history = next(value for value in graph.input if value.name != "length")
    history.type.tensor_type.shape.dim[1].CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=_STEPS))
    graph.input.remove(next(value for value in graph.input if value.name == "length"))
    steps = helper.make_tensor("steps", TensorProto.INT64, [1], [_STEPS])
    graph.node.insert(0, helper.make_node("Shape", [history.name], ["rows"], start=0, end=1))
    graph.node.insert(1, helper.make_node("ConstantOfShape", ["rows"], ["length"], value=steps))
    onnx.checker.check_model(model)
    return model
